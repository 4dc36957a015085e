"""``from_pretrained(..., attn_implementation="vlmkernels")``."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from support import tiny, tiny_families
from support.groups import SHARING, completions_of, processed
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import vlmkernels.integrations.transformers as ours


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The folder of a saved vision-language and a saved text model."""
    root = tmp_path_factory.mktemp("models")
    tiny.vlm().save_pretrained(root / "vlm")
    tiny.text_model().save_pretrained(root / "text")
    return root


def encoded():
    """Return two left-padded prompts with an image each."""
    processor = tiny.processor()
    texts = [f"<|vision_start|><|image_pad|><|vision_end|>{text}" for text in ("what is it?", "a")]
    images = [tiny.image(0, width=56), tiny.image(1)]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))


@pytest.mark.parametrize("packed_vision", [False, True])
def test_padded_inputs_equal_sdpa(paths, packed_vision):
    """Compares logits, the gradients of all parameters, and generated tokens."""
    results = []
    for name in ("sdpa", "vlmkernels"):
        model = AutoModelForImageTextToText.from_pretrained(paths / "vlm", attn_implementation=name).eval()
        if packed_vision and name == "vlmkernels":
            ours.use_varlen_vision(model)
        inputs = encoded()
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}, tokens))
    assert model.config.text_config._attn_implementation == "vlmkernels"
    assert ("flash" in model.config.vision_config._attn_implementation) == packed_vision
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_packs_of_groups(paths):
    """Hidden states of completions are equal with one copy of their prompt and image and with a copy for each."""
    model = AutoModelForImageTextToText.from_pretrained(paths / "vlm", attn_implementation="vlmkernels").eval()
    prompts, group = encoded(), torch.tensor([0, 0, 1])
    ids = torch.arange(1, 10).view(3, 3)
    pack = ours.pack_groups(
        prompts,
        ours.prompt_positions(model, prompts),
        group,
        ids,
        torch.ones(3, 3, dtype=torch.bool),
        ours.family_of(model.config),
    )
    with torch.no_grad():
        hidden = model.model(**pack.inputs, use_cache=False).last_hidden_state[0, pack.rows].view(3, 3, -1)
        for completion, owner in enumerate(group.tolist()):
            kept = prompts["attention_mask"][owner].bool()
            own = torch.cat([prompts["input_ids"][owner, kept], ids[completion]]).unsqueeze(0)
            patches = prompts["image_grid_thw"].prod(1).tolist()
            copy = {
                "input_ids": own,
                "pixel_values": prompts["pixel_values"].split(patches)[owner],
                "image_grid_thw": prompts["image_grid_thw"][[owner]],
                "mm_token_type_ids": (own == model.config.image_token_id).int(),
            }
            expected = model.model(**copy, use_cache=False).last_hidden_state[0, -4:-1]
            torch.testing.assert_close(hidden[completion], expected, rtol=1e-4, atol=1e-5)


SEQUENCES = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2]), torch.tensor([6, 5, 3, 5])]
LENGTHS = torch.tensor([len(sequence) for sequence in SEQUENCES])


def packed_sequences() -> dict:
    """Return ``SEQUENCES`` with transformers' arguments for flash attention."""
    cu_seqlens = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.cat(SEQUENCES).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 5,
        "max_length_k": 5,
    }


def assert_separate(model, **packed):
    """Assert that each packed sequence gets the results of a separate pass."""
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0].split(LENGTHS.tolist())
        for part, sequence in zip(logits, SEQUENCES, strict=True):
            torch.testing.assert_close(part, model(sequence.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


def test_packed_sequences(paths):
    model = AutoModelForCausalLM.from_pretrained(paths / "text", attn_implementation="vlmkernels").eval()
    assert_separate(model, **packed_sequences())


@pytest.mark.parametrize("max_length", [5, None])
def test_packed_sequences_with_a_sliding_window(paths, max_length):
    """A window that covers the longest sequence has no effect; a smaller one is refused."""
    settings = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    packed = packed_sequences() | {"max_length_q": max_length, "max_length_k": max_length}
    for window in (5, 9, 4):
        config = transformers.AutoConfig.from_pretrained(paths / "text").to_dict() | settings | {"sliding_window": window}
        config = transformers.Qwen2Config(**config)
        assert set(config.layer_types) == {"sliding_attention"}
        model = AutoModelForCausalLM.from_pretrained(paths / "text", config=config, attn_implementation="vlmkernels").eval()
        if window >= 5:
            assert_separate(model, **packed)
            continue
        message = r"vlmkernels must run packed sequences without these settings, got \{'sliding_window': 4\} in Qwen2Attention"
        with pytest.raises(NotImplementedError, match=message):
            model(**packed)


def set_dropout(model, rate):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate
    return model


def test_packed_sequences_with_dropout(paths):
    """Each sequence is a call of "sdpa", with the same random numbers. Evaluation has no dropout."""
    model = AutoModelForCausalLM.from_pretrained(paths / "text", attn_implementation="vlmkernels").eval()
    assert_separate(set_dropout(model, 0.5), **packed_sequences())
    attention = model.model.layers[0].self_attn.train()
    query, key, value = torch.randn(3, 1, 4, 11, 8).unbind()
    key, value = (x[:, : 4 // attention.num_key_value_groups] for x in (key, value))
    bounds = packed_sequences()["cu_seq_lens_q"]
    torch.manual_seed(0)
    actual, _ = transformers.AttentionInterface()["vlmkernels"](
        attention, query, key, value, None, dropout=0.5, cu_seq_lens_q=bounds, max_length_q=5
    )
    torch.manual_seed(0)
    parts = zip(*(x.split(LENGTHS.tolist(), 2) for x in (query, key, value)), strict=True)
    sdpa = transformers.AttentionInterface()["sdpa"]
    expected = torch.cat([sdpa(attention, *part, None, dropout=0.5)[0] for part in parts], 1)
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, sdpa(attention, query, key, value, None)[0])


def test_attention_sinks_are_refused():
    """transformers refuses "sdpa" for these models, but not other implementations. They would drop the sinks."""
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="vlmkernels")
    with pytest.raises(NotImplementedError, match="must run layers without attention sinks, got s_aux in GptOssAttention"):
        model(SEQUENCES[0].unsqueeze(0))


def test_attention_dropout_of_the_vision_tower(paths):
    """In training, features and random numbers equal those of "sdpa", which runs every image and window by itself too."""
    results = []
    for varlen in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(paths / "vlm", attn_implementation="sdpa")
        if varlen:
            ours.use_varlen_vision(model)
        set_dropout(model, 0.5)
        images = {name: value for name, value in encoded().items() if name in ("pixel_values", "image_grid_thw")}
        for training in (True, False):
            torch.manual_seed(0)
            results.append(torch.cat(model.train(training).model.get_image_features(**images).pooler_output))
    dropped, plain, dropped_varlen, plain_varlen = results
    torch.testing.assert_close(dropped_varlen, dropped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_varlen, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped, plain, rtol=1e-2)


def test_packed_sequences_with_images(paths):
    """The vision tower, which receives the bounds of the sequences too, does not use them as the bounds of its images."""
    model = AutoModelForImageTextToText.from_pretrained(paths / "vlm", attn_implementation="vlmkernels").eval()
    padded = encoded()
    kept = padded["attention_mask"].bool()
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed = {
        "input_ids": padded["input_ids"][kept].unsqueeze(0),
        "position_ids": ours.prompt_positions(model, padded)[:, kept].unsqueeze(1),
        **{name: padded[name] for name in ("pixel_values", "image_grid_thw")},
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seqlens),
        **dict.fromkeys(("max_length_q", "max_length_k"), int(kept.sum(1).max())),
    }
    with torch.no_grad():
        expected = model(**padded).logits[kept]
        torch.testing.assert_close(model(**packed, use_cache=False).logits[0], expected, rtol=1e-4, atol=1e-4)


PACKING = ("qwen", "glm", "lfm3_vl", "kimi_k25", "ernie4_5", "hunyuan", "minicpm")
PACKING += ("gemma4_unified",)  # has no tower, so nothing changes
if Version(transformers.__version__) >= Version("5.20"):
    PACKING += ("pixtral", "mistral3")  # before 5.20 they use a mask instead


@pytest.mark.parametrize("name", SHARING)
def test_one_implementation_for_the_whole_model(name):
    """Vision towers, which receive the arguments of packs too, compute the same as before."""
    model, batch = copy.deepcopy(tiny_families.case(name).model), processed(name)
    group = torch.arange(len(batch)).repeat_interleave(2)
    ids, mask = completions_of([3, 5] * len(batch), vocab=20)
    ids += tiny_families.token_id("a")
    results = []
    pack = ours.pack_groups(batch.inputs, ours.prompt_positions(model, batch.inputs), group, ids, mask, batch.family)
    changes = [ours.use_tree_attention, lambda m: m.set_attn_implementation("vlmkernels"), ours.use_varlen_vision]
    if name in ("text", "qwen3_next"):
        with pytest.raises(NotImplementedError, match="have a vision tower with a vision_config, got Qwen"):
            changes.pop()(model)
    for change in changes:
        change(model)
        with torch.no_grad():
            if change is ours.use_varlen_vision and not name.startswith(PACKING):
                with pytest.raises(
                    NotImplementedError, match="needs a vision tower that packs patches and passes cu_seq_lens_q, got "
                ):
                    model.base_model(**pack.inputs, use_cache=False)
                continue
            results.append(model.base_model(**pack.inputs, use_cache=False).last_hidden_state)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_undo(paths):
    """The calls in the docstrings of the ``use_...`` functions restore the results bit by bit."""
    model = AutoModelForImageTextToText.from_pretrained(paths / "vlm", attn_implementation="sdpa").eval()
    inputs = encoded()
    with torch.no_grad():
        expected = model(**inputs).logits
        ours.use_varlen_vision(ours.use_tree_attention(model))
        assert model.config.text_config._attn_implementation == "vlmkernels"
        model.set_attn_implementation({"vision_config": "sdpa"})
        ours.undo_tree_attention(model)
        assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, expected)
