"""Training with ``use_vision_ops``, compared with the vision tower and the processor of transformers."""

import re

import pytest
import torch
from support import tiny, tiny_families
from support.training import length_reward, run_ours, vowel_reward
from transformers import AutoModelForImageTextToText

from vlmkernels.models.attention import VARLEN
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.patch_embed import patch_embeds
from vlmkernels.models.vision import use_vision_ops

torch.set_num_threads(1)
MODELS = {"qwen2-vl": tiny.qwen2_vl, "qwen2.5-vl": tiny.vlm, "qwen3-vl": tiny.qwen3_vl}


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_original_tower(tmp_path, monkeypatch, name):
    """Compares losses, gradients and parameters, and loads the saved model in transformers."""
    runs = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr("vlmkernels.train.prepare.use_vision_ops", lambda model, processor: {})
        trainer, logs, gradients = run_ours(
            tmp_path / str(ours), tiny.rows(8, "mixed"), model=MODELS[name](), funcs=(length_reward, vowel_reward),
            max_steps=2, learning_rate=1e-3, beta=0.1,
        )  # fmt: skip
        rows = trainer._experience.rollout.prompts.inputs["pixel_values"]
        expected_rows = (torch.uint8, 588) if ours else (torch.float32, 1176)  # uint8 rows have an eighth of the bytes
        assert (rows.dtype, rows.shape[1]) == expected_rows
        runs.append((trainer, logs, gradients))
    (trainer, logs, gradients), (other, expected_logs, expected) = runs
    for mine, theirs in zip(logs, expected_logs, strict=True):
        for key in (name for name in theirs if not re.search("time|per_second", name)):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    for mine, theirs in zip(gradients, expected, strict=True):
        size = max(g.abs().max() for g in theirs.values())
        assert mine.keys() == theirs.keys()
        assert all((mine[n] - g).abs().max() <= 2e-5 * size for n, g in theirs.items())
    parameters = dict(other.model.named_parameters())
    assert dict(trainer.model.named_parameters()).keys() == parameters.keys()
    for n, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[n], rtol=1e-4, atol=1e-6)

    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    inputs = tiny.processor()(text=["<|image_pad|>?"], images=[tiny.image(3)], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(**inputs).logits, loaded(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_videos_with_and_without_prefix_sharing(tmp_path):
    """Images are uint8 pixels and videos normalized rows in the same batch."""
    runs = []
    for share in ("auto", False):
        options = {"share_prefix": share, "max_steps": 2, "learning_rate": 1e-3, "beta": 0.1, "log_completions": True}
        trainer, logs, gradients = run_ours(tmp_path / str(share), tiny.rows(6, "videos"), **options)
        runs.append((logs, gradients))
        assert trainer._experience.rollout.prompts.inputs["pixel_values_videos"].shape[1] == 1176
        assert list((tmp_path / str(share) / "completions").iterdir())
    (logs, gradients), (expected_logs, expected) = runs
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected_logs], rel=1e-4, abs=1e-6)
    for mine, theirs in zip(gradients, expected, strict=True):
        size = max(g.abs().max() for g in theirs.values())
        assert any(g.abs().max() > 0 for n, g in theirs.items() if "visual" in n)
        assert all((mine[n] - g).abs().max() <= 2e-5 * size for n, g in theirs.items())


def test_each_family():
    """Towers that pack patches are changed. They accept pixels if the image processor is fast and no adapter changes them."""
    for name in tiny_families.BUILDERS:
        case = tiny_families.BUILDERS[name]()
        arguments = use_vision_ops(case.model, with_fast_images(case.processor))
        packs = name.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4"))
        assert bool(arguments) == (packs and not name.startswith("glm"))
        assert packs == (vars(case.model.config).get("vision_config", case.model.config)._attn_implementation == VARLEN)
    peft = pytest.importorskip("peft")
    model = tiny.vlm()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["patch_embed.proj"]))
    assert not patch_embeds(model)
    with pytest.warns(UserWarning, match=r"Qwen2_5_VL.* has no patch_embed.proj .* remain floats"):
        assert use_vision_ops(model, with_fast_images(tiny.processor())) == {}
    processor = with_fast_images(tiny.processor())
    processor.image_processor.image_mean = 0.5  # one value for all channels
    assert use_vision_ops(tiny.vlm(), processor)
    processor.image_processor.do_normalize = False
    assert use_vision_ops(tiny.vlm(), processor) == {}
