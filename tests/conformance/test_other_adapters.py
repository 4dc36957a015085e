"""The adapters of Unsloth, SkyRL, ART and AReaL, if these projects are installed."""

import importlib.util

import pytest
import torch

from vlmkernels.conformance import AdvantageBatch, GRPOLossConfig, LossBatch, load, run
from vlmkernels.conformance.models import tiny

PACKAGES = {"unsloth_zoo": "unsloth_zoo", "skyrl": "skyrl", "art": "art", "areal": "areal"}
BATCH = LossBatch(
    logps=torch.tensor([[-1.0, -0.5, -2.0], [-0.25, -1.0, -9.0]]),
    advantages=torch.tensor([1.0, -0.5]),
    loss_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    old_logps=torch.tensor([[-1.5, -0.5, -1.75], [-0.5, -0.75, -1.0]]),
)
# The objective of each project, and its value: ratios e^(1/2), 1, e^(-1/4) and e^(1/4), e^(-1/4), of which the first is clipped
# to 1.25, and the last is raised to 0.875 because its advantage is negative.
SEQUENCE_MEAN = -((1.25 + 1 + 0.7788008) / 3 - 0.5 * (1.2840254 + 0.875) / 2) / 2
TOKEN_MEAN = -((1.25 + 1 + 0.7788008) - 0.5 * (1.2840254 + 0.875)) / 5
OBJECTIVES = {
    "unsloth_zoo": ("grpo", SEQUENCE_MEAN),
    "skyrl": ("grpo", SEQUENCE_MEAN),
    "art": ("grpo", SEQUENCE_MEAN),
    "areal": ("dapo", TOKEN_MEAN),
}
# The cases of logps/value that docs/conformance explains.
REPORTED = {
    "skyrl": {"qwen2_5_vl-mixed"},
    "unsloth_zoo": {f"{model}-special-tokens" for model in ("text", "qwen2_5_vl", "llava")},
}


@pytest.fixture(params=PACKAGES)
def name(request):
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    return request.param


def test_loss(name):
    loss_type, expected = OBJECTIVES[name]
    config = GRPOLossConfig(loss_type, epsilon_low=0.125, epsilon_high=0.25)
    logps = BATCH.logps.clone().requires_grad_()
    batch = LossBatch(logps, BATCH.advantages, BATCH.loss_mask, BATCH.old_logps)
    loss = load(name).loss(batch, config)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logps.grad[1, 2] == 0
    assert logps.grad[0, 2] != 0


def test_advantages(name):
    adapter = load(name)
    if not adapter.has("advantages"):
        pytest.skip("the advantages are those of TRL")
    batch = AdvantageBatch(torch.tensor([[1.0], [0.0], [3.0], [3.5]]), (2, 2), scale="none")
    assert adapter.advantages(batch).tolist() == [0.5, -0.5, -0.25, 0.25]


def test_logps(name):
    results = run(load(name), "logps/value")
    assert {result.case for result in results if result.status in ("fail", "error")} == REPORTED.get(name, set())
    assert any(result.status == "pass" and result.case.startswith("text") for result in results)


def test_importing_art_leaves_transformers_alone():
    if importlib.util.find_spec("art") is None:
        pytest.skip("art is not installed")
    load("art")
    model, _ = tiny("text")
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
