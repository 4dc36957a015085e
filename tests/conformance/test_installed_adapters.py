"""The adapters of verl, OpenRLHF and ms-swift, whose files run for real.

``make conformance`` installs the projects and what they import beside the environment.
"""

import sys
from pathlib import Path

import pytest
import torch

from vlmkernels.conformance import AdvantageBatch, GRPOLossConfig, LossBatch, NotApplicable, load, run

PROJECTS = Path(sys.prefix) / "conformance"
MODULES = {"verl": "verl", "openrlhf": "openrlhf", "ms_swift": "swift"}


@pytest.fixture(scope="module", params=MODULES)
def adapter(request):
    """An adapter; the modules of its project are in sys.modules while it is tested."""
    module = MODULES[request.param]
    if not (PROJECTS / module).is_dir():
        pytest.skip(f"{request.param} is not in {PROJECTS}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PROJECTS)])
        yield load(request.param)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        del sys.modules[name]


def batch(**changes):
    fields = {
        "logps": torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, -9.0]]),
        "old_logps": torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -0.5, -3.0]]),
        "advantages": torch.tensor([1.0, -2.0]),
        "loss_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    }
    return LossBatch(**{**fields, **changes})


def test_losses(adapter):
    # Ratios are e^0.5, e^-1, 1 and e^-0.5, e^0.25; bounds are 0.8 and 1.2.
    e = torch.tensor([0.25]).exp().item()
    terms = ([1.2, e**-4, 1.0], [-2 * 0.8, -2 * e])
    by_tokens = -(sum(terms[0]) + sum(terms[1])) / 5
    by_sequences = -(sum(terms[0]) / 3 + sum(terms[1]) / 2) / 2
    for loss_type, expected in (("dapo", by_tokens), ("grpo", by_sequences)):
        assert adapter.loss(batch(), GRPOLossConfig(loss_type)).item() == pytest.approx(expected)
    shared = GRPOLossConfig("dapo")
    assert adapter.loss(batch(num_items=20, accumulation_steps=4), shared).item() == pytest.approx(by_tokens / 4)
    assert adapter.loss(batch(num_items=20, num_processes=4), shared).item() == pytest.approx(by_tokens)


def test_advantages(adapter):
    rewards = torch.tensor([[1.0], [3.0], [2.0], [5.0]])
    got = adapter.advantages(AdvantageBatch(rewards, (2, 2), scale="none"))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.5, 1.5]))
    got = adapter.advantages(AdvantageBatch(rewards, (2, 2), scale="none", baseline="leave_one_out"))
    torch.testing.assert_close(got, torch.tensor([-2.0, 2.0, -3.0, 3.0]))


@pytest.mark.parametrize("adapter", ["verl"], indirect=True)
def test_unequal_groups(adapter):
    rewards = torch.tensor([[1.0], [3.0], [2.0], [2.0], [5.0]])
    got = adapter.advantages(AdvantageBatch(rewards, (2, 3), scale="none"))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.0, -1.0, 2.0]))
    got = adapter.advantages(AdvantageBatch(rewards, (2, 3), scale="none", baseline="leave_one_out"))
    torch.testing.assert_close(got, torch.tensor([-2.0, 2.0, -1.5, -1.5, 3.0]))


@pytest.mark.parametrize(
    ("adapter", "settings", "message"),
    [
        ("verl", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, "no cispo with ratios per sequence"),
        ("verl", {"loss_type": "sapo", "delta": 4.0}, "only the loss vanilla bounds the ratio"),
        ("verl", {"loss_type": "dapo", "delta": 1.1}, "clip_ratio_c bounds the ratio for negative advantages only"),
        ("verl", {"loss_type": "grpo", "entropy_coef": 0.1}, "averages the entropy over tokens with token-mean only"),
        ("openrlhf", {"use_bias_correction_kl": True}, "does not multiply the KL term by the ratio"),
        ("ms_swift", {"use_bias_correction_kl": True}, "does not multiply the KL term by the ratio"),
    ],
    indirect=["adapter"],
)
def test_what_a_project_does_not_support(adapter, settings, message):
    with pytest.raises(NotApplicable, match=message):
        adapter.loss(batch(), GRPOLossConfig(**settings))


# Failures and errors that docs/conformance explains.
KNOWN = {"advantages/equal_rewards_rounded", "loss/empty"}
ERRORS = {"verl": {"grpo-token-sequence_mask-one_empty_sequence"}}  # IcePop that rejects all tokens


def test_contracts(adapter):
    results = [*run(adapter, "advantages/*"), *run(adapter, "loss/[ehop]*")]
    assert {result.case for result in results if result.status == "error"} == ERRORS.get(adapter.source, set())
    assert {result.contract for result in results if result.status == "fail"} <= KNOWN
    assert sum(result.status == "pass" for result in results) >= 3
