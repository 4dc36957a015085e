"""few_rows_linear against fp64, and in the layers of a model."""

from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.budget import assert_within_budget

from vlmkernels.backend import load, use_backend, why_not
from vlmkernels.models.few_rows import few_rows_linears
from vlmkernels.ops.few_rows_linear import few_rows_linear

SHAPES = [
    (1, 1, 1),
    (1, 5, 40),
    (2, 3, 16),
    (3, 67, 33),
    (4, 64, 256),
    (5, 130, 17),
    (16, 257, 1100),
    (7, 2, 4000),
    (64, 9, 31),
]


def need(backend, *tensors):
    if reason := why_not("few_rows_linear", backend, *tensors):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(("rows", "outputs", "width"), SHAPES)
def test_matches_fp64(backend, rows, outputs, width):
    """Without a bias, with one, and with a strided one, and rows of larger tensors whose other elements are NaN."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.full((rows, width + 5), torch.nan), torch.full((outputs + 1, width + 3), torch.nan)
    x[:, 2:-3], weight[1:, 1:-2] = torch.randn(rows, width, generator=rng), torch.randn(outputs, width, generator=rng)
    x, weight, bias = x[:, 2:-3], weight[1:, 1:-2], torch.randn(outputs, generator=rng)
    need(backend, x, weight)
    for b in (None, bias, bias.repeat_interleave(2)[::2]):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        eager = torch.nn.functional.linear(x, weight, b)
        assert_within_budget("out", few_rows_linear(x, weight, b, backend=backend), eager, exact)


def test_results_do_not_depend_on_other_rows():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(13, 70, generator=rng), torch.randn(37, 70, generator=rng)
    need("cpp", x, weight)
    whole = few_rows_linear(x, weight, backend="cpp")
    for rows in (slice(0, 1), slice(5, 8), slice(3, 13)):
        assert torch.equal(few_rows_linear(x[rows], weight, backend="cpp"), whole[rows])
    for columns in (slice(0, 3), slice(2, 9)):
        assert torch.equal(few_rows_linear(x, weight[columns], backend="cpp"), whole[:, columns])


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(shape):
    rows, outputs, width = shape
    x, weight, bias = torch.ones(rows, width), torch.ones(outputs, width), torch.ones(outputs)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(few_rows_linear(x, weight, bias), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x must have two axes, got \(3,\)"),
        ({"weight": torch.ones(4, 2)}, ValueError, r"weight must have the shape of x, \(4, 3\), got \(4, 2\)"),
        ({"weight": torch.ones(4, 3, dtype=torch.bfloat16)}, TypeError, "weight must have dtype float32, got bfloat16"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have the shape of weight, \(4,\), got \(3,\)"),
        ({"backend": "triton"}, ValueError, "backend must be one of auto, cpp, torch"),
        ({"x": torch.ones(2, 3).half(), "weight": torch.ones(4, 3).half(), "backend": "cpp"}, NotImplementedError, "float32"),
    ],
)
def test_bad_calls(change, error, message):
    with pytest.raises(error, match=message):
        few_rows_linear(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3)} | change)


def test_layers_of_a_model(monkeypatch):
    """The layers with few rows, without gradients; afterwards the model is as before."""
    from vlmkernels.models import few_rows

    model, calls = tiny.text_model().eval(), []
    need("cpp", model.lm_head.weight)
    kernels = load("few_rows_linear", "cpp")
    counting = SimpleNamespace(fwd=lambda *args: calls.append(len(args[0])) or kernels.fwd(*args))
    monkeypatch.setattr(few_rows, "load", lambda op, name: counting)
    ids = torch.arange(10).view(2, 5)
    expected = model(ids).logits
    with few_rows_linears(model):
        model(ids)
        assert not calls
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            count = len(calls)
            model(ids.repeat(7, 1))
            assert len(calls) == count
    assert count == sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert set(calls) == {10}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("rows", "large", "used"),
    [(1, False, 0), (7, False, 0), (8, False, 1), (64, False, 1), (65, False, 0), (1, True, 0), (2, True, 1), (7, True, 1)],
)
def test_rows_for_which_it_is_faster(monkeypatch, rows, large, used):
    """With fewer rows torch is faster, unless the weight is larger than the caches."""
    from vlmkernels.models import few_rows

    layer, x, calls = torch.nn.Linear(8, 5), torch.randn(1, rows, 8), []
    need("cpp", layer.weight)
    monkeypatch.setattr(few_rows, "_LARGE", 8 * 5 + (not large))
    kernels = load("few_rows_linear", "cpp")
    counting = SimpleNamespace(fwd=lambda *args: calls.append(len(args[0])) or kernels.fwd(*args))
    monkeypatch.setattr(few_rows, "load", lambda op, name: counting)
    with torch.no_grad():
        expected = layer(x)
        with few_rows_linears(layer):
            torch.testing.assert_close(layer(x), expected)
    assert calls == [rows] * used


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("cpp", torch.bfloat16), ("reference", torch.bfloat16)]
)
def test_layers_that_stay(backend, dtype):
    """With torch as the selected backend, and in 16 bits, also if the backend of all ops is selected."""
    model = tiny.text_model().to(dtype)
    with use_backend(backend), few_rows_linears(model):
        assert not any("forward" in vars(module) for module in model.modules())
