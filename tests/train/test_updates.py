"""Warnings about weights that cannot represent the updates, and checks that a model can be saved."""

import json
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.training import FixedGenerate, config, length_reward, lora, vowel_reward
from transformers import GenerationConfig

from vlmkernels.train import GRPOTrainer, saving, updates


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the modules under test."""
    found = []
    for module in (updates, saving):
        monkeypatch.setattr(module.logger, "warning", lambda text, *values: found.append(text % values))
    return found


def trainer_of(folder, model=None, processor=None, peft_config=None, **options) -> GRPOTrainer:
    args, funcs = config(folder, **options), [length_reward, vowel_reward]
    processor = processor or tiny.processor()
    trainer = GRPOTrainer(model or tiny.vlm(), funcs, args, tiny.rows(6), processing_class=processor, peft_config=peft_config)
    trainer.engine = FixedGenerate(trainer)
    return trainer


def shares(trainer) -> list[float]:
    return [entry["frac_weights_changed"] for entry in trainer.state.log_history if "frac_weights_changed" in entry]


def test_smallest_update_that_changes_a_weight():
    weights = torch.tensor([1.0, -0.02, 0.0, 3e38], dtype=torch.bfloat16)
    step = updates.rounding_step(weights)[:2]
    assert step[0] == 2**-8
    larger, smaller = ((weights[:2].float().abs() + factor * step).bfloat16() for factor in (1.1, 0.9))
    assert (larger != weights[:2].abs()).all()
    assert (smaller == weights[:2].abs()).all()


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-6, "max_steps": 12}


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (
            torch.bfloat16,
            ADAM,
            ["learning_rate 1e-06 is too small", "An optimizer step changes only"],
        ),
        (torch.bfloat16, {**ADAM, "learning_rate": 1e-2}, []),
        (
            torch.bfloat16,
            {**ADAM, "optim": "sgd"},
            ["An optimizer step changes only"],
        ),
        (torch.float32, ADAM, []),
        (torch.bfloat16, {**ADAM, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 1000}, []),
    ],
    ids=["bf16", "bf16, large steps", "bf16, SGD", "fp32", "bf16, warm-up"],
)
def test_weights_that_do_not_change_are_reported(tmp_path, warnings, dtype, options, expected):
    trainer = trainer_of(tmp_path, tiny.vlm().to(dtype), **options)
    trainer.train()
    assert len(warnings) == len(expected)
    for text, part in zip(warnings, expected, strict=True):
        assert part in text
        assert "weights in bfloat16" in text
        assert "Load the model in float32" in text
    if "warmup_steps" not in options:
        assert max(shares(trainer)) < 0.1 if expected else min(shares(trainer)) > 0.5


def test_the_learning_rate_of_a_given_optimizer_counts(tmp_path, warnings):
    model = tiny.vlm().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args, data = config(tmp_path, learning_rate=1e-6, max_steps=2), tiny.rows(6)
    trainer = GRPOTrainer(model, length_reward, args, data, processing_class=tiny.processor(), optimizers=(optimizer, None))
    trainer.engine = FixedGenerate(trainer)
    trainer.train()
    assert warnings == []


def measured(steps=updates.STEPS, process=0, lr=1e-30, was_skipped=False, dtype=torch.float32) -> list[torch.Tensor]:
    """Run the check alone, on a layer whose gradient is 0 in half of the weights. Returns the shares that it logs."""
    layer, logged = torch.nn.Linear(64, 64, bias=False, dtype=dtype), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    optimizer.step_was_skipped = was_skipped
    check = updates.UpdateCheck(SimpleNamespace(distributed_type="NO"), lambda metrics: logged.extend(metrics.values()))
    args, state = SimpleNamespace(device="cpu", process_index=process), SimpleNamespace(global_step=0, max_steps=100)
    given = {"model": layer, "optimizer": optimizer}
    check.on_train_begin(args, state, None, **given)
    for _ in range(steps):
        layer.weight.grad = (torch.arange(64 * 64).reshape(64, 64) % 2).to(dtype)
        check.on_pre_optimizer_step(args, state, None, **given)
        if not was_skipped:
            optimizer.step()
        check.on_optimizer_step(args, state, None, **given)
    return logged


def test_weights_without_a_gradient_and_skipped_steps_do_not_count(monkeypatch, warnings):
    assert [float(share) for share in measured(lr=1.0)] == [1.0] * updates.STEPS
    assert all(share.isnan() for share in measured(was_skipped=True))  # by the scaler of fp16
    monkeypatch.setattr(updates, "MAX_WEIGHTS", 64)
    assert [float(share) for share in measured(lr=1.0)] == [1.0] * updates.STEPS
    assert warnings == []


def test_one_process_warns_and_the_advice_fits_the_dtype(warnings):
    measured(process=1, dtype=torch.bfloat16)
    assert warnings == []
    measured()
    measured(dtype=torch.bfloat16)
    assert ["Use a larger learning_rate" in text for text in warnings] == [True, False]
    assert ["Load the model in float32" in text for text in warnings] == [False, True]


@pytest.mark.parametrize("sizes", [[1] * 100, [5, 1000, 3, 1, 700], [7], []])
def test_the_sample_is_spread_over_the_model(sizes):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    chosen = updates._spread(parameters)
    assert len(chosen) <= updates.MAX_TENSORS
    assert len(chosen) == len({id(p) for p in chosen})
    large = [p for p in parameters if p.numel() > sum(sizes) / updates.MAX_TENSORS]
    assert {id(p) for p in large} <= {id(p) for p in chosen}


def test_adapters_of_a_16_bit_model_change(tmp_path, warnings):
    trainer = trainer_of(tmp_path, tiny.vlm().to(torch.bfloat16), peft_config=lora(), **ADAM)
    trainer.train()
    assert warnings == []
    assert min(shares(trainer)) > 0.9


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, True),
        ({"temperature": 1e-6, "do_sample": False}, True),
        ({"num_beams": 1, "early_stopping": True}, True),
        ({"temperature": 0.1, "do_sample": True}, False),
    ],
)
def test_sampling_settings_that_cannot_be_saved_are_dropped(tmp_path, warnings, settings, dropped):
    model = tiny.vlm()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=2)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=1).train()
    saved = json.loads((tmp_path / "checkpoint-1" / "generation_config.json").read_text())
    assert saved["eos_token_id"] is not None
    assert ({name: saved.get(name) for name in settings} == settings) != dropped
    assert len([text for text in warnings if "is saved without" in text]) == dropped


def unsaved_config():
    model = tiny.vlm()
    model.config.extra = object()
    return {"model": model}


def unsaved_processor():
    processor = tiny.processor()
    processor.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(NotImplementedError("no"))
    return {"processor": processor}


@pytest.mark.parametrize(
    ("build", "name"), [(unsaved_config, "model.config"), (unsaved_processor, "processing_class")], ids=["config", "processor"]
)
def test_what_cannot_be_saved_is_named_before_the_first_step(tmp_path, warnings, build, name):
    saves = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=f"{name} must be one that save_pretrained can write, got .*Error"):
        trainer_of(tmp_path, **build(), **saves)
    trainer = trainer_of(tmp_path, **build(), **saves, on_save_error="skip")
    trainer.train()
    assert trainer.state.global_step == 1
    assert not (tmp_path / "checkpoint-1").exists()
    assert any(text.startswith(name) for text in warnings)


def test_a_tokenizer_without_a_padding_token(tmp_path):
    processor = tiny.processor()
    processor.tokenizer.pad_token = None
    trainer = trainer_of(tmp_path, processor=processor)
    assert trainer.tokenizer.pad_token == trainer.tokenizer.eos_token
    processor.tokenizer.pad_token = processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="processing_class must have a pad_token or an eos_token, got neither"):
        trainer_of(tmp_path, processor=processor)
