"""grpo_loss against TRL 1.16, first principles and, for every backend, the fp64 reference."""

import itertools

import pytest
import torch
from budget import assert_within_budget

from vlmkernels import GRPOLossConfig, grpo_loss
from vlmkernels import backend as backends
from vlmkernels.ops.grpo_loss.config import CORRECTIONS, LOSSES

TRL_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def make(B=5, T=9, dtype=torch.float64, spread=0.4, per_token=False, seed=0):
    """A batch with holes in its mask, an empty completion, and NaN wherever nothing counts."""
    rng = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, T, generator=rng, dtype=torch.float64) * 3
    around = lambda: logps + spread * torch.randn(B, T, generator=rng, dtype=torch.float64)  # noqa: E731
    batch = {
        "logps": logps,
        "advantages": torch.randn((B, T) if per_token else (B,), generator=rng, dtype=torch.float64),
        "old_logps": around(),
        "ref_logps": around(),
        "rollout_logps": around(),
        "entropy": 3 * torch.rand(B, T, generator=rng, dtype=torch.float64),
    }
    mask = torch.rand(B, T, generator=rng) < 0.7
    mask[0] = False
    mask[1] = True
    return {name: x.to(dtype) for name, x in batch.items()} | {"mask": mask}


def run(batch, config, backend="auto", **options):
    """The loss, its gradients by logps and entropy, and the metrics. Reads only what the configuration asks for."""
    batch = {name: x.detach().clone() for name, x in batch.items() if x is not None}
    if config.rollout_correction is None and config.off_policy_mask_threshold is None:
        batch.pop("rollout_logps", None)
    leaves = [batch["logps"].requires_grad_()]
    if config.entropy_coef:
        leaves.append(batch["entropy"].requires_grad_())
    loss, metrics = grpo_loss(**batch, config=config, backend=backend, **options)
    grads = torch.autograd.grad(loss, leaves)
    result = {"loss": loss.detach(), "dlogps": grads[0]} | metrics
    return result | ({"dentropy": grads[1]} if config.entropy_coef else {})


def assert_close(mine, other, rel, name, scale=1e-3):
    """|mine - other| <= rel max(max |other|, scale)."""
    mine, other = (torch.as_tensor(x, dtype=torch.float64) for x in (mine, other))
    assert mine.shape == other.shape, name
    bound = rel * max(other.abs().max().item(), scale)
    error = (mine - other).abs().max().item()
    assert error <= bound, f"{name}: {error:.3e} over {bound:.3e}"


KL = {"no kl": {}, "kl": {"beta": 0.3, "use_bias_correction_kl": False}, "corrected kl": {"beta": 0.3}}
EXTRAS = {
    "plain": {},
    "delta": {"delta": 1.15, "epsilon_high": 0.1},
    "entropy": {"top_entropy_quantile": 0.37, "entropy_coef": 0.2},
    "off policy": {"off_policy_mask_threshold": 0.02},
    "all": {"delta": 1.3, "top_entropy_quantile": 0.61, "entropy_coef": -0.1, "off_policy_mask_threshold": 0.05},
}
# dtype, an advantage per token, old_logps that are the policy's
INPUTS = [
    (torch.float64, False, False),
    (torch.float64, True, False),
    (torch.float64, False, True),
    (torch.float32, False, False),
]


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", KL)
def test_trl_parity(loss_type, level, kl):
    """Loss, gradients and every metric of TRL's own function: 1e-12 in fp64, 1e-6 in fp32."""
    trl = pytest.importorskip("trl_loss")
    if (loss_type, level) == ("vespo", "sequence"):
        pytest.skip("refused: vespo is of the sequence already")
    for correction, extra, (dtype, per_token, on_policy) in itertools.product((None, *CORRECTIONS), EXTRAS, INPUTS):
        if loss_type == "vespo" and correction and correction.startswith("sequence"):
            continue  # refused by TRL too
        options = {"max_completion_length": 20, **KL[kl], **EXTRAS[extra]}
        if correction:
            options |= {"use_vllm": True, "vllm_importance_sampling_mode": correction}
            options |= {"vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": 0.7}
        args = trl.trl_args(loss_type=loss_type, importance_sampling_level=level, **options)
        config = GRPOLossConfig.from_trl(args)
        batch = make(dtype=dtype, per_token=per_token)
        if correction:
            batch["rollout_logps"][2, 3] = torch.nan  # not scored by the engine
        else:
            batch["rollout_logps"] = None
        if on_policy:
            # TRL computes the old log-probabilities whenever there is a correction.
            batch["old_logps"] = batch["logps"].clone() if correction else None
        num_items = torch.tensor(17.0)
        leaves = {name: batch[name].clone().requires_grad_() for name in ("logps", "entropy")}
        theirs, metrics = trl.trl_loss(args, **batch | leaves, num_items=num_items)
        dlogps, dentropy = torch.autograd.grad(theirs, leaves.values(), allow_unused=True)
        theirs = {"loss": theirs.detach(), "dlogps": dlogps, "dentropy": dentropy} | metrics
        mine = run(batch, config, "reference", num_items=num_items)
        for name, value in theirs.items():
            if value is not None and name in mine:
                exact = dtype == torch.float64 and name in ("loss", "dlogps", "dentropy")
                # Terms cancel in the loss: its scale is theirs.
                scale = dlogps.abs().sum().item() if name == "loss" else 1e-3
                assert_close(mine[name], value, 1e-12 if exact else 1e-6, f"{name} {dtype} {options}", scale)
            else:
                assert name in ("dentropy", "policy_loss")  # without an entropy bonus


def test_every_loss_of_trl_is_there():
    assert set(TRL_LOSSES) == set(LOSSES)


# Every row of every table, and what turns on each branch of the kernels.
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1, "kl_estimator": "k1"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 20, "beta": 0.1, "kl_estimator": "k2"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.2, "beta": 0.1},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1, "use_bias_correction_kl": True},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
    "vespo": {"loss_type": "vespo", "rollout_correction": "token_mask", "rollout_clip_max": 1.3},
    "vespo truncated": {"loss_type": "vespo", "rollout_correction": "token_truncate", "rollout_clip_min": 0.9},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "top_entropy_quantile": 0.4},
    "gspo kl": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True},
    "gspo sapo": {"loss_type": "sapo", "importance_sampling_level": "sequence", "entropy_coef": 0.1},
    "gspo cispo": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.0},
    "token mask": {"rollout_correction": "token_mask", "rollout_clip_min": 0.8, "rollout_clip_max": 1.2},
    "sequence truncate": {"rollout_correction": "sequence_truncate", "rollout_clip_min": 0.9, "rollout_clip_max": 1.1},
    "sequence mask": {"rollout_correction": "sequence_mask", "rollout_clip_max": 1.4, "rollout_sequence_ratio": "mean"},
    "off policy": {"off_policy_mask_threshold": 0.02, "loss_type": "dapo"},
}
KERNELS = ["cpp", "triton", "cuda"]


def on(device, batch):
    return {name: x if x is None else x.to(device) for name, x in batch.items()}


def packed(batch):
    """The tokens that the mask holds, one sequence after another."""
    mask = batch["mask"]
    result = {name: x[mask] if x.shape == mask.shape else x for name, x in batch.items() if name != "mask"}
    lengths = mask.sum(1)
    return result | {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()}


def check(batch, config, backend, **options):
    """Any backend against the fp64 reference: gradients within the budget of budget.py, scalars within that of their sums."""
    device = "cpu" if backends.device_type(backend) == "cpu" else batch["logps"].device
    double = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    exact, eager = run(double, config, "reference", **options), run(batch, config, "reference", **options)
    actual = run(on(device, batch), config, backend, **options)
    assert actual.keys() == exact.keys()
    size = exact["dlogps"].abs().sum().item()
    for name, value in exact.items():
        if value.dim():
            assert_within_budget(name, actual[name].cpu(), eager[name].cpu(), value.cpu())
            continue
        error, allowed = abs(actual[name].item() - value.item()), abs(eager[name].item() - value.item())
        bound = 2 * allowed + 4 * torch.finfo(torch.float32).eps * max(1.0, size, abs(value.item()))
        assert error <= bound, f"{name}: {actual[name].item()} for {value.item()}"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_fp64(need, device, nan_filled, backend, variant):
    config = GRPOLossConfig(**VARIANTS[variant])
    for shape, per_token in (((5, 9), False), ((3, 70), True), ((2, 1111), False)):  # odd; more than a block
        batch = on(device, make(*shape, dtype=torch.float32, per_token=per_token))
        need("grpo_loss", backend, batch["logps"])
        check(batch, config, backend, num_items=17.0)
        check(packed(batch), config, backend, accumulation_steps=3)


@pytest.mark.parametrize("backend", KERNELS)
def test_views_are_read_in_place(need, device, nan_filled, backend):
    """Rows of a wider tensor, columns, one row for all; on policy and without a mask."""
    wide = on(device, make(4, 50, dtype=torch.float32))
    need("grpo_loss", backend, wide["logps"])
    config = GRPOLossConfig(loss_type="grpo", beta=0.1)
    cut = {name: x[:, 3:40] if x.dim() == 2 else x[::2].repeat(2) for name, x in wide.items()}
    check(cut, config, backend)
    transposed = {name: x.t().contiguous().t() if x.dim() == 2 else x[:1].expand(4) for name, x in wide.items()}
    check(transposed, config, backend)
    check({**wide, "advantages": wide["entropy"][:1].expand(4, -1)}, config, backend)
    check({name: wide[name] for name in ("logps", "advantages", "ref_logps")}, config, backend)
