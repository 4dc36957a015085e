"""The trainer's vision tower on the ops of this package, against the tower and the processor of transformers."""

import re

import pytest
import torch
from support import tiny, tiny_families
from test_trainer import length_reward, run_ours, vowel_reward
from transformers import AutoModelForImageTextToText

from vlmkernels.models.attention import VARLEN
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.patch_embed import patch_embeds
from vlmkernels.models.vision import use_vision_ops

torch.set_num_threads(1)
MODELS = {"qwen2-vl": tiny.qwen2_vl, "qwen2.5-vl": tiny.vlm, "qwen3-vl": tiny.qwen3_vl}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same(tmp_path, monkeypatch, name):
    """Losses, gradients of every parameter and parameters, with and without; what is saved and what the model then takes."""
    runs = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr("vlmkernels.train.trainer.use_vision_ops", lambda model, processor: {})
        trainer, logs, gradients = run_ours(
            tmp_path / str(ours), tiny.rows(8, "mixed"), model=MODELS[name](), funcs=(length_reward, vowel_reward),
            max_steps=2, learning_rate=1e-3, beta=0.1,
        )  # fmt: skip
        rows = trainer._experience.rollout.prompts.inputs["pixel_values"]
        assert (rows.dtype, rows.shape[1]) == ((torch.uint8, 588) if ours else (torch.float32, 1176))  # an eighth of the bytes
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


def test_videos_train_alike_shared_or_not(tmp_path):
    """Images as pixels beside videos as normalised rows; one prompt for all its completions, or a copy for each."""
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


def test_what_each_family_gets():
    """Towers that pack patches; of those, pixels where the fast image processor makes them and nothing adapts their weights."""
    for name in tiny_families.BUILDERS:
        case = tiny_families.BUILDERS[name]()
        arguments = use_vision_ops(case.model, with_fast_images(case.processor))
        packs = "image_grid_thw" in family_of(case.model.config).inputs
        assert bool(arguments) == (packs and not name.startswith("glm"))
        assert packs == (vars(case.model.config).get("vision_config", case.model.config)._attn_implementation == VARLEN)
    peft = pytest.importorskip("peft")
    model = tiny.vlm()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["patch_embed.proj"]))
    assert not patch_embeds(model)
    assert use_vision_ops(model, with_fast_images(tiny.processor())) == {}
    processor = with_fast_images(tiny.processor())
    processor.image_processor.image_mean = 0.5  # one for all channels
    assert use_vision_ops(tiny.vlm(), processor)
    processor.image_processor.do_normalize = False
    assert use_vision_ops(tiny.vlm(), processor) == {}
