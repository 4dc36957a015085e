"""The planner's counts for every family, compared with its processor, its layers and its cache."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
import transformers as tf
from support import tiny_families
from support.planner import CPU, SMALL
from torch.utils.flop_counter import FlopCounterMode

from vlmkernels.models.families import family_of
from vlmkernels.plan import ModelShape, plan
from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.mixers import Span, mixers_of
from vlmkernels.plan.workload import StepTokens

torch.set_num_threads(1)

# The image processor chooses the tiles or the size of an image. Those in WHOLE neither drop patches nor repeat or pad them.
WHOLE = {"aya_vision", "gemma4", "gemma4_ple", "gemma4_unified", "idefics3", "internvl", "lfm2_vl", "minicpmv4_7", "ovis2"}
CHOSEN = {*WHOLE, "smolvlm", "llava_next", "llava_onevision", "molmo2"}
WITH_IMAGES = [name for name in tiny_families.BUILDERS if not name.endswith("_videos") and name not in ("text", "qwen3_next")]
# One name per decoder.
DECODERS = {
    *("text", "qwen2_vl", "qwen3_vl", "qwen3_5", "qwen3_next", "glm4v", "hunyuan_vl", "pixtral", "gemma3", "aya_vision"),
    *("gemma4", "gemma4_ple", "gemma4_unified", "lfm2_vl", "lfm3_vl", "kimi_k25", "molmo2"),
} & {*tiny_families.BUILDERS}

# Towers without pooling by attention and other modules that run neither once per patch nor once per image token.
TOWERS = {
    *("aya_vision", "ernie4_5_vl_moe", "gemma4_unified", "idefics3", "kimi_k25", "lfm3_vl", "minicpmv4_7", "mistral3"),
    *("pixtral", "qwen2_vl", "qwen3_vl", "minicpmv4_7_4x"),
}
TOWERS = {name for name in TOWERS if name.removesuffix("_4x") in tiny_families.BUILDERS}


def of_processor(name: str):
    """Yield (images of a sample, their number of tokens, their number of patches, the number of images or crops)."""
    case = tiny_families.case(name)
    token, patch = family_of(case.model.config).image_token_id, case.model.config.vision_config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    for index, sample in enumerate(case.samples):
        if not sample.images or sample.videos:
            continue
        inputs = case.inputs(index)
        pixels = inputs["pixel_values"]
        if "spatial_shapes" in inputs:
            patches = inputs["spatial_shapes"].prod(1).sum().item()
        elif "image_position_ids" in inputs:
            patches = (inputs["image_position_ids"] >= 0).all(-1).sum().item()
        elif "image_grid_thw" in inputs:
            patches = len(pixels)
        elif "image_sizes" in inputs and pixels.dim() == 4:
            patches = inputs["image_sizes"].prod(1).sum().item() // side**2
        else:
            patches = pixels.numel() // (3 * side**2)
        yield sample.images, (inputs["input_ids"] == token).sum().item(), patches, len(pixels)


@pytest.mark.parametrize("name", [name for name in WITH_IMAGES if name not in CHOSEN])
def test_image_tokens_equal_those_of_the_processor(name):
    vision = ModelShape.from_config(tiny_families.case(name).model.config).vision
    for images, tokens, patches, rows in of_processor(name):
        repeats = rows // len(images) if name == "gemma3" else 1  # its tests use pan and scan, which is off by default
        assert repeats * sum(vision.image_tokens(width, height) for height, width in images) == tokens
        assert repeats * sum(vision.patches(width, height) for height, width in images) == patches


@pytest.mark.parametrize("name", [name for name in WITH_IMAGES if name in CHOSEN])
def test_image_tokens_must_be_given_if_the_processor_chooses_them(name):
    shape = ModelShape.from_config(tiny_families.case(name).model.config)
    work = replace(SMALL, share_prefix=shape.unshared is None)
    rule = r"^image_tokens must be given .* because its image processor chooses the (tiles|size) of an image, got None$"
    with pytest.raises(ValueError, match=rule):
        plan(shape, work, CPU)
    assert plan(shape, replace(work, images=0), CPU).tokens.prompt == work.prompt_tokens
    found = plan(shape, replace(work, image_tokens=12, prompt_tokens=5), CPU)
    assert (found.tokens.prompt, found.shape.vision.image_tokens(1, 1)) == (17, 12)
    for _, tokens, patches, _ in of_processor(name) if name in WHOLE else ():
        assert shape.with_image_tokens(tokens).vision.patches(1, 1) == patches


def test_given_image_tokens_replace_those_computed_from_the_size():
    shape = ModelShape.from_name("qwen2.5-vl-3b")
    given = plan(shape, replace(SMALL, image_tokens=8, width=999), CPU)
    assert given.tokens == plan(shape, replace(SMALL, width=112, height=56), CPU).tokens


# Operations and memory


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_products_of_the_tower_equal_those_that_torch_counts(name):
    mode = "4x" if name == "minicpmv4_7_4x" else None
    case = tiny_families.BUILDERS[name.removesuffix("_4x")]()
    if mode:
        case.model.config.downsample_mode = case.processor.image_processor.downsample_mode = mode
    shape = ModelShape.from_config(case.model.config)
    inputs = case.inputs(3)  # one image
    tokens = (inputs["input_ids"] == family_of(case.model.config).image_token_id).sum().item()
    case.model.eval().set_attn_implementation("eager")
    encode = case.model.base_model.get_image_features
    accepted = inspect.signature(encode).parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encode(**{key: x for key, x in inputs.items() if key in accepted})
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    given = replace(SMALL, image_tokens=tokens)
    patches = shape.with_image_tokens(tokens).vision.patches(1, 1)
    tower = StepCosts(shape.with_image_tokens(tokens), given, CPU).tower(patches, tokens, 0, 1)
    assert tower.gemm == pytest.approx(products, rel=0.002)  # without the angles of positions


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_attention_of_all_layers_equals_that_counted_by_torch(name):
    case = tiny_families.case(name)
    model = tiny_families.BUILDERS[name]().model.eval()
    model.set_attn_implementation("eager")  # computes every pair, also outside of windows

    def operations(length: int) -> int:
        ids = torch.full((1, length), tiny_families.token_id("a"))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return counter.get_total_flops()

    per_pair = (operations(128) - 2 * operations(64)) / (2 * 64**2)
    mixers = ModelShape.from_config(case.model.config).decoder.mixers
    assert sum(m.layers for m in mixers) == case.model.config.get_text_config().num_hidden_layers
    # Convolutions of recurrent layers have some operations per sequence.
    assert 4 * sum(m.layers * m.query_width for m in mixers) == pytest.approx(per_pair, rel=0.002)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_stored_keys_values_and_states_equal_those_of_the_cache(name):
    case, length = tiny_families.case(name), 24
    ids = torch.full((1, length), tiny_families.token_id("a"))
    with torch.no_grad():
        cache = case.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values

    def elements(value) -> int:
        values = value.values() if isinstance(value, dict) else [value]
        return sum(x.numel() for x in values if isinstance(x, torch.Tensor))

    names = ("keys", "values", "conv_states", "recurrent_states")
    stored = sum(elements(getattr(layer, name, None)) for layer in cache.layers for name in names)
    expected = 0
    for m in ModelShape.from_config(case.model.config).decoder.mixers:
        held = min(length, math.inf if m.window is None else m.window - 1)  # the cache has room for the next token's
        expected += m.layers * (m.state + (0 if m.reused else (m.latent or 2 * m.kv_width) * held))
    assert stored == expected


ROWS = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (tf.MistralConfig(**ROWS, sliding_window=32), {32: 6}),
        (tf.MistralConfig(**ROWS, sliding_window=None), {None: 6}),
        (tf.Qwen2Config(**ROWS, **SLIDING), {None: 2, 32: 4}),
        (tf.Qwen2Config(**ROWS, **{**SLIDING, "use_sliding_window": False}), {None: 6}),
        (tf.Cohere2Config(**ROWS, sliding_window=32), {32: 5, None: 1}),
        (tf.Gemma3TextConfig(**ROWS, sliding_window=32), {32: 5, None: 1}),
    ],
    ids=["mistral", "mistral-full", "qwen2-max-window-layers", "qwen2-full", "cohere2", "gemma3"],
)
def test_windows_of_the_configuration(config, windows):
    assert {m.window: m.layers for m in mixers_of(config)} == windows


def test_other_types_of_layers_are_refused():
    config = tf.Qwen2Config(**ROWS, layer_types=["full_attention"] * 5 + ["chunked_attention"])
    with pytest.raises(NotImplementedError, match=r"layer_types must be among full_attention, .* got chunked_attention"):
        mixers_of(config)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 20])
def test_pairs_in_a_window_equal_those_of_a_mask(window):
    prompt, length, seen = 8, 6, 10**6 if window is None else window
    distance = torch.arange(prompt + length)[:, None] - torch.arange(prompt + length)
    mask = (distance >= 0) & (distance < seen)
    # The planner counts half of a token's pair with itself; a token whose window begins within the sequence has a whole one.
    halves = min(prompt, seen), min(prompt + length, seen)
    assert Span(3, 0, prompt).pairs(window) == 3 * (mask[:prompt].sum().item() - halves[0] / 2)
    assert Span(3, prompt, prompt + length).pairs(window) == 3 * (mask[prompt:].sum().item() - (halves[1] - halves[0]) / 2)


def test_windows_save_operations_and_memory():
    sizes = {**ROWS, "vocab_size": 100, "intermediate_size": 64, "sliding_window": 32}
    windowed = ModelShape.from_config(tf.Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=2))
    full = ModelShape.from_config(tf.Qwen2Config(**sizes, use_sliding_window=False))
    work = replace(SMALL, images=0, prompt_tokens=100, completion_tokens=20, engine="vllm_colocate")
    spans = StepTokens.from_workload(windowed, work).spans
    saved = sum(span.pairs() - span.pairs(32) for span in spans)
    found, other = (plan(shape, work, CPU).phase("forward and loss").flops for shape in (windowed, full))
    assert other - found == pytest.approx(4 * 4 * 64 * saved)

    def stored(shape: ModelShape, **changes) -> float:
        """Return the stored tokens, summed over the layers, of a step whose memory peaks in sampling."""
        small = {"prompts": 1000, "lora_r": 1, "microbatch_tokens": 200}
        return plan(shape, replace(work, **small, **changes), CPU).memory["keys and values"] / (4 * 2 * 32)

    tokens, sequences = 1000 * (100 + 3 * 20), 1000 * 3
    assert stored(full) == 6 * tokens
    assert stored(windowed) == 2 * tokens + 4 * 32 * sequences
    assert stored(windowed, engine="transformers") == 6 * tokens  # TreeCache masks keys outside of the window
    assert stored(windowed, engine="transformers", share_prefix=False) == 2 * 120 * sequences + 4 * 32 * sequences


def test_recurrent_layers_are_linear_in_the_length():
    shape = ModelShape.from_config(tiny_families.case("qwen3_next").model.config)
    (delta,) = [m for m in shape.decoder.mixers if m.state]
    assert 4 * delta.recurrence == 2 * 4 * 2 * 8 * 8  # 2 * 4 * Hv * Dk * Dv

    def attention(work) -> float:
        return plan(shape, work, CPU).phase("forward and loss").parts[0].attention

    few, more = (replace(SMALL, images=0, prompt_tokens=tokens) for tokens in (10, 20))
    pairs = [StepTokens.from_workload(shape, work).pairs for work in (few, more)]
    added = 4 * 32 * (pairs[1] - pairs[0]) + 4 * delta.recurrence * 10 * SMALL.prompts
    assert attention(more) - attention(few) == pytest.approx(added)
    states = plan(shape, replace(few, prompts=1000, lora_r=1, microbatch_tokens=64), CPU).memory["recurrent states"]
    assert states == 4 * delta.state * 1000 * (1 + SMALL.group_size)  # of prompts and completions
