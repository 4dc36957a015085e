"""The contracts of log-probabilities and of adapters: our code passes them, planted faults are named, and the run goes on."""

import itertools

import numpy as np
import pytest
import torch
from support.conformance import output_of

from vlmkernels.conformance import Adapter, AdvantageBatch, load
from vlmkernels.conformance.contract import ERROR, FAIL, NOT_APPLICABLE, PASS, Result
from vlmkernels.conformance.suite import run

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def pick(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Plain(Adapter):
    """Right values, in plain PyTorch. Faults replace ``log_probs``."""

    name = "plain"
    dtypes = DTYPES

    def log_probs(self, logits, temperature):
        return (wide(logits) / temperature).log_softmax(-1)

    def logps_from_logits(self, logits, targets, temperature):
        return pick(self.log_probs(logits, temperature), targets)

    def logps_from_hidden(self, hidden, weight, targets, temperature):
        return self.logps_from_logits(hidden @ weight.T, targets, temperature)


class NoTemperature(Plain):
    def log_probs(self, logits, temperature):
        return super().log_probs(logits, 1.0)


class LateTemperature(Plain):
    def log_probs(self, logits, temperature):
        return super().log_probs(logits, 1.0) / temperature


class Multiplied(Plain):
    def log_probs(self, logits, temperature):
        return super().log_probs(logits, 1 / temperature)


class Sixteen(Plain):
    """Divides and normalizes in the dtype of the logits, and returns fp32."""

    def log_probs(self, logits, temperature):
        scaled = logits / temperature
        return wide(scaled - scaled.logsumexp(-1, keepdim=True))


class Rounded(Plain):
    """Computes in fp32, and returns the dtype of the logits."""

    def log_probs(self, logits, temperature):
        return super().log_probs(logits, temperature).to(logits.dtype)


class Shifted(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return pick(self.log_probs(logits, temperature), targets.roll(1, -1))


class NoMaximum(Plain):
    def log_probs(self, logits, temperature):
        scaled = wide(logits) / temperature
        return scaled - scaled.exp().sum(-1, keepdim=True).log()


class FrozenWeight(Plain):
    def logps_from_hidden(self, hidden, weight, targets, temperature):
        return super().logps_from_hidden(hidden, weight.detach(), targets, temperature)


class HalfGradient(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return super().logps_from_logits((logits + logits.detach()) / 2, targets, temperature)


class WholeBatch(Plain):
    """Subtracts the maximum of the batch, so that large logits of one sample make those of another underflow."""

    def log_probs(self, logits, temperature):
        scaled = wide(logits) / temperature
        scaled = scaled - scaled.detach().amax()
        return scaled - scaled.exp().sum(-1, keepdim=True).log()


def failed(results: list[Result]) -> dict[str, list[Result]]:
    bad = [each for each in results if each.status in (FAIL, ERROR)]
    return {name: [*group] for name, group in itertools.groupby(bad, lambda each: each.contract)}


def groups(adapter: Adapter) -> dict[str, list[Result]]:
    return failed(run(adapter, "logits/*") + run(adapter, "hidden/*"))


def reproduce(result: Result, adapter: Adapter) -> None:
    got, expected = output_of(result.reproduction, adapter)
    assert got
    assert expected


@pytest.mark.parametrize("adapter", [Plain(), load("vlmkernels:Vlmkernels")], ids=["plain", "ours"])
def test_right_code_passes(adapter):
    results = run(adapter, "logits/*") + run(adapter, "hidden/*") + run(adapter, "adapter/*")
    assert not failed(results)
    assert {each.contract for each in results if each.status == PASS} >= {"logits/precision", "hidden/long", "adapter/returns"}


# The contracts that a fault breaks for certain, and what the message says.
FAULTS = {
    NoTemperature: ({"value", "gradient"}, "expected"),
    LateTemperature: ({"value", "gradient"}, "expected"),
    Multiplied: ({"value", "gradient"}, "expected"),
    Sixteen: ({"precision"}, "expected"),
    Rounded: ({"result_dtype"}, "expected torch.float32"),
    Shifted: ({"value", "gradient", "long"}, "expected"),
    NoMaximum: ({"extreme"}, "expected"),
    WholeBatch: ({"independent"}, "expected"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("group", ["logits", "hidden"])
def test_faults_of_values(fault, group):
    rules, message = FAULTS[fault]
    for rule in rules:
        first = failed(run(fault(), f"{group}/{rule}"))[f"{group}/{rule}"][0]
        assert first.status == FAIL
        assert message in first.message
        reproduce(first, fault())


def test_precision_and_dtype_are_distinguished():
    rules = "[vpr][are][els]*"  # value, precision, result_dtype
    assert failed(run(Rounded(), f"logits/{rules}")).keys() == {"logits/result_dtype"}
    assert failed(run(Sixteen(), f"logits/{rules}")).keys() == {"logits/precision"}


def test_fp64_is_compared_in_fp64():
    class Single(Plain):
        def log_probs(self, logits, temperature):
            return super().log_probs(logits.float(), temperature).to(logits.dtype)

    bad = failed(run(Single(), "logits/value"))
    assert all("float64" in each.case for each in bad["logits/value"])
    assert len(bad["logits/value"]) == 4


def test_a_gradient_that_is_dropped_or_wrong():
    bad = failed(run(FrozenWeight(), "hidden/gradient") + run(FrozenWeight(), "adapter/returns"))
    assert "by argument 1" in bad["adapter/returns"][0].message
    assert all(each.status == ERROR for each in bad["hidden/gradient"])
    assert "not have been used in the graph" in bad["hidden/gradient"][0].message
    bad = failed(run(HalfGradient(), "logits/gradient") + run(HalfGradient(), "logits/finite_differences"))
    assert {"logits/gradient", "logits/finite_differences"} <= bad.keys()
    assert "gradient of logits" in bad["logits/finite_differences"][0].message


class Counting(Plain):
    """Returns other values in each call."""

    def __init__(self):
        self.calls = 0

    def logps_from_logits(self, logits, targets, temperature):
        self.calls += 1
        return super().logps_from_logits(logits, targets, temperature) * (1 + self.calls * 1e-7)


class InPlace(Plain):
    def log_probs(self, logits, temperature):
        return super().log_probs(logits.detach().div_(temperature).requires_grad_(), 1.0)


class WrongShape(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return super().logps_from_logits(logits, targets, temperature)[..., :-1]


class Integers(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return super().logps_from_logits(logits, targets, temperature).long()


class Numpy(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return np.zeros(targets.shape)


class Detached(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        return super().logps_from_logits(logits, targets, temperature).detach()


class Raises(Plain):
    def logps_from_logits(self, logits, targets, temperature):
        raise RuntimeError("no kernel image")


class Scales(Plain):
    """Declares nothing for a method that it has."""

    scales = loss_types = ()

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        return batch.rewards[:, 0]


BAD = {
    Counting: ("adapter/deterministic", FAIL, "then"),
    InPlace: ("adapter/inputs", ERROR, "logps_from_logits changed one of its arguments"),
    WrongShape: ("adapter/returns", ERROR, "logps_from_logits must return a tensor of shape (2, 3), returned (2, 2)"),
    Integers: ("adapter/returns", ERROR, "must return a floating-point tensor, returned torch.int64"),
    Numpy: ("adapter/returns", ERROR, "must return a tensor, returned ndarray"),
    Detached: ("adapter/returns", ERROR, "must return a tensor with gradients"),
    Raises: ("adapter/returns", ERROR, "RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("fault", BAD, ids=lambda fault: fault.__name__)
def test_bad_adapters_are_named_and_the_run_goes_on(fault):
    contract, status, message = BAD[fault]
    results = run(fault(), "adapter/*")
    (first, *_) = [each for each in results if each.contract == contract and each.status != NOT_APPLICABLE]
    assert (first.case, first.status) == ("logps_from_logits", status)
    assert message in first.message
    assert "adapter.logps_from_logits(" in first.reproduction
    others = [each for each in results if each.case == "logps_from_hidden"]
    assert len(others) == 3
    assert all(each.status in (PASS, FAIL, ERROR) for each in others)


def test_methods_that_an_adapter_lacks():
    results = run(Plain(), "adapter/*")
    lacking = {each.case for each in results if each.status == NOT_APPLICABLE}
    assert {"advantages", "loss", "logps", "split", "positions", "process", "sample"} == lacking
    assert all(each.message == f"the adapter has no method {each.case}" for each in results if each.case in lacking)


def test_an_adapter_that_declares_nothing():
    assert [each.status for each in run(Scales(), "adapter/*") if each.case == "advantages"] == [PASS] * 3


def test_a_model_that_is_changed():
    class Trains(Adapter):
        name = "trains"

        def positions(self, model, inputs):
            model.train()
            return torch.zeros_like(inputs["input_ids"])

        def logps(self, model, processor, samples, temperature):
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
            return [torch.zeros(len(each.completion_ids), requires_grad=True) for each in samples]

    bad = failed(run(Trains(), "adapter/inputs"))["adapter/inputs"]
    assert {each.case: each.message for each in bad} == {
        "logps": "logps changed the weights of the model",
        "positions": "positions changed model.training",
    }


def test_reproductions_of_all_contracts_run():
    class Zero(Plain):
        def log_probs(self, logits, temperature):
            return super().log_probs(logits, temperature) * 0

    bad = groups(Zero())
    assert len(bad) > 15
    for results in bad.values():
        reproduce(results[0], Zero())
