"""Attention of groups that share a prefix, against a mask over all tokens."""

import pytest
import torch
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels.ops.group_attention import IMPLEMENTATIONS, GroupLayout, group_attention

pytestmark = pytest.mark.device

LAYOUTS = {
    "one group": GroupLayout((5,), ((3, 3, 3, 3),)),
    "unequal": GroupLayout((7, 2, 4), ((3, 1, 6), (2, 2), (5,))),
    "empty completions": GroupLayout((3, 4), ((0, 2, 0), (0, 0))),
    "no completions": GroupLayout((6,), ((),)),
    "long": GroupLayout((130,), ((40, 70),)),
    "nothing": GroupLayout((), ()),
}


def run(inputs, layout, weight, attention, forward_only):
    inputs = [x.detach().clone().requires_grad_(not forward_only) for x in inputs]
    out = attention(*inputs, layout)
    if forward_only:
        return {"out": out}
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
    return dict(zip(("out", "dquery", "dkey", "dvalue"), (out.detach(), *gradients), strict=True))


def formula(query, key, value, layout, scale=0.3):
    """Scores of all pairs."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) * scale
    scores = scores.masked_fill(~layout.mask().to(query.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def eager_formula(query, key, value, layout):
    """The formula of the docstring."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask = layout.mask().to(query.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.modules)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [4, 2])
def test_matches_fp64(device, implementation, dtype, name, heads):
    layout = LAYOUTS[name]
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(layout.num_tokens, h, 16, generator=rng).to(device, dtype) for h in (4, heads, heads)]
    weight = torch.randn(layout.num_tokens, 4, 16, generator=rng).to(device)
    try:
        IMPLEMENTATIONS.choose(implementation, inputs[0])
    except NotImplementedError as error:
        pytest.skip(str(error))
    forward_only = implementation == "flex" and device == "cpu"
    exact = run([x.double() for x in inputs], layout, weight.double(), formula, forward_only)
    eager = run(inputs, layout, weight, eager_formula, forward_only)
    ours = lambda q, k, v, layout: group_attention(q, k, v, layout, scale=0.3, implementation=implementation)  # noqa: E731
    actual = run(inputs, layout, weight, ours, forward_only)
    for what in exact:
        assert_within_budget(what, actual[what], eager[what], exact[what])


def test_gradcheck():
    layout = GroupLayout((3, 2), ((2, 1), (0, 3)))
    inputs = [torch.randn(layout.num_tokens, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: group_attention(*x, layout), inputs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=4)), max_size=4), st.integers(0, 99))
def test_each_completion_is_as_if_alone(groups, seed):
    """A completion's results are those of a causal sequence: its prefix, then itself."""
    layout = GroupLayout(tuple(p for p, _ in groups), tuple(tuple(c) for _, c in groups))
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(layout.num_tokens, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    out = group_attention(q, k, v, layout)
    for (begin, first, _), completions in zip(layout.groups, layout.completions, strict=True):
        start = first
        for length in completions:
            path = torch.cat([torch.arange(begin, first), torch.arange(start, start + length)])
            alone = formula(q[path], k[path], v[path], GroupLayout((len(path),), ((),)), 8**-0.5)
            torch.testing.assert_close(out[path], alone)
            start += length


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(4, 2, 8)}, ValueError, "query must hold the 5 tokens of layout, got 4"),
        ({"query": torch.zeros(5, 16)}, ValueError, r"query must be \(N, Hq, D\), got \(5, 16\)"),
        ({"key": torch.zeros(5, 3, 8)}, ValueError, "key must be .* Hkv a divisor of 2"),
        ({"value": torch.zeros(5, 2, 8).bfloat16()}, TypeError, "value must have dtype float32, got bfloat16"),
        ({"implementation": "flex"}, NotImplementedError, "flex: FlexAttention has no backward pass on the CPU"),
        ({"implementation": "math"}, ValueError, "implementation must be auto or one of parts, flex, got 'math'"),
    ],
)
def test_bad_input(changes, error, message):
    inputs = {name: torch.zeros(5, 2, 8, requires_grad=True) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        group_attention(**{**inputs, "layout": GroupLayout((3,), ((1, 1),))} | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 2), ((1,),)), "completions must be of 2 groups, got"),
        (((0,), ((1,),)), "prefixes must hold at least one token each, got"),
        (((3,), ((-1,),)), "completions must have lengths >= 0, got"),
    ],
)
def test_bad_layout(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupLayout(*arguments)
