"""Optimizers that need other packages, or that step within the backward pass."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.training import config, run_ours
from transformers import trainer_optimizer

from vlmkernels.train import optimizers


@pytest.fixture
def installed(monkeypatch):
    """installed(names): let only these modules be found."""

    def find(*names):
        monkeypatch.setattr(optimizers, "find_spec", lambda name: object() if name in names else None)

    return find


@pytest.mark.parametrize(
    ("name", "module", "source"),
    [
        ("adamw_8bit", "bitsandbytes", "'vlmkernels[qlora]'"),
        ("paged_adamw_8bit", "bitsandbytes", "'vlmkernels[qlora]'"),
        ("lion_8bit", "bitsandbytes", "'vlmkernels[qlora]'"),
        ("adamw_torch_8bit", "torchao", "torchao"),
        ("galore_adamw_8bit_layerwise", "galore_torch", "galore-torch"),
        ("apollo_adamw_layerwise", "apollo_torch", "apollo-torch"),
        ("adalomo", "lomo_optim", "lomo-optim"),
    ],
)
def test_missing_packages_are_named(tmp_path, installed, name, module, source):
    installed()
    with pytest.raises(ImportError) as error:
        config(tmp_path, optim=name)
    assert str(error.value) == f"optim '{name}' needs {module}: pip install {source}"


def test_optimizers_of_torch_need_nothing(tmp_path, installed):
    installed()
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd"):
        assert config(tmp_path, optim=name).optim == name


IN_BACKWARD = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear", "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps must be 1 .* every backward pass takes a step, got 2",
        ),
        (
            {"max_tokens_per_microbatch": 512},
            "max_tokens_per_microbatch must be None .* every backward pass takes a step, got 512",
        ),
        ({"max_grad_norm": 1.0}, "max_grad_norm must be 0 .* gradients are gone before they can be clipped, got 1.0"),
        ({"on_nonfinite": "skip"}, "on_nonfinite must be 'raise' .* before gradients can be checked, got 'skip'"),
    ],
    ids=["accumulation", "splits", "clipping", "skipped steps"],
)
def test_steps_within_the_backward_pass_exclude_options(tmp_path, installed, options, message):
    installed("galore_torch", "lomo_optim")
    for name in ("galore_adamw_layerwise", "lomo"):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **{**IN_BACKWARD, "optim": name, **options})


def test_steps_within_the_backward_pass_equal_steps_after_it(tmp_path, installed, monkeypatch):
    """With AdamW in place of GaLore's, which has other moments."""
    installed("galore_torch")
    names = ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"]
    adamw = partial(torch.optim.AdamW, weight_decay=0.0)
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**dict.fromkeys(names, adamw)))
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)
    runs = []
    for options in (IN_BACKWARD, {"optim": "adamw_torch", "gradient_accumulation_steps": 1}):
        trainer, logs, gradients = run_ours(tmp_path, tiny.rows(4), max_steps=2, **options)
        runs.append((dict(trainer.model.named_parameters()), logs, gradients))
    (found, logs, gradients), (expected, expected_logs, _) = runs
    assert not gradients[0]
    assert logs[0]["frac_weights_changed"] is None
    assert [entry["loss"] for entry in logs] == pytest.approx([entry["loss"] for entry in expected_logs], abs=1e-6)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-4)
