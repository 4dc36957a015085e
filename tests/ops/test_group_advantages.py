"""group_advantages against TRL's formulas, first principles and, for every backend, the fp64 reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import assert_within_budget

from vlmkernels import backend as backends
from vlmkernels import group_advantages
from vlmkernels.ops.group_advantages import BASELINES, SCALES
from vlmkernels.ops.group_advantages.inputs import Inputs
from vlmkernels.ops.group_advantages.turns import turn_advantages

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
NAN = math.nan
RULES = [(scale, baseline, "sum_then_normalize") for scale in SCALES for baseline in BASELINES]
RULES += [("group", "mean", "normalize_then_sum")]


def options(rule):
    return dict(zip(("scale", "baseline", "aggregation"), rule, strict=True))


def make(num, functions, dtype=torch.float32, seed=0):
    """Rewards, a fifth of them not scored; no function scores the first completion."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num, functions, generator=rng, dtype=torch.float64)
    rewards[torch.rand(num, functions, generator=rng) < 0.2] = NAN
    rewards[:1] = NAN
    return rewards.to(dtype), torch.randn(functions, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_matches_fp64(need, device, nan_filled, backend, rule):
    cases = [
        (48, 3, {"num_generations": 8}),
        (7, 1, {"num_generations": 7}),
        (5, 2, {"num_generations": 1}),
        (77, 2, {"group_sizes": [1, 40, 2, 3, 31]}),
        (3000, 1, {"num_generations": 4}),
    ]
    for num, functions, groups in cases:
        rewards, weights = make(num, functions)
        need("group_advantages", backend, rewards.to(device))
        where = "cpu" if backends.device_type(backend) == "cpu" else device
        rules = groups | options(rule)
        exact = group_advantages(rewards.double(), weights=weights.double(), backend="reference", **rules)
        eager = group_advantages(rewards, weights=weights, backend="reference", **rules)
        actual = group_advantages(rewards.to(where), weights=weights.to(where), backend=backend, **rules)
        for name in ("advantages", "rewards", "mean", "std"):
            values = [getattr(x, name).cpu() for x in (actual, eager, exact)]
            assert values[0].isnan().equal(values[2].isnan()), name
            assert_within_budget(name, *(v.nan_to_num() for v in values))
        assert actual.degenerate.cpu().equal(exact.degenerate)


def trl_advantages(rewards, weights, size, rule):
    """The advantages of TRL 1.16, with its nanstd, for groups with at least two scored completions."""
    trl = pytest.importorskip("trl.trainer.utils")
    scale, _, aggregation = rule

    def grouped(x, reduce):
        return reduce(x.view(-1, size), dim=1).repeat_interleave(size)

    if aggregation == "sum_then_normalize":
        r = (rewards * weights).nansum(1)
        r[rewards.isnan().all(1)] = NAN
        std = {"group": grouped(r, trl.nanstd) + 1e-4, "batch": trl.nanstd(r) + 1e-4, "none": 1.0}[scale]
        return ((r - grouped(r, torch.nanmean)) / std).nan_to_num(nan=0.0)
    x = rewards.view(-1, size, rewards.shape[1])
    z = (x - x.nanmean(1, keepdim=True)) / (trl.nanstd(x, dim=1, keepdim=True) + 1e-4)
    r = (z.view(len(rewards), -1) * weights).nansum(1)
    r[rewards.isnan().all(1)] = NAN
    return ((r - r.nanmean()) / (trl.nanstd(r) + 1e-4)).nan_to_num(nan=0.0)


@pytest.mark.parametrize("rule", [r for r in RULES if r[1] == "mean"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trl_parity(rule, dtype):
    rewards, weights = make(32, 2, dtype)
    result = group_advantages(rewards, 8, weights=weights, backend="reference", **options(rule))
    expected = trl_advantages(rewards, weights, 8, rule)
    # TRL's nanstd computes N / (N - 1) in fp32.
    exact = dtype == torch.float64 and rule[0] == "none"
    torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-12 if exact else 4e-6)


ALL = ["reference", *KERNELS]


@pytest.mark.parametrize("backend", ALL)
def test_first_principles(need, device, backend):
    """Two groups: rewards 1, 2, 6 (mean 3, std sqrt 7), and a single completion."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0], device=device)
    need("group_advantages", backend, rewards)

    def run(**rules):
        return group_advantages(rewards, group_sizes=[3, 1], eps=0.0, backend=backend, **rules)

    assert run(scale="none").advantages.tolist() == [-2.0, -1.0, 3.0, 0.0]
    assert run(scale="none", baseline="none").advantages.tolist() == rewards.tolist()
    # RLOO: 1 - (2 + 6) / 2, ...
    assert run(scale="none", baseline="leave_one_out").advantages.tolist() == [-3.0, -1.5, 4.5, 0.0]
    # pass@k: the best leads by 6 - 2.
    assert run(scale="none", baseline="pass_at_k").advantages.tolist() == [0.0, 0.0, 4.0, 0.0]
    result = run(scale="none")
    assert result.mean.tolist() == [3.0, 3.0, 3.0, 5.0]
    torch.testing.assert_close(result.std, torch.tensor([7**0.5] * 3 + [0.0], device=device))
    assert result.degenerate.tolist() == [False, False, False, True]
    torch.testing.assert_close(run(scale="batch").advantages * rewards.std(), result.advantages)
    # Without a baseline, the group of one completion has a standard deviation of 0, so its advantage is 0; the batch has not.
    torch.testing.assert_close(run(baseline="none").advantages * 7**0.5, torch.tensor([1.0, 2.0, 6.0, 0.0], device=device))
    torch.testing.assert_close(run(scale="batch", baseline="none").advantages * rewards.std(), rewards)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rule", [r for r in RULES if r[:2] != ("none", "none")], ids=str)
def test_equal_rewards_give_exactly_nothing(need, device, backend, rule):
    """Equal rewards have an advantage of exactly 0, also if rounding hides that they are equal.

    The cases are eight rewards of 0.1, whose rounded mean is not 0.1; sums that are equal only after rounding; ties of the best
    completion; groups of one completion; and groups that no function scored.
    """
    rewards = torch.tensor([[0.1]] * 8 + [[NAN]] * 7 + [[3.0]], device=device)
    need("group_advantages", backend, rewards)
    if rule[:2] == ("batch", "none"):
        rewards = rewards.clamp(max=0.1)  # equal in the batch
    cases = [(rewards, None, 8), (rewards, None, 1)]
    if rule[2] == "sum_then_normalize":
        sums = torch.tensor([[3.0, 0.0], [0.0, 1.0]], device=device)
        cases.append((sums, torch.tensor([0.1, 0.3], device=device), 2))
    for eps in (1e-4, 0.0):
        for x, weights, size in cases:
            result = group_advantages(x, size, weights=weights, eps=eps, backend=backend, **options(rule))
            assert result.advantages.eq(0).all()
            assert result.degenerate.all()
            assert result.std.eq(0).all()
    tie = torch.tensor([2.0, 2.0, 1.0], device=device)
    assert group_advantages(tie, 3, baseline="pass_at_k", backend=backend).advantages.eq(0).all()


@pytest.mark.parametrize("backend", ALL)
def test_empty_views_and_dtypes(need, device, backend):
    need("group_advantages", backend, torch.zeros(1, 1, device=device))
    assert group_advantages(torch.zeros(0, 2, device=device), 4, backend=backend).advantages.shape == (0,)
    assert group_advantages(torch.zeros(0, device=device), group_sizes=[], backend=backend).advantages.shape == (0,)
    rewards = torch.randn(4, 6, device=device)
    view = group_advantages(rewards.t()[::2], 3, weights=rewards[:, 2], backend=backend)
    torch.testing.assert_close(
        view, group_advantages(rewards.t()[::2].clone(), 3, weights=rewards[:, 2].clone(), backend=backend)
    )
    half = group_advantages(rewards.bfloat16(), np.int64(2), backend=backend)
    assert half.advantages.dtype == torch.float32
    torch.testing.assert_close(half, group_advantages(rewards.bfloat16().float(), 2, backend=backend))
    leaf = rewards.clone().requires_grad_()
    assert not group_advantages(leaf, 2, backend=backend).advantages.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    """Shifting the rewards of a group, permuting its completions, and scaling all rewards have the expected effects."""
    size, groups = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4))
    values = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 4.0, NAN])
    rewards = torch.tensor(data.draw(st.lists(values, min_size=size * groups, max_size=size * groups)), dtype=torch.float64)
    rule = options(data.draw(st.sampled_from([r for r in RULES if r[1] != "none"])))

    def run(x):
        return group_advantages(x, size, backend="reference", **rule)

    base = run(rewards)
    assert base.advantages.isfinite().all()
    assert base.advantages[rewards.isnan()].eq(0).all()
    order = torch.cat([g * size + torch.randperm(size) for g in range(groups)])
    torch.testing.assert_close(run(rewards[order]).advantages, base.advantages[order])
    shift = torch.arange(groups, dtype=torch.float64).repeat_interleave(size)
    if rule["scale"] != "batch":
        torch.testing.assert_close(run(rewards + shift).advantages, base.advantages)
    if rule["scale"] == "none":
        torch.testing.assert_close(run(3 * rewards).advantages, 3 * base.advantages)
    if rule["baseline"] == "mean" and rule["aggregation"] == "sum_then_normalize":
        torch.testing.assert_close(base.advantages.view(groups, size).sum(1), torch.zeros(groups, dtype=torch.float64))
    sizes = group_advantages(rewards, group_sizes=torch.tensor([size] * groups), backend="reference", **rule)
    assert all(a.equal(b) or a.isnan().any() for a, b in zip(sizes, base, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_opcheck_and_compile(need, device, backend):
    rewards = torch.randn(6, 2, device=device)
    need("group_advantages", backend, rewards)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    rules = {"scale": "group", "baseline": "mean", "normalize_first": False, "eps": 1e-4, "backend": backend}
    for args in (
        Inputs(rewards, None, None, 3, **rules),
        Inputs(rewards, rewards[0], offsets, 4, **rules),
    ):
        torch.library.opcheck(torch.ops.vlmkernels.group_advantages.default, tuple(args))

    def function(x):
        return group_advantages(x * 2, 3, backend=backend).advantages.sum()

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(rewards), function(rewards))


R = torch.zeros(6, 2)
ERRORS = {
    "dtype": ((R.cfloat(), 2), {}, TypeError, "rewards must be real, got complex64"),
    "rewards": ((["high", "low"], 2), {}, TypeError, "rewards must be a tensor, an array or a list of numbers, got .*high"),
    "shape": ((R[None], 2), {}, ValueError, r"rewards must be \(N,\) or \(N, R\), got \(1, 6, 2\)"),
    "scale": ((R, 2), {"scale": "row"}, ValueError, "scale must be one of group, batch, none, got 'row'"),
    "baseline": (
        (R, 2),
        {"baseline": "b"},
        ValueError,
        "baseline must be one of mean, leave_one_out, pass_at_k, none, got 'b'",
    ),
    "aggregation": ((R, 2), {"aggregation": "a"}, ValueError, "aggregation must be one of .* got 'a'"),
    "gdpo scale": (
        (R, 2),
        {"aggregation": "normalize_then_sum", "scale": "batch"},
        ValueError,
        "scale must be 'group' with aggregation = 'normalize_then_sum', got 'batch'",
    ),
    "scale type": ((R, 2), {"scale": ["group"]}, ValueError, r"scale must be one of group, batch, none, got \['group'\]"),
    "eps": ((R, 2), {"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    "eps type": ((R, 2), {"eps": "0"}, TypeError, "eps must be a number, got '0'"),
    "weights type": ((R, 2), {"weights": {"iou": 1.0}}, TypeError, "weights must be a tensor, .* got dict"),
    "weights nan": ((R, 2), {"weights": R[0] / 0}, ValueError, r"weights must be finite, got nan at index \(0,\)"),
    "infinite": (
        ([[0.0, 1.0], [math.nan, -math.inf]], 2),
        {},
        ValueError,
        r"rewards must be finite, .* got -inf at index \(1, 1\)",
    ),
    "weights": ((R, 2), {"weights": R[:, 0]}, ValueError, r"weights must have the shape of one reward, \(2,\), got \(6,\)"),
    "no groups": ((R,), {}, ValueError, "num_generations or group_sizes must be given, one of the two, got neither"),
    "both": ((R, 2), {"group_sizes": [6]}, ValueError, "one of the two, got both"),
    "zero": ((R, 0), {}, ValueError, "num_generations must be >= 1, got 0"),
    "fraction": ((R, 2.0), {}, TypeError, "num_generations must be an integer, got 2.0"),
    "fractions": ((R,), {"group_sizes": R[:, 0] + 1}, TypeError, "group_sizes must be integers, got 1.0"),
    "no sizes": ((R,), {"group_sizes": 6}, TypeError, "group_sizes must be a sequence of integers, got 6"),
    "indivisible": ((R, 4), {}, ValueError, "num_generations must divide the 6 completions of rewards, got 4"),
    "sum": (
        (R,),
        {"group_sizes": [2, 3]},
        ValueError,
        r"group_sizes must add up to the 6 completions of rewards, got \[2, 3\] = 5",
    ),
    "empty group": ((R,), {"group_sizes": [6, 0]}, ValueError, r"group_sizes must be >= 1 each, got \[6, 0\]"),
    "fp64": ((R.double(), 2), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, got float64"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        group_advantages(*args, **options)


def test_turn_advantages_compare_returns_of_the_same_turn():
    """Against the definition, for two groups of three trajectories with one to three turns, and turns without a score."""
    nan = math.nan
    rewards = torch.tensor(
        [[1, 0, 2], [0, 3, nan], [5, nan, nan], [1, nan, 1], [nan, nan, nan], [2, nan, 4]], dtype=torch.float64
    )
    actual = turn_advantages(rewards, 3)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for group in (0, 3):
        for turn in range(3):
            rows = [row for row in range(group, group + 3) if not rewards[row, turn:].isnan().all()]
            returns = torch.stack([rewards[row, turn:].nansum() for row in rows])
            if len(rows) > 1:
                expected[rows, turn] = (returns - returns.mean()) / (returns.std() + 1e-4)
    torch.testing.assert_close(actual, expected)
    assert turn_advantages(rewards[:, :0], 3).shape == (6, 0)
    with pytest.raises(ValueError, match=r"rewards must be \(N, T\), got \(6,\)"):
        turn_advantages(rewards[:, 0], 3)
