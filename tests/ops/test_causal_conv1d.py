"""Causal convolutions of trees, against torch's convolution of a copy of each path."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import assert_within_budget
from support.layouts import layouts
from torch.nn.functional import conv1d, silu
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_5 import modeling_qwen3_5

from vlmkernels.ops import causal_conv1d as module
from vlmkernels.ops.causal_conv1d import causal_conv1d
from vlmkernels.ops.tree_attention import TreeLayout

pytestmark = pytest.mark.device

NAMES = ("x", "weight", "bias", "initial_state")
LAYOUTS = {
    "one sequence": TreeLayout((40,), (-1,)),
    "a group": TreeLayout.groups((9,), ((5, 1, 0, 2, 7),)),
    "a deep tree": TreeLayout((3, 1, 0, 2, 5, 0, 7, 1, 1, 4, 0, 2), (-1, 0, 1, 2, 0, -1, 5, 6, 7, 8, -1, 10)),
    "one token each": TreeLayout((1,) * 5, (-1,) * 5),
    "shorter than the kernel": TreeLayout((2, 1), (-1, -1)),
    "no tokens": TreeLayout((0, 0, 0), (-1, 0, -1)),
    "nothing": TreeLayout((), ()),
}


def make(layout, width=4, channels=6, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    shapes = (layout.num_tokens, channels), (channels, width), (channels,), (layout.parents.count(-1), channels, width - 1)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def on_paths(x, weight, bias, initial, layout, activation=None):
    """Convolve a copy of the path of each segment, after its initial state; keep its own tokens and the last inputs."""
    channels, width = weight.shape
    if initial is None:
        initial = x.new_zeros(layout.parents.count(-1), channels, width - 1)
    outputs, states = [x], []
    for segment, length in enumerate(layout.lengths):
        path = layout.path(segment)
        inputs = [x[layout.starts[s] : layout.starts[s] + layout.lengths[s]].T for s in path]
        inputs = torch.cat([initial[layout.parents[: path[0]].count(-1)], *inputs], 1)
        states.append(inputs[:, inputs.shape[1] - width + 1 :])
        if length:
            out = conv1d(inputs[None, :, -(length + width - 1) :], weight.unsqueeze(1), bias, groups=channels)[0].T
            outputs.append(out if activation is None else silu(out))
    return torch.cat(outputs)[len(x) :], torch.stack(states) if states else initial


def ours(x, weight, bias, initial, layout, activation=None):
    return causal_conv1d(x, weight, layout, bias=bias, activation=activation, initial_state=initial, return_state=True)


def run(function, inputs, layout, **settings):
    """The output, the states, and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = dict(zip(("out", "state"), function(*leaves, layout, **settings), strict=True))
    rng = torch.Generator().manual_seed(1)
    upstream = {name: torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for name, x in results.items()}
    given = {f"d{name}": x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    used = [name for name, x in results.items() if x.requires_grad]
    outputs, upstream = ([x[name] for name in used] for x in (results, upstream))
    gradients = torch.autograd.grad(outputs, list(given.values()), upstream, materialize_grads=True)
    return {name: x.detach() for name, x in results.items()} | dict(zip(given, gradients, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(),
    width=st.integers(1, 6),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    activation=st.sampled_from([None, "silu", "swish"]),
)
def test_matches_paths(layout, width, with_bias, with_state, activation):
    x, weight, bias, initial = make(layout, width)
    inputs = x, weight, bias if with_bias else None, initial if with_state else None
    exact = run(on_paths, inputs, layout, activation=activation)
    actual = run(ours, inputs, layout, activation=activation)
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_budget(device, name, width, dtype):
    layout = LAYOUTS[name]
    inputs = [x.to(device) for x in make(layout, width, dtype=dtype)]
    exact = run(on_paths, [x.double() for x in inputs], layout, activation="silu")
    eager = run(on_paths, inputs, layout, activation="silu")
    actual = run(ours, inputs, layout, activation="silu")
    for what in exact:
        # A gradient of zeros, such as that of a bias that rounds to nothing, has no scale of its own.
        assert_within_budget(what, actual[what], eager[what], exact[what])


def test_a_decoding_step_needs_no_plan():
    """A CUDA graph of a step would read memory of the plan after it has been freed."""
    layout = LAYOUTS["one token each"]
    x, weight, bias, initial = make(layout)
    module._plan.cache_clear()
    out, state = causal_conv1d(x, weight, layout, bias=bias, initial_state=initial, return_state=True)
    assert module._plan.cache_info().misses == 0
    expected, last = on_paths(x, weight, bias, initial, layout)
    torch.testing.assert_close(out, expected)
    assert torch.equal(state, last)


def test_matches_transformers():
    """The function of the layers on each path; both states are inputs before a token."""
    layout = LAYOUTS["a deep tree"]
    x, weight, bias, _ = make(layout, dtype=torch.float32)
    out = causal_conv1d(x, weight, layout, bias=bias, activation="silu")
    function = inspect.unwrap(modeling_qwen3_5.causal_conv1d_fn)
    for segment, length in enumerate(layout.lengths):
        start = layout.starts[segment]
        path = torch.cat([x[layout.starts[s] : layout.starts[s] + layout.lengths[s]] for s in layout.path(segment)])
        if length:
            theirs = function(path.T[None], weight, bias, "silu")[0].T[len(path) - length :]
            torch.testing.assert_close(out[start : start + length], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 4])
def test_gradcheck(width):
    layout = LAYOUTS["a deep tree"]
    inputs = [x.requires_grad_() for x in make(layout, width, channels=2)]
    torch.autograd.gradcheck(lambda *x: ours(*x, layout), inputs)


def test_decoding(device):
    """Tokens one after another, each from the last inputs before it."""
    layout = TreeLayout.groups((9, 2), ((3, 3), (3,)))
    x, weight, bias, _ = (x.to(device) for x in make(layout))
    whole, states = ours(x, weight, bias, None, layout)
    tokens = [*range(9), *range(15, 17)]
    out, state = ours(x[tokens], weight, bias, None, TreeLayout((9, 2), (-1, -1)))
    torch.testing.assert_close(out, whole[tokens])
    state = state[[0, 0, 1]]
    for step in range(3):
        tokens = [9 + step, 12 + step, 17 + step]
        out, state = ours(x[tokens], weight, bias, state, TreeLayout((1, 1, 1), (-1, -1, -1)))
        torch.testing.assert_close(out, whole[tokens])
    torch.testing.assert_close(state, states[[1, 2, 4]])


def test_strides_and_inputs_unchanged(device):
    """Views, as in the models, and an initial state in another dtype."""
    layout = LAYOUTS["a group"]
    x, weight, bias, initial = (x.to(device, torch.float32) for x in make(layout))
    expected = ours(x, weight, bias, initial, layout)
    views = x.T.contiguous().T, torch.stack([weight, weight], 1)[:, 1], bias.repeat_interleave(2)[::2]
    copies = [view.clone() for view in views]
    actual = ours(*views, initial.double(), layout)
    for a, b in zip((*actual, *views), (*expected, *copies), strict=True):
        torch.testing.assert_close(a, b)
    assert actual[1].dtype == torch.float32


def test_no_gradient_of_what_needs_none():
    layout = LAYOUTS["a group"]
    x, weight, bias, initial = make(layout)
    out = causal_conv1d(x.requires_grad_(), weight, layout, bias=bias, initial_state=initial)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == x.shape
    with torch.no_grad():
        assert not causal_conv1d(x, weight, layout).requires_grad


def test_checkpointing(device):
    layout = LAYOUTS["a group"]
    inputs = [x.to(device) for x in make(layout)]
    expected = run(ours, inputs, layout)
    for name, x in run(lambda *y: checkpoint(ours, *y, use_reentrant=False), inputs, layout).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)


def test_inference_mode_before_training():
    """What is cached for a layout serves both."""
    layout = LAYOUTS["a group"]
    inputs = make(layout)
    module._plan.cache_clear()
    with torch.inference_mode():
        inferred, _ = ours(*inputs, layout)
    assert torch.equal(run(ours, inputs, layout)["out"], inferred)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_does_not_wait_for_the_device(name):
    inputs = [x.cuda().requires_grad_() for x in make(LAYOUTS[name], dtype=torch.float32)]
    run(ours, inputs, LAYOUTS[name])  # loads libraries
    module._plan.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, state = ours(*inputs, LAYOUTS[name])
        gradients = torch.autograd.grad((out, state), inputs, (torch.ones_like(out), torch.ones_like(state)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(9, 6)}, ValueError, r"x must be \(N, D\) of the 10 tokens of layout, got \(9, 6\)"),
        ({"x": torch.zeros(1, 10, 6)}, ValueError, r"x must be \(N, D\) of the 10 tokens of layout, got \(1, 10, 6\)"),
        ({"x": torch.zeros(10, 6).long()}, TypeError, "x must be floating point, got int64"),
        ({"weight": torch.zeros(6, 1, 4)}, ValueError, r"weight must be \(D, K\) with D = 6 and K >= 1, got \(6, 1, 4\)"),
        ({"weight": torch.zeros(6, 0)}, ValueError, r"weight must be \(D, K\) with D = 6 and K >= 1, got \(6, 0\)"),
        ({"weight": torch.zeros(6, 4).half()}, TypeError, "weight must have dtype float32, got float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have the shape of the channels of x, \(6,\), got \(4,\)"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        (
            {"initial_state": torch.zeros(2, 6, 4)},
            ValueError,
            r"initial_state must have the shape of \(roots of layout, D, K - 1\), \(2, 6, 3\), got \(2, 6, 4\)",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be None or one of silu, swish, got 'gelu'"),
    ],
)
def test_bad_arguments(changes, error, message):
    layout = TreeLayout((4, 2, 3, 1), (-1, 0, 0, -1))
    arguments = dict(zip(NAMES, make(layout, dtype=torch.float32), strict=True)) | changes
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments, layout=layout)
