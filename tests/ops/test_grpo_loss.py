"""grpo_loss against first principles and, for every backend, the fp64 reference; against TRL: test_grpo_loss_trl.py."""

import itertools
import math
import pickle
import re
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import assert_within_budget
from support.grpo_cases import VARIANTS, make, on, packed, run

from vlmkernels import GRPOLossConfig, grpo_loss
from vlmkernels import backend as backends
from vlmkernels.ops.grpo_loss.config import KL_ESTIMATORS, LOSSES, parse
from vlmkernels.ops.grpo_loss.inputs import LossInputs, entropy_quantile
from vlmkernels.ops.grpo_loss.native import variant as native_variant

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]


def check(batch, config, backend, **options):
    """Compare a backend with the fp64 reference. Gradients have the budget of budget.py, scalars the budget of their sums."""
    device = "cpu" if backends.device_type(backend) == "cpu" else batch["logps"].device
    double = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    exact, eager = run(double, config, "reference", **options), run(batch, config, "reference", **options)
    actual = run(on(device, batch), config, backend, **options)
    assert actual.keys() == exact.keys()
    size = exact["dlogps"].abs().sum().item()
    for name, value in exact.items():
        if value.dim():
            # The relative error of e^x is the absolute error of x, which grows with x: a vespo gradient has e^-57.
            largest = value.abs().max().item() if value.numel() else 0.0
            scale = largest * max(1.0, abs(math.log(largest))) if largest else None
            assert_within_budget(name, actual[name].cpu(), eager[name].cpu(), value.cpu(), scale=scale)
            continue
        error, allowed = abs(actual[name].item() - value.item()), abs(eager[name].item() - value.item())
        bound = 2 * allowed + 4 * torch.finfo(torch.float32).eps * max(1.0, size, abs(value.item()))
        assert error <= bound, f"{name}: {actual[name].item()} for {value.item()}"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_fp64(need, device, nan_filled, backend, variant):
    config = GRPOLossConfig(**VARIANTS[variant])
    for shape, per_token in (((5, 9), False), ((3, 70), True), ((2, 600), False)):  # odd; more than a block
        batch = on(device, make(*shape, dtype=torch.float32, per_token=per_token))
        need("grpo_loss", backend, batch["logps"])
        check(batch, config, backend, num_items=17.0)
        if not per_token:
            check(packed(batch), config, backend, accumulation_steps=3)


@pytest.mark.parametrize("backend", KERNELS)
def test_views_are_read_in_place(need, device, nan_filled, backend):
    """Rows of a wider tensor, transposed tensors, expanded rows; on policy and without a mask."""
    wide = on(device, make(4, 50, dtype=torch.float32))
    need("grpo_loss", backend, wide["logps"])
    config = GRPOLossConfig(loss_type="grpo", beta=0.1)
    cut = {name: x[:, 3:40] if x.dim() == 2 else x[::2].repeat(2) for name, x in wide.items()}
    check(cut, config, backend)
    transposed = {name: x.t().contiguous().t() if x.dim() == 2 else x[:1].expand(4) for name, x in wide.items()}
    check(transposed, config, backend)
    check({**wide, "advantages": wide["entropy"][:1].expand(4, -1)}, config, backend)
    check({name: wide[name] for name in ("logps", "advantages", "ref_logps")}, config, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_is_tested(backend, device):
    """A backend that this machine can run is not skipped above."""
    reason = backends.why_not("grpo_loss", backend, torch.zeros(1, 1, device=device))
    assert reason is None or (device == "cuda" and backend == "cpp" and "supports cpu tensors" in reason)


def test_the_tables_have_the_same_rows():
    from vlmkernels.ops.grpo_loss import inputs, reference

    rows = {row.surrogate for row in LOSSES.values()}
    assert set(reference.SURROGATES) == rows
    assert set(reference.KL) == {"none", *KL_ESTIMATORS}
    compiled = backends.native()
    if not isinstance(compiled, ImportError):
        assert compiled.surrogates == tuple(reference.SURROGATES)
        assert compiled.kl_estimators == tuple(reference.KL)
        assert compiled.grpo_columns == inputs.COLUMNS
        assert compiled.grpo_stats == inputs.STATS
    triton = pytest.importorskip("vlmkernels.ops.grpo_loss.triton")
    assert {name: row[1] for name, row in triton.SURROGATES.items()} == {
        name: row.through_ratio for name, row in reference.SURROGATES.items()
    }
    assert set(triton.KL) == set(reference.KL)
    for prefix, names in (("COLUMN", inputs.COLUMNS), ("STAT", inputs.STATS)):
        assert [getattr(triton, f"{prefix}_{name.upper()}").value for name in names] == list(range(len(names)))


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "sapo", "vespo"])
def test_dlogp_is_the_derivative_of_loss(name):
    from vlmkernels.ops.grpo_loss import reference

    row, p = reference.SURROGATES[name], GRPOLossConfig(delta=1.1, epsilon_high=0.3).scalars
    rng = torch.Generator().manual_seed(0)
    logp = torch.randn(500, generator=rng, dtype=torch.float64).requires_grad_()
    old, adv = logp.detach() + 0.4 * torch.randn(500, generator=rng), torch.randn(500, generator=rng)
    ratio = (logp - old).exp()
    log_weight = (logp - old).detach()
    term = row.term(logp, ratio if row.through_ratio else ratio.detach(), log_weight, adv, p)
    torch.testing.assert_close(torch.autograd.grad(term.loss.sum(), logp)[0], term.dlogp.detach())


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(name):
    """Derivatives; the mean of k1 and of k3 over the policy is the divergence, and the gradient of k2 is its gradient."""
    from vlmkernels.ops.grpo_loss import reference

    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    kl, dkl = reference.KL[name](ref - policy)
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), policy)[0], dkl.detach())
    exact = (policy.exp() * (policy - ref)).sum().item()
    if name in ("k1", "k3"):
        assert (policy.exp() * kl).sum().item() == pytest.approx(exact)


def test_perception_by_hand():
    """PAPO, Eq. 2, as a loss: -gamma KL(policy || masked policy) + eta1 H(policy) + eta2 H(masked policy), per token."""
    gamma, eta1, eta2 = 0.5, 0.03, 0.02
    config = GRPOLossConfig(perception_loss_weight=gamma, der_loss_weight1=eta1, der_loss_weight2=eta2)
    # The masked policy is less sure; surer; so much surer that the KL has reached its bound. The last has no masked images.
    logps = torch.tensor([[-1.0, -2.0, -5.0, -3.0]], dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[-2.0, -1.0, -1.0, math.nan]], dtype=torch.float64, requires_grad=True)
    loss, metrics = grpo_loss(logps, torch.zeros(1), masked_logps=masked, config=config, backend="reference")
    kl = [math.exp(-1), math.e - 2, 10]  # e^x - x - 1 for x = masked - logp = -1, 1 and 4
    assert loss.item() == pytest.approx((-gamma * sum(kl) + eta1 * 8 + eta2 * 4) / 4, rel=1e-14)
    dlogps, dmasked = torch.autograd.grad(loss, (logps, masked))
    slopes = [math.exp(-1) - 1, math.e - 1, 0.0]
    assert dlogps[0].tolist() == pytest.approx([(gamma * x - eta1) / 4 for x in slopes] + [0.0], rel=1e-14)
    assert dmasked[0].tolist() == pytest.approx([(-gamma * x - eta2) / 4 for x in slopes] + [0.0], rel=1e-14)
    expected = {"kl": sum(kl) / 3, "masked_entropy": 4 / 3, "clip_ratio": 1 / 3, "tokens": 3}
    assert {name: metrics[f"perception/{name}"].item() for name in expected} == pytest.approx(expected, rel=1e-14)


def test_perception_is_an_estimate_of_the_divergence():
    """Its mean over the tokens of the policy is KL(policy || masked policy)."""
    policy, masked = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    config = GRPOLossConfig(perception_loss_weight=1.0)
    kl = [grpo_loss(p.view(1, 1).log(), [0.0], masked_logps=m.view(1, 1).log(), config=config).metrics["perception/kl"]
          for p, m in zip(policy, masked, strict=True)]  # fmt: skip
    assert (policy * torch.stack(kl)).sum().item() == pytest.approx((policy * (policy / masked).log()).sum().item())


@pytest.mark.parametrize("backend", KERNELS)
def test_perception_covers_all_tokens_of_the_mask(need, device, nan_filled, backend):
    """As the KL term: also tokens that a ratio of the sequence, the entropy or a correction removes from the policy term."""
    batch = on(device, make(dtype=torch.float32))
    need("grpo_loss", backend, batch["logps"])
    config = GRPOLossConfig("grpo", "sequence", top_entropy_quantile=0.3, rollout_correction="token_mask", rollout_clip_max=0.1)
    config = config.replace(perception_loss_weight=0.3)
    check(batch, config, backend)
    exact = run(batch, config, "reference")
    assert exact["effective_tokens"] == 0
    torch.testing.assert_close(exact["dlogps"], -exact["dmasked"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("loss_type", "dapo") not in ("cispo", "vespo")])
def test_gradient_is_that_of_the_loss(variant):
    """The gradient equals finite differences of the loss.

    This includes the bias-corrected KL at the sequence level, where Liger's gradient differs from its loss's by 15 %.
    """
    config = GRPOLossConfig(**VARIANTS[variant])
    batch = make(3, 5)
    fixed = {name: batch[name] for name in ("old_logps", "ref_logps", "advantages", "loss_mask")}
    if config.rollout_correction or config.off_policy_mask_threshold:
        fixed["rollout_logps"] = batch["rollout_logps"]
    options = {"entropy_threshold": torch.tensor(1.2, dtype=torch.float64)} if config.top_entropy_quantile < 1 else {}
    leaves = ("logps", "entropy", "masked_logps") if config.perception else ("logps", "entropy")

    def loss(*values):
        return grpo_loss(**dict(zip(leaves, values, strict=True)), **fixed, **options, config=config, backend="reference").loss

    assert torch.autograd.gradcheck(loss, [batch[name].requires_grad_() for name in leaves])


def test_numbers_chosen_by_the_advantage_are_fp64():
    """sapo and vespo choose among numbers that fp32 does not represent; by hand in Python, for one token."""
    logps, old = torch.tensor([[-1.5]], dtype=torch.float64), torch.tensor([[-1.375]], dtype=torch.float64)
    ratio, advantages = math.exp(-0.125), torch.tensor([-0.75], dtype=torch.float64)
    sapo = 0.75 * 4 / 1.05 / (1 + math.exp(-1.05 * (ratio - 1)))
    vespo = -0.75 * 1.5 * math.exp(2.1 + 3.3 * -0.125 - 2.1 * ratio)
    configs = GRPOLossConfig("sapo"), GRPOLossConfig("vespo", vespo_k_neg=3.3, vespo_lambda_neg=2.1)
    for config, expected in zip(configs, (sapo, vespo), strict=True):
        loss = grpo_loss(logps, advantages, old_logps=old, config=config, backend="reference").loss
        assert loss.item() == pytest.approx(expected, rel=1e-14, abs=0)


def test_luspo_from_first_principles():
    """The loss is 1 / B sum_i |y_i| (-min(s_i A_i, clip(s_i) A_i)), with s_i the geometric mean of the unmasked tokens' ratios.

    Liger also sums over the padding.
    """
    batch = make(4, 6)
    config = GRPOLossConfig.preset("luspo")
    expected = 0.0
    for logp, old, adv, mask in zip(*(batch[n] for n in ("logps", "old_logps", "advantages", "loss_mask")), strict=True):
        if mask.any():
            s = (logp - old)[mask].mean().exp()
            expected -= mask.sum() * torch.minimum(s * adv, s.clamp(0.8, 1.2) * adv) / 4
    actual = grpo_loss(**{n: batch[n] for n in ("logps", "old_logps", "advantages", "loss_mask")}, config=config).loss
    torch.testing.assert_close(actual, expected)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_properties(data):
    """Properties of the loss.

    Packing, the order of sequences, masked rows and a constant added to all log-probabilities do not change the result, and the
    losses of parts add up.
    """
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    config = GRPOLossConfig(**VARIANTS[variant])
    B, T = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    batch = make(B, T, per_token=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99))) if B > 1 else make(2, T)
    B = len(batch["logps"])

    def total(x):
        return run(x, config, "reference", num_items=11.0)

    base, mask = total(batch), batch["loss_mask"]

    def same(a, b, names):
        return [torch.testing.assert_close(a[n], b[n], msg=f"{variant} {n}") for n in names]

    scalars = [name for name in base if base[name].dim() == 0]

    if batch["advantages"].dim() == 1 or mask.sum() != B:  # else they count as one per sequence
        pack = total(packed(batch))
        same(pack, base, scalars)
        torch.testing.assert_close(pack["dlogps"], base["dlogps"][mask])

    order = torch.randperm(B)
    shuffled = total({name: x[order] for name, x in batch.items()})
    same(shuffled, base, scalars)
    torch.testing.assert_close(shuffled["dlogps"], base["dlogps"][order])

    # The value, not the gradient, of these has the log-probability in it.
    if config.loss.surrogate not in ("cispo", "vespo") and not config.der_loss_weight1:
        logs = ("logps", "old_logps", "ref_logps", "rollout_logps")
        same(total(batch | {name: batch[name] - 2.5 for name in logs}), base, ["loss", "dlogps"])

    if config.aggregation.num_items and not config.entropy_coef and config.top_entropy_quantile == 1:
        parts = [total({name: x[s] for name, x in batch.items()}) for s in (slice(0, 1), slice(1, None))]
        torch.testing.assert_close(sum(part["loss"] for part in parts), base["loss"])
        torch.testing.assert_close(torch.cat([part["dlogps"] for part in parts]), base["dlogps"])
        padded = {name: torch.cat([x, x[:1]]) for name, x in batch.items()}
        padded["loss_mask"][-1] = False
        torch.testing.assert_close(total(padded)["loss"], base["loss"])


def test_accumulation_steps_divide_what_is_a_mean():
    batch = make(4, 6)
    for loss_type in LOSSES:
        config = GRPOLossConfig(loss_type=loss_type, entropy_coef=0.3, max_completion_length=9)
        one, four = (run(batch, config, accumulation_steps=n) for n in (1, np.int64(4)))
        for name in ("loss", "dlogps", "dentropy"):
            torch.testing.assert_close(4 * four[name], one[name])
        given = run(batch, config, accumulation_steps=4, num_items=17)
        if config.aggregation.num_items:
            for num_items in (np.float32(17), torch.tensor(17)):
                torch.testing.assert_close(given["dlogps"], run(batch, config, num_items=num_items)["dlogps"])


def test_entropy_quantile_of_more_tokens_than_the_dtype_counts():
    """In bfloat16 the rank 259 rounds to 260, past the last value. In float32 this happens with 2^24 + 4 values."""
    entropy = torch.arange(260).bfloat16()
    assert entropy_quantile(entropy, None, 1.0) == entropy[-1]
    assert entropy_quantile(torch.cat([entropy, -entropy]), torch.arange(520) < 260, 1.0) == entropy[-1]


ALL = ["reference", *KERNELS]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_always_finite(need, device, backend, variant):
    """Log-ratios of -1e4 and 1e4, impossible reference tokens, the extremes of fp16, sequences without unmasked tokens."""
    config = GRPOLossConfig(**VARIANTS[variant])
    batch = make(4, 8, dtype=torch.float32)
    batch["logps"][1] = torch.tensor([-1e4, 0.0, -65504.0, -1e4, -0.0, -6e-8, -1e-30, -torch.inf])
    batch["old_logps"][1] = torch.tensor([0.0, -1e4, 0.0, -1e4, -65504.0, -65504.0, 0.0, -torch.inf])
    batch["ref_logps"][1] = torch.tensor([-torch.inf, 0.0, -1e4, -torch.inf, -65504.0, 0.0, 0.0, -torch.inf])
    batch["rollout_logps"][1] = torch.tensor([0.0, 0.0, -1e4, -torch.inf, torch.nan, -65504.0, 0.0, 0.0])
    batch["masked_logps"][1] = torch.tensor([0.0, -1e4, -torch.inf, torch.nan, -65504.0, 0.0, -torch.inf, 0.0])
    batch = on(device, batch)
    batch["logps"][0] = batch["entropy"][0] = torch.nan  # masked
    need("grpo_loss", backend, batch["logps"])
    batch = {name: torch.cat([x, x]) for name, x in batch.items()}
    batch["advantages"] = batch["advantages"].abs() * torch.tensor([1.0, -1.0], device=device).repeat_interleave(4)
    result = run(batch, config, backend)
    assert all(value.isfinite().all() for value in result.values()), result
    assert all(x[~batch["loss_mask"]].eq(0).all() for x in result.values() if x.dim())
    nothing = run(batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}, config, backend)
    assert nothing["loss"] == 0
    assert nothing["dlogps"].eq(0).all()
    assert all(value.isfinite().all() for value in nothing.values())


@pytest.mark.parametrize("backend", ALL)
def test_a_fault_upstream_shows(need, device, backend):
    batch = on(device, make(3, 5, dtype=torch.float32))
    need("grpo_loss", backend, batch["logps"])
    for name in ("logps", "old_logps", "ref_logps", "advantages"):
        broken = {**batch, name: batch[name].clone()}
        broken[name][1] = torch.nan
        result = run(broken, GRPOLossConfig(beta=0.1), backend)
        assert result["loss"].isnan(), name
        assert result["dlogps"][1].isnan().any()
        assert result["dlogps"][2].isfinite().all()
        where = r"\(1,\)" if name == "advantages" else r"\(1, 0\)"
        with pytest.raises(ValueError, match=rf"{name} must be finite \(check_finite\), got nan at index {where}"):
            run(broken, GRPOLossConfig(beta=0.1, check_finite=True), backend)
    batch["logps"][~batch["loss_mask"]] = torch.nan
    batch["advantages"][0] = torch.nan  # of a sequence of which nothing counts
    for same in (batch, packed(batch)):
        assert run(same, GRPOLossConfig(check_finite=True), backend)["loss"].isfinite()
    batch["masked_logps"][1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"masked_logps must be finite \(check_finite\), got inf at index \(1, 2\)"):
        run(batch, GRPOLossConfig(perception_loss_weight=0.1, check_finite=True), backend)
    for num_items in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match=rf"num_items must be finite and >= 0 \(check_finite\), got {num_items}"):
            run(batch, GRPOLossConfig(check_finite=True), backend, num_items=torch.tensor(num_items, device=device))
    batch["entropy"][1] = torch.nan
    result = run(batch, GRPOLossConfig(), backend)
    assert result["entropy"].isnan()
    assert result["loss"].isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_empty(need, device, nan_filled, backend):
    need("grpo_loss", backend, torch.zeros(1, 1, device=device))
    for shape in ((0, 5), (3, 0), (0, 0)):
        zeros = torch.zeros(shape, device=device)
        batch = {"logps": zeros, "entropy": zeros, "masked_logps": zeros, "advantages": torch.ones(shape[0], device=device)}
        result = run(batch, GRPOLossConfig(loss_type="grpo", entropy_coef=0.1, perception_loss_weight=0.1), backend)
        for name in ("dlogps", "dentropy", "dmasked"):
            assert result.pop(name).shape == shape
        assert all(value == 0 for value in result.values()), result
    cu_seqlens = torch.tensor([0, 0, 2, 2], dtype=torch.int32, device=device)
    batch = {"logps": torch.zeros(2, device=device), "advantages": torch.ones(3, device=device), "cu_seqlens": cu_seqlens}
    assert run(batch, GRPOLossConfig(loss_type="grpo"), backend)["loss"].item() == pytest.approx(-1 / 3)


@pytest.mark.parametrize("backend", ALL)
def test_half_precision_inputs(need, device, backend):
    batch = on(device, make(3, 5, dtype=torch.float32))
    need("grpo_loss", backend, batch["logps"])
    config = GRPOLossConfig(beta=0.1, perception_loss_weight=0.3)
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
        result = run(half, config, backend)
        assert result["loss"].dtype == torch.float32
        wide = run({name: x.float() if x.is_floating_point() else x for name, x in half.items()}, config, backend)
        for name in ("dlogps", "dmasked"):
            torch.testing.assert_close(result[name], wide[name].to(dtype))
    # Gradients of e^20 / N and of a large coefficient are beyond the range of fp16.
    far = {"logps": 0.0, "old_logps": -30.0, "entropy": 1.0}
    far = {name: torch.full((2, 3), x, dtype=torch.float16, device=device) for name, x in far.items()}
    result = run(far | {"advantages": -torch.ones(2, device=device)}, GRPOLossConfig(entropy_coef=1e6), backend)
    assert result["dlogps"].eq(65504).all()
    assert result["dentropy"].eq(-65504).all()


@pytest.mark.parametrize("backend", ALL)
def test_backward_scales(need, device, backend):
    batch = on(device, make(3, 5, dtype=torch.float32))
    need("grpo_loss", backend, batch["logps"])
    config = GRPOLossConfig(entropy_coef=0.1)
    leaves = [batch["logps"].requires_grad_(), batch["entropy"].requires_grad_()]
    loss, metrics = grpo_loss(
        **{n: batch[n] for n in ("logps", "entropy", "advantages", "loss_mask")}, config=config, backend=backend
    )
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(-3 * loss, leaves, retain_graph=True), once, strict=True):
        torch.testing.assert_close(mine, -3 * other)
    twice = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice.sum().backward()
    assert not any(value.requires_grad for value in metrics.values())
    assert not grpo_loss(batch["logps"].detach(), batch["advantages"], backend=backend).loss.requires_grad


@pytest.mark.parametrize(
    ("variant", "backend"), [*itertools.product(["gspo kl"], ALL), *itertools.product(["luspo", "vespo", "papo"], ["cpp"])]
)
def test_opcheck_and_compile(need, device, variant, backend):
    config = GRPOLossConfig(**VARIANTS[variant])
    batch = on(device, make(3, 5, dtype=torch.float32))
    need("grpo_loss", backend, batch["logps"])
    fixed = {name: batch[name] for name in ("old_logps", "ref_logps", "advantages", "loss_mask")}
    fixed |= {"rollout_logps": batch["rollout_logps"]} if config.rollout_correction else {}
    args = LossInputs(*(batch.get(name) for name in LossInputs._fields))._replace(accumulation_steps=2.0)
    torch.library.opcheck(torch.ops.vlmkernels.grpo_loss_fwd.default, (*args, config.text, backend))
    leaves = [batch[name].requires_grad_() for name in ("logps", "entropy", "masked_logps")]

    def loss(logps, entropy, masked_logps):
        masked = {"masked_logps": masked_logps * 3} if config.perception else {}
        result = grpo_loss(logps * 2, entropy=entropy + 1, **masked, **fixed, num_items=9, config=config, backend=backend)
        return result.loss + 0 * result.metrics["entropy"]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    both = [torch.autograd.grad(f(*leaves), leaves, allow_unused=True) for f in (compiled, loss)]
    for mine, other in zip(*both, strict=True):
        assert (mine is None or mine.eq(0).all()) if other is None else torch.allclose(mine, other)


def test_result_does_not_depend_on_threads():
    batch = make(9, 700, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(batch, GRPOLossConfig(**VARIANTS["gspo kl"]), "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


def test_table_lists_every_loss():
    from vlmkernels.ops.grpo_loss.table import markdown

    text = markdown()
    assert all(f"| {name} |" in text for name in LOSSES)


CONFIG_ERRORS = {
    "loss_type": ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, .*, got 'ppo'"),
    "loss_type list": ({"loss_type": ["grpo"]}, r"loss_type must be one of grpo, .*, got \['grpo'\]"),
    "level": ({"importance_sampling_level": "word"}, "importance_sampling_level must be None or one of token, sequence, got"),
    "kl": ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
    "beta": ({"beta": -0.1}, "beta must be >= 0, got -0.1"),
    "beta nan": ({"beta": float("nan")}, "beta must be a finite number, got nan"),
    "epsilon_low": ({"epsilon_low": 1.5}, r"epsilon_low must be in \[0, 1\], got 1.5"),
    "epsilon_high": ({"epsilon_high": -1.0}, "epsilon_high must be >= 0, got -1.0"),
    "perception": ({"perception_loss_weight": -0.1}, "perception_loss_weight must be >= 0, got -0.1"),
    "double entropy": ({"der_loss_weight2": -1.0}, "der_loss_weight2 must be >= 0, got -1.0"),
    "delta": ({"delta": 0.0}, "delta must be > 0, got 0.0"),
    "quantile": ({"top_entropy_quantile": 1.2}, r"top_entropy_quantile must be in \[0, 1\], got 1.2"),
    "correction": ({"rollout_correction": "mask"}, "rollout_correction must be None or one of token_truncate, .* got 'mask'"),
    "bounds": ({"rollout_clip_min": 4.0}, "rollout_clip_min must be <= rollout_clip_max = 3.0, got 4.0"),
    "temperature": ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be > 0, got 0.0"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "max_completion_length must be given with loss_type = 'dr_grpo', got None"),
    "vespo": (
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        "importance_sampling_level must be one of the token level with loss_type = 'vespo', got 'sequence'",
    ),
    "vespo correction": (
        {"loss_type": "vespo", "rollout_correction": "sequence_mask"},
        "rollout_correction must be one of the token level with loss_type = 'vespo', got 'sequence_mask'",
    ),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_configuration_errors(case):
    options, message = CONFIG_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**options)
    for name in ("best", ["grpo"]):
        with pytest.raises(ValueError, match=rf"preset must be one of grpo, .*, got {re.escape(repr(name))}"):
            GRPOLossConfig.preset(name)


OF_TYPE = {kind: [field.name for field in fields(GRPOLossConfig) if field.type == kind] for kind in (float, float | None, bool)}


@pytest.mark.parametrize(
    ("names", "values", "rule"),
    [
        (OF_TYPE[float], (None, "0.5", [0.5], True), "be a finite number"),
        (OF_TYPE[float | None], ("0.5", [0.5], True), "be a finite number"),
        (OF_TYPE[bool], (None, 1, "no"), "be a bool"),
        (["max_completion_length"], (2.5, "9", True), "be an integer"),
    ],
    ids=["numbers", "numbers or None", "flags", "integers"],
)
def test_configuration_types(names, values, rule):
    for name in names:
        for value in values:
            with pytest.raises(TypeError, match=re.escape(f"{name} must {rule}, got {value!r}")):
                GRPOLossConfig(**{name: value})


def test_configurations_survive_what_is_done_with_them():
    config = GRPOLossConfig(beta=1, epsilon_low=np.float32(0.25), delta=np.float64(2), max_completion_length=np.int64(9))
    written = GRPOLossConfig(beta=1.0, epsilon_low=0.25, delta=2.0, max_completion_length=9)
    copies = (GRPOLossConfig(**asdict(config)), config.replace(), pickle.loads(pickle.dumps(config)), parse(config.text))
    for same in (written, *copies):
        assert (same, same.text, hash(same)) == (config, config.text, hash(config))
    # A schedule of entropy_coef creates a configuration per step, so the caches must be bounded.
    assert all(cached.cache_info().maxsize for cached in (parse, native_variant))


X, S = torch.zeros(2, 3), torch.zeros(2)
C = torch.tensor([0, 2, 6], dtype=torch.int32)
ERRORS = {
    "logps dtype": ((X.long(), S), {}, TypeError, "logps must be floating point, got torch.int64"),
    "logps shape": ((S, S), {}, ValueError, r"logps must be \(B, T\), or \(N,\) with cu_seqlens, got \(2,\)"),
    "logps type": (([[0.0]], S), {}, TypeError, "logps must be a tensor, got list"),
    "advantages type": ((X, "high"), {}, TypeError, "advantages must be a tensor, an array or a list of numbers, got str"),
    "cu_seqlens type": ((X.view(6), S), {"cu_seqlens": "0, 6"}, TypeError, "cu_seqlens must be a tensor, .* got str"),
    "config": ((X, S), {"config": {}}, TypeError, "config must be a GRPOLossConfig or the name of a preset, got {}"),
    "advantages": ((X, torch.zeros(3)), {}, ValueError, r"advantages must be one per sequence, \(2,\), or per .* got \(3,\)"),
    "old_logps": ((X, S), {"old_logps": S}, ValueError, r"old_logps must have the shape of logps, \(2, 3\), got \(2,\)"),
    "loss_mask": ((X, S), {"loss_mask": X - 1}, ValueError, "loss_mask must hold only 0 and 1, got -1.0"),
    "ref_logps": (
        (X, S),
        {"config": GRPOLossConfig(beta=0.1)},
        ValueError,
        "ref_logps must be given with beta = 0.1, got None",
    ),
    "rollout": (
        (X, S),
        {"config": GRPOLossConfig(rollout_correction="token_mask")},
        ValueError,
        "rollout_logps must be given with rollout_correction = 'token_mask', got None",
    ),
    "unused rollout": (
        (X, S),
        {"rollout_logps": X},
        ValueError,
        "rollout_logps must be None unless config.rollout_correction or",
    ),
    "masked": (
        (X, S),
        {"config": "papo_d"},
        ValueError,
        "masked_logps must be given with perception_loss_weight = 0.01, got None",
    ),
    "masked for entropy": (
        (X, S),
        {"config": GRPOLossConfig(der_loss_weight2=0.03)},
        ValueError,
        "masked_logps must be given with der_loss_weight2 = 0.03, got None",
    ),
    "masked shape": (
        (X, S),
        {"config": "papo_d", "masked_logps": S},
        ValueError,
        r"masked_logps must have the shape of logps, \(2, 3\), got \(2,\)",
    ),
    "unused masked": (
        (X, S),
        {"masked_logps": X},
        ValueError,
        "masked_logps must be None unless config.perception_loss_weight, der_loss_weight1 or der_loss_weight2 is > 0, got",
    ),
    "entropy": (
        (X, S),
        {"config": GRPOLossConfig(entropy_coef=0.1)},
        ValueError,
        "entropy must be given with entropy_coef = 0.1",
    ),
    "num_items": ((X, S), {"num_items": -1}, ValueError, "num_items must be >= 0, got -1"),
    "num_items type": ((X, S), {"num_items": "9"}, TypeError, r"num_items must be a number or a \(\) tensor, got '9'"),
    "threshold": ((X, S), {"entropy_threshold": [1]}, TypeError, r"entropy_threshold must be a number or a .* got \[1\]"),
    "num_items device": (
        (X, S),
        {"num_items": torch.ones((), device="meta")},
        ValueError,
        "num_items must be on the device of logps, cpu, got meta",
    ),
    "num_items shape": ((X, S), {"num_items": S}, ValueError, r"num_items must be a number or a \(\) tensor, got \(2,\)"),
    "accumulation": ((X, S), {"accumulation_steps": 0}, ValueError, "accumulation_steps must be a finite number > 0, got 0"),
    "accumulation type": (
        (X, S),
        {"accumulation_steps": "2"},
        TypeError,
        "accumulation_steps must be a finite number > 0, got '2'",
    ),
    "loss_mask and cu_seqlens": (
        (X.view(6), S),
        {"cu_seqlens": C, "loss_mask": torch.ones(6, dtype=torch.bool)},
        ValueError,
        "loss_mask must be None with cu_seqlens: leave out the tokens that do not count",
    ),
    "packed shape": ((X, S), {"cu_seqlens": C}, ValueError, r"logps must be \(N,\) with cu_seqlens, got \(2, 3\)"),
    "cu dtype": ((X.view(6), S), {"cu_seqlens": C.float()}, TypeError, "cu_seqlens must be integers, got float32"),
    "cu order": (
        (X.view(6), torch.zeros(3)),
        {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens must not decrease, got \[0, 4, 2, 6\]",
    ),
    "cu end": ((X.view(6)[:5], S), {"cu_seqlens": C}, ValueError, r"cu_seqlens must go from 0 to 5, .* got \[0, 2, 6\]"),
    "fp64": ((X.double(), S), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, got float64"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        grpo_loss(*args, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_and_no_wait(backend):
    batch = on("cuda", make(16, 300, dtype=torch.float32))
    names = ("logps", "advantages", "old_logps", "ref_logps", "loss_mask", "entropy")

    def call(**settings):
        config = GRPOLossConfig(loss_type="grpo", beta=0.1, **settings)
        return grpo_loss(**{n: batch[n] for n in names}, config=config, backend=backend)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    batch["logps"].copy_(batch["logps"].flip(0))
    graph.replay()
    torch.testing.assert_close(result.loss, call().loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        call(top_entropy_quantile=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
