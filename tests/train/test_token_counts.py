"""The tokens and images that a run counts, against counts by hand."""

import math

import pytest
import torch
from support import tiny
from support.recorded_runs import build
from support.training import fixed_completions

from vlmkernels.train.logs import MetricBuffer

torch.set_num_threads(1)


@pytest.mark.parametrize("share", ["auto", False])
def test_tokens_and_images_by_hand(tmp_path, share):
    """One step with two micro-batches of one group each: the passes are sampling, the reference and the policy."""
    frozen, passes = tiny.vlm(), 3
    frozen.model.visual.requires_grad_(False)
    for model, name in ((tiny.vlm(), "trained"), (frozen, "frozen")):
        trainer = build(tmp_path / name, model=model, beta=0.1, share_prefix=share)
        trainer.engine.shares_prefix = share == "auto"
        trainer.train()
        P = trainer._experience.rollout.prompts.inputs["attention_mask"].sum(1).tolist()
        C = list(map(len, fixed_completions(8)))
        log = trainer.state.log_history[0]
        assert log["tokens_if_unshared"] == passes * (4 * sum(P) + sum(C))
        assert log["images_if_unshared"] == passes * 8
        if share == "auto":
            assert log["tokens_run"] == passes * (sum(P) + sum(C))
            once = name == "frozen" and trainer.prepared.reuses_image_features
            assert log["images_run"] == (2 if once else passes * 2)
        else:
            micro_batches = sum(4 * (p + max(c)) for p, c in zip(P, (C[:4], C[4:]), strict=True))
            assert log["tokens_run"] == 8 * (max(P) + max(C)) + 2 * micro_batches
            assert log["images_run"] == passes * 8


def test_metrics_are_means_over_the_processes_that_have_a_value(monkeypatch):
    """A process without images has no value of a metric of images. The number of tokens exceeds what fp32 can count."""
    monkeypatch.setattr("vlmkernels.train.logs.gather_object", lambda own: [*own, [3.0, math.nan, math.nan, 2.0**30 + 1]])
    metrics = MetricBuffer()
    for loss in (0.0, math.nan, 2.0):
        metrics.add({"loss": torch.tensor(loss), "image_pixels": 784, "image_use/kl": math.nan})
    metrics.replace("num_tokens", 2**30 + 1)
    assert metrics.flush() == {"loss": 2.0, "image_pixels": 784, "image_use/kl": None, "num_tokens": 2**30 + 1}
    monkeypatch.undo()
    assert metrics.flush() == {}
