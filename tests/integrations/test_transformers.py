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
    pack = ours.pack_groups(prompts, ours.prompt_positions(model, prompts), group, ids, torch.ones(3, 3, dtype=torch.bool))
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


def test_packed_sequences(paths):
    """With transformers' arguments for flash attention, each sequence gets the results of a separate pass."""
    model = AutoModelForCausalLM.from_pretrained(paths / "text", attn_implementation="vlmkernels").eval()
    sequences = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2]), torch.tensor([6, 5, 3, 5])]
    lengths = torch.tensor([len(s) for s in sequences])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = {
        "input_ids": torch.cat(sequences).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0].split(lengths.tolist())
        for part, sequence in zip(logits, sequences, strict=True):
            torch.testing.assert_close(part, model(sequence.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    message = r"vlmkernels must run packed sequences without these settings, got \{'dropout': 0.5\} in Qwen2Attention"
    with pytest.raises(NotImplementedError, match=message):
        model.train()(**packed)


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


PACKING = ("qwen", "glm")
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
    pack = ours.pack_groups(batch.inputs, ours.prompt_positions(model, batch.inputs), group, ids, mask)
    changes = [ours.use_group_attention, lambda m: m.set_attn_implementation("vlmkernels"), ours.use_varlen_vision]
    if name == "text":
        with pytest.raises(NotImplementedError, match="have a vision tower with a vision_config, got Qwen2ForCausalLM"):
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
        ours.use_varlen_vision(ours.use_group_attention(model))
        assert model.config.text_config._attn_implementation == "vlmkernels"
        model.set_attn_implementation({"vision_config": "sdpa"})
        model.set_attn_implementation({"text_config": "sdpa"})
        assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, expected)
