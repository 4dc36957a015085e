"""Selecting, ordering and joining samples does not change hidden states, in a tiny model of every family."""

from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny, tiny_families
from support.groups import processed
from support.tiny_families import BUILDERS, NEWER, token_id

from vlmkernels.models.families import FAMILIES, TEXT, family_of, media_token_ids, prefix_sharing_unsupported
from vlmkernels.models.inputs import ModelInputs, concat

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array")  # raised by processors with NumPy 2

PAD = token_id("<pad>")


def hidden_states(name: str, batch: ModelInputs) -> list[torch.Tensor]:
    """Return the last hidden states of each sample without padding, (length, H)."""
    with torch.no_grad():
        hidden = tiny_families.case(name).model.model(**batch.inputs, use_cache=False).last_hidden_state
    return [h[mask.bool()] for h, mask in zip(hidden, batch.inputs["attention_mask"], strict=True)]


@cache
def expected(name: str) -> list[torch.Tensor]:
    return hidden_states(name, processed(name))


def assert_same(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def skip_if_newer(model_type: str) -> None:
    if model_type in NEWER:
        pytest.skip(f"transformers {transformers.__version__} does not have {model_type}")


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_hidden_states_do_not_depend_on_the_batch(name, data):
    batch = processed(name)
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=5))  # in any order, with repetitions
    cuts = sorted(data.draw(st.sets(st.integers(1, len(chosen) - 1)))) if len(chosen) > 1 else []
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]
    parts = [part.trim() for part in batch.select(torch.tensor(chosen)).split(sizes)]
    wanted = [expected(name)[index] for index in chosen]
    assert_same([h for part in parts for h in hidden_states(name, part)], wanted)
    joined, chosen = concat(parts, PAD), batch.select(torch.tensor(chosen)).trim()
    assert all(torch.equal(joined.rows[axis], counts) for axis, counts in chosen.rows.items())
    assert joined.inputs.keys() == chosen.inputs.keys()
    for input_name, tensor in chosen.inputs.items():
        if batch.family.axis(input_name) == "token":
            assert torch.equal(joined.inputs[input_name], tensor)
    assert_same(hidden_states(name, joined), wanted)


@pytest.mark.parametrize("name", BUILDERS)
def test_joining_separate_processor_calls(name):
    """Parts of different sizes are padded in the same way as by the processor."""
    batch = processed(name)
    joined = concat([processed(name, 0, 1), *(processed(name, index) for index in range(2, len(batch)))], PAD)
    assert joined.inputs.keys() == batch.inputs.keys()
    for input_name, tensor in batch.inputs.items():
        torch.testing.assert_close(joined.inputs[input_name], tensor, msg=input_name)


@pytest.mark.parametrize("name", BUILDERS)
def test_appending_completions_keeps_prompt_hidden_states(name):
    batch = processed(name)
    repeated = batch.repeat(2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(token_id("a"), token_id("z"), (len(repeated), 3), generator=generator)
    continued = repeated.append(ids, torch.ones_like(ids))
    assert continued.inputs["input_ids"].shape[1] == batch.inputs["input_ids"].shape[1] + 3
    wanted = [h for h in expected(name) for _ in range(2)]
    assert_same([h[:-3] for h in hidden_states(name, continued)], wanted)


@pytest.mark.parametrize("name", BUILDERS)
def test_logits_of_completions_equal_the_logits_they_were_sampled_from(name):
    case, batch = tiny_families.case(name), processed(name).repeat(2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "disable_compile": True}
    options["suppress_tokens"] = media_token_ids(case.model.config, case.processor) or None
    with torch.no_grad():
        sampled = case.model.generate(**batch.inputs, **options, output_logits=True, return_dict_in_generate=True)
        ids = sampled.sequences[:, -4:]
        continued = batch.append(ids, torch.ones_like(ids))
        logits = case.model(**continued.inputs, use_cache=False, logits_to_keep=5).logits
    torch.testing.assert_close(logits[:, :-1], torch.stack(sampled.logits, 1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in BUILDERS if tiny_families.case(name).image])
def test_hidden_states_depend_on_the_image(name):
    """This shows that the tests above fail if a sample gets the wrong image."""
    batch = processed(name)
    rows = {n: -1 if batch.family.spec(n).side_by_side else 0 for n in batch.inputs if n.startswith("pixel_values")}
    turned = {n: t.flip(rows[n]) if n in rows else t for n, t in batch.inputs.items()}
    changed = hidden_states(name, ModelInputs(turned, batch.rows, batch.family))
    differences = [float((a - b).abs().max()) for a, b in zip(changed, expected(name), strict=True)]
    has_media = (batch.num_images + batch.rows["video"]) > 0
    assert all(difference > 1e-2 for difference, media in zip(differences, has_media.tolist(), strict=True) if media)


@pytest.mark.parametrize("model_type", [model_type for family in FAMILIES for model_type in family.model_types])
def test_every_family_has_a_tiny_model(model_type):
    skip_if_newer(model_type)
    assert model_type in {tiny_families.case(name).model.config.model_type for name in BUILDERS}


def test_inputs_without_images_are_left_out():
    batch = processed("idefics3").select(torch.tensor([0, 0]))
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    batch = processed("qwen2_5_vl").select(torch.tensor([4]))
    assert "pixel_values" not in batch.inputs
    assert batch.inputs["second_per_grid_ts"].shape == (1,)


def test_text_models():
    model = tiny.text_model()
    assert family_of(model.config) is TEXT
    assert media_token_ids(model.config, tiny.tokenizer()) == []


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("qwen3_vl", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]),
        (
            "glm4v",
            ["<|image|>", "<|video|>", *(f"<|{side}_of_{kind}|>" for side in ("begin", "end") for kind in ("image", "video"))],
        ),
        ("ernie4_5_vl_moe", [f"<|{kind}_{part}|>" for kind in ("IMAGE", "VIDEO") for part in ("PLACEHOLDER", "START", "END")]),
        ("hunyuan_vl", ["<image_pad>", "<image_start>", "<image_end>"]),
        (
            "minicpmv4_7",
            ["<|image_pad|>", "<|video_pad|>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"],
        ),
        ("llava", ["<image>"]),
        ("mistral3", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]),
        ("llava_onevision", ["<image>", "<video>"]),
        ("internvl", ["<IMG_CONTEXT>", "<img>", "</img>"]),
        ("aya_vision", ["<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"]),
        ("ovis2", ["<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]),
        ("idefics3", ["<image>", "<fake_token_around_image>", "<global-img>"]),
        ("gemma3", ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]),
        ("paligemma", ["<image>"]),
        ("gemma4", ["<|image|>", "<|image>", "<image|>", "<|video|>", "<|audio|>", "<|audio>", "<audio|>"]),
        ("lfm2_vl", ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]),
        ("lfm3_vl", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]),
        ("kimi_k25", ["<|media_pad|>", "<|kimi_k25_video_placeholder|>", "<|media_begin|>", "<|media_end|>"]),
        (
            "molmo2",
            [
                f"<{name}>"
                for name in (
                    "im_patch",
                    "im_col",
                    "im_start",
                    "low_res_im_start",
                    "im_end",
                    "frame_start",
                    "frame_end",
                    "im_low",
                )
            ],
        ),
    ],
)
def test_media_token_ids(name, tokens):
    skip_if_newer(name)
    case = tiny_families.case(name)
    assert media_token_ids(case.model.config, case.processor) == sorted(map(token_id, tokens))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen2_vl", {"layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked_attention"),
        ("paligemma", {"attn_logit_softcapping": 50.0}, r"caps the scores, .* \(attn_logit_softcapping=50.0\)"),
        ("internvl", {"model_type": "mamba"}, "its decoder must be one of cohere2, .*, got mamba"),
    ],
)
def test_prefix_sharing_unsupported(monkeypatch, name, changes, reason):
    skip_if_newer(name)
    config = tiny_families.case(name).model.config
    for attribute, value in changes.items():
        assert prefix_sharing_unsupported(config) is None
        monkeypatch.setattr(config.get_text_config(), attribute, value, raising=False)  # absent in transformers 5.17
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(prefix_sharing_unsupported(config))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2_vl", {"num_tiles": torch.ones(3)}, r"family qwen2_vl must be among input_ids, .*, got 'num_tiles'"),
        ("qwen2_vl", {"second_per_grid_ts": torch.ones(3)}, "family qwen2_vl must be among .*, got 'second_per_grid_ts'"),
        ("text", {"pixel_values": torch.ones(3)}, "family text must be among input_ids, attention_mask, got 'pixel_values'"),
        ("llava", {"pixel_values": torch.ones(3, 3, 28, 28)}, "pixel_values must have 4 rows, one for each of: images, got 3"),
        ("llava", {"pixel_values": None}, "inputs must have pixel_values for the 4 images or videos, got input_ids"),
        ("qwen3_vl", {"image_grid_thw": torch.ones(4, 3)}, "image_grid_thw must have one row per image or video, 5, got 4"),
        (
            "qwen3_vl",
            {"pixel_values": torch.ones(43, 8)},
            "pixel_values must have 44 rows, one for each of: patches of .*, got 43",
        ),
        ("internvl", {"pixel_values": torch.ones(16, 3, 2, 2)}, "pixel_values must have rows with .*, got 16 rows"),
        (
            "idefics3",
            {"pixel_values": torch.ones(3, 6, 3, 28, 28)},
            "pixel_values must have 4 rows, one for each of: samples; .*3",
        ),
        (
            "llava_onevision",
            {"batch_num_images": torch.ones(5)},
            "batch_num_images must have 4 rows, .* samples that have an .* 5",
        ),
        (
            "gemma4",
            {"num_frames_per_video": torch.ones(2)},
            "num_frames_per_video must have one row per image or video, 3, got 2",
        ),
        (
            "lfm2_vl",
            {"pixel_values": torch.ones(5, 64, 147)},
            r"pixel_values must have rows with .* in proportion to spatial_shapes, got 5 rows for \[0, 4, 16, 36\] tokens",
        ),
        (
            "molmo2",
            {"image_num_crops": torch.ones(4, dtype=torch.int64)},
            "pixel_values must have 4 rows, one for each of: crops of images; .*, got 12",
        ),
        (
            "minicpmv4_7",
            {"pixel_values": torch.ones(1, 3, 7, 7 * 239)},
            "pixel_values must have 240 rows, one for each of: patches of images; .*, got 239",
        ),
        (
            "minicpmv4_7",
            {"target_sizes": torch.full((14, 2), 4)},
            r"target_sizes must have rows with .* in proportion to target_sizes, got 14 rows for \[0, 1, 6, 5, 0, 3\] tokens",
        ),
        ("text", {"attention_mask": None}, "inputs must have attention_mask, got input_ids"),
    ],
)
def test_errors_of_from_processor(name, change, message):
    skip_if_newer(name)
    batch = processed(name)
    inputs = {n: t for n, t in {**batch.inputs, **change}.items() if t is not None}
    with pytest.raises(ValueError, match=message):
        ModelInputs.from_processor(inputs, batch.family, batch.num_images, batch.rows["video"])


def test_errors_of_split_and_concat():
    batch = processed("llava_onevision")
    with pytest.raises(TypeError, match="pixel_values must be a tensor, got list"):
        ModelInputs.from_processor({**batch.inputs, "pixel_values": [1]}, batch.family, batch.num_images, batch.rows["video"])
    with pytest.raises(ValueError, match=r"sizes must add up to the 6 samples, got \[2, 3\]"):
        batch.split([2, 3])
    with pytest.raises(ValueError, match="batches must be of one family, got llava_onevision, text"):
        concat([batch, processed("text")], PAD)
    frames = batch.inputs["pixel_values_videos"].repeat(1, 2, 1, 1, 1)
    longer = ModelInputs({**batch.inputs, "pixel_values_videos": frames}, batch.rows, batch.family)
    with pytest.raises(ValueError, match=r"pixel_values_videos must have one size along axis 1 in batches .*, got \(2, 4\)"):
        concat([batch, longer], PAD)
    unsized = ModelInputs({n: t for n, t in batch.inputs.items() if n != "image_sizes"}, batch.rows, batch.family)
    with pytest.raises(ValueError, match="inputs must have image_sizes in all batches or none, got input_ids"):
        concat([batch, unsized], PAD)
    stacked = processed("idefics3")
    with pytest.raises(ValueError, match="pixel_values must be absent where no sample has an image or video, got 4 rows"):
        ModelInputs.from_processor(stacked.inputs, stacked.family, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("name", BUILDERS)
def test_equal_samples_and_images_are_found(name):
    """Samples can be in any order. Two samples with the same text and different pixels are not equal."""
    batch = processed(name)
    last = len(batch) - 1
    chosen = torch.tensor([last, 1, 0, 1, last, 1])
    repeated = batch.select(chosen)
    assert repeated.originals().tolist() == [0, 1, 2, 1, 0, 1]
    pixels = next((input_name for input_name in batch.inputs if input_name.startswith("pixel_values")), None)
    if pixels is None:
        return
    axis = batch.family.axis(pixels)
    owner = int(repeated.rows[axis].nonzero()[-1])  # the last sample that has any
    end = int(repeated.rows[axis][: owner + 1].sum())
    if batch.family.spec(pixels).side_by_side:
        repeated.inputs[pixels][..., end * repeated.inputs[pixels].shape[2] - 1] += 1
    else:
        repeated.inputs[pixels][end - 1] += 1
    first = chosen.tolist().index(int(chosen[owner]))
    assert repeated.originals()[owner] == owner != first
    images = batch.select(chosen).equal_images()
    if {batch.family.axis(n) for n in batch.inputs} <= {"token", "image", "image_patch"}:
        numbers = [n for sample in chosen.tolist() for n in range(*_range(batch.num_images, sample))]
        assert images.tolist() == [numbers.index(n) for n in numbers]
    else:
        assert images is None


def _range(counts: torch.Tensor, sample: int) -> tuple[int, int]:
    end = int(counts[: sample + 1].sum())
    return end - int(counts[sample]), end
