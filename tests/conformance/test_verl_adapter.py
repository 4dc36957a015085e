"""The adapter of verl, whose files run for real.

``make setup`` installs verl and what it imports beside the environment.
"""

import sys
from pathlib import Path

import pytest
import torch

from vlmkernels.conformance import AdvantageBatch, GRPOLossConfig, LossBatch, NotApplicable, load, run

PROJECTS = Path(sys.prefix) / "conformance"
if not (PROJECTS / "verl").is_dir():
    pytest.skip(f"verl is not in {PROJECTS}", allow_module_level=True)


@pytest.fixture(scope="module")
def verl():
    """The adapter; verl's modules are in sys.modules while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PROJECTS)])
        yield load("verl")
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


def batch(**changes):
    fields = {
        "logps": torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, -9.0]]),
        "old_logps": torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -0.5, -3.0]]),
        "advantages": torch.tensor([1.0, -2.0]),
        "loss_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    }
    return LossBatch(**{**fields, **changes})


def test_losses_of_verl(verl):
    # Ratios are e^0.5, e^-1, 1 and e^-0.5, e^0.25; bounds are 0.8 and 1.2.
    e = torch.tensor([0.25]).exp().item()
    terms = ([1.2, e**-4, 1.0], [-2 * 0.8, -2 * e])
    by_tokens = -(sum(terms[0]) + sum(terms[1])) / 5
    by_sequences = -(sum(terms[0]) / 3 + sum(terms[1]) / 2) / 2
    for loss_type, expected in (("dapo", by_tokens), ("grpo", by_sequences)):
        assert verl.loss(batch(), GRPOLossConfig(loss_type)).item() == pytest.approx(expected)
    shared = GRPOLossConfig("dapo")
    assert verl.loss(batch(num_items=20, accumulation_steps=4), shared).item() == pytest.approx(by_tokens / 4)
    assert verl.loss(batch(num_items=20, num_processes=4), shared).item() == pytest.approx(by_tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "verl has no cispo with ratios per sequence"),
        ({"loss_type": "sapo", "delta": 4.0}, "only the loss vanilla bounds the ratio"),
        ({"loss_type": "dapo", "delta": 1.1}, "clip_ratio_c bounds the ratio for negative advantages only"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "verl averages the entropy over tokens with token-mean only"),
    ],
)
def test_what_verl_does_not_support(verl, settings, message):
    with pytest.raises(NotApplicable, match=message):
        verl.loss(batch(), GRPOLossConfig(**settings))


def test_advantages_of_verl(verl):
    rewards = torch.tensor([[1.0], [3.0], [2.0], [2.0], [5.0]])
    got = verl.advantages(AdvantageBatch(rewards, (2, 3), scale="none"))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.0, -1.0, 2.0]))
    got = verl.advantages(AdvantageBatch(rewards, (2, 3), scale="none", baseline="leave_one_out"))
    torch.testing.assert_close(got, torch.tensor([-2.0, 2.0, -1.5, -1.5, 3.0]))


# Contracts with failures of verl: see docs/conformance/verl.md.
KNOWN = {"advantages/equal_rewards_rounded", "loss/empty"}


def test_contracts(verl):
    results = [*run(verl, "advantages/*"), *run(verl, "loss/[ehop]*")]
    # IcePop that rejects all tokens
    assert {result.case for result in results if result.status == "error"} == {"grpo-token-sequence_mask-one_empty_sequence"}
    assert {result.contract for result in results if result.status == "fail"} <= KNOWN
    assert sum(result.status == "pass" for result in results) >= 3
