"""Ops call their implementation directly unless something needs torch's dispatcher; then they call the registered operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels import group_advantages, grpo_loss, rotary
from vlmkernels.ops.dispatch import needs_dispatcher


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def arguments(op):
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng)

    if op is rotary:
        return randn(2, 3, 4, 8), randn(2, 3, 1, 8), randn(2, 3, 4), randn(2, 3, 4)
    return (randn(6, 2), 3) if op is group_advantages else (randn(2, 5), randn(2))


def first(op, *args):
    return op(*args)[0]


OPS = {rotary: "vlmkernels::rotary", grpo_loss: "vlmkernels::grpo_loss_fwd", group_advantages: "vlmkernels::group_advantages"}
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@ops
def test_modes_and_the_profiler_see_the_operator(op):
    args = arguments(op)
    expected = first(op, *args)
    with Recorder() as recorder:
        torch.testing.assert_close(first(op, *args), expected)
    assert OPS[op] in recorder.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(*args)
    assert OPS[op] in {event.name for event in profile.events()}


@ops
def test_tensors_without_values(op):
    args = arguments(op)
    shape = first(op, *args).shape
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    assert first(op, *meta).is_meta
    assert first(op, *meta).shape == shape
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
    assert first(op, *fake).shape == shape


@ops
def test_graphs_hold_the_operator(op):
    args = arguments(op)
    rest = args[1:]
    graph = make_fx(lambda x: first(op, x, *rest))(args[0])
    assert any(OPS[op].replace("::", ".") in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(args[0]), first(op, *args))


def test_what_needs_the_dispatcher():
    x = torch.zeros(3)
    assert not needs_dispatcher(x, None, torch.nn.Parameter(x))
    with torch.inference_mode(), torch.autocast("cpu"):
        assert not needs_dispatcher(x, torch.zeros(2))
    negated = torch.zeros(3, dtype=torch.complex64).conj().imag
    for other in (x.as_subclass(Subclass), negated, torch._efficientzerotensor(3), x.to("meta")):
        assert needs_dispatcher(other)
    inside = []
    torch.vmap(lambda row: inside.append(needs_dispatcher(row)) or row)(x)
    torch.jit.trace(lambda row: inside.append(needs_dispatcher(row)) or 2 * row, x, check_trace=False)
    assert inside == [True, True]


@pytest.mark.parametrize("heads_first", [False, True])
def test_rotary_results_may_be_changed_in_place(heads_first):
    """The results are not views, although heads_first gives them the strides of a transposed tensor."""
    query, key, cos, sin = arguments(rotary)
    if heads_first:
        query, key = (x.transpose(1, 2) for x in (query, key))
    query.requires_grad_()
    result = rotary(query, key, cos, sin, heads_first=heads_first)[0]
    (2 * result).sum().backward()
    expected, query.grad = query.grad, None
    rotary(query, key, cos, sin, heads_first=heads_first)[0].mul_(2).sum().backward()
    torch.testing.assert_close(query.grad, expected)
