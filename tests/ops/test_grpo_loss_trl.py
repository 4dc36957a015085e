"""grpo_loss against the loss function of TRL 1.16, and GRPOLossConfig.from_trl."""

import importlib
import itertools

import pytest
import torch
from support.grpo_cases import make, run

from vlmkernels import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import CORRECTIONS, LOSSES, PRESETS, parse

pytest.importorskip("trl")
from support import trl_loss as trl

TRL_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def assert_close(mine, other, rel, name, scale=1e-3):
    """Check that |mine - other| <= rel max(max |other|, scale)."""
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
# (dtype, whether advantages are per token, whether old_logps equal logps)
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
    """Loss, gradients and all metrics equal TRL's: within 1e-12 in fp64, 1e-6 in fp32."""
    if (loss_type, level) == ("vespo", "sequence"):
        pytest.skip("not supported: the weight of vespo is per sequence already")
    for correction, extra, (dtype, per_token, on_policy) in itertools.product((None, *CORRECTIONS), EXTRAS, INPUTS):
        if loss_type == "vespo" and correction and correction.startswith("sequence"):
            continue  # TRL does not support it either
        if extra not in ("plain", "all") and (per_token or on_policy or dtype == torch.float32):
            continue
        # TRL rounds the temperatures of sapo to fp32.
        options = {"max_completion_length": 20, "sapo_temperature_neg": 1.25, **KL[kl], **EXTRAS[extra]}
        if correction:
            options |= {"use_vllm": True, "vllm_importance_sampling_mode": correction}
            options |= {"vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": 0.7}
        args = trl.trl_args(loss_type=loss_type, importance_sampling_level=level, **options)
        config = GRPOLossConfig.from_trl(args)
        batch = make(dtype=dtype, per_token=per_token)
        del batch["masked_logps"]
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
                # Terms cancel in the loss, so its error is compared with the size of the terms.
                scale = dlogps.abs().sum().item() if name == "loss" else 1e-3
                assert_close(mine[name], value, 1e-12 if exact else 1e-6, f"{name} {dtype} {options}", scale)
            else:
                assert name in ("dentropy", "policy_loss")  # without an entropy bonus


def test_every_loss_of_trl_is_there():
    assert set(TRL_LOSSES) == set(LOSSES)


def test_presets_and_trl_arguments():
    for name in PRESETS:
        changes = {"max_completion_length": 10} if name == "dr_grpo" else {}
        config = GRPOLossConfig.preset(name, **changes)
        assert parse(config.text) == config
    assert GRPOLossConfig.preset("gspo").level == "sequence"
    assert GRPOLossConfig.preset("luspo").level == "sequence"
    assert GRPOLossConfig(loss_type="cispo").clip_high == 5.0
    assert GRPOLossConfig(epsilon_low=0.3).clip_high == 0.3
    # TRL has one default for all losses.
    assert GRPOLossConfig.from_trl(trl.trl_args(loss_type="cispo")).clip_high == 0.2
    assert GRPOLossConfig.from_trl(trl.trl_args(use_vllm=True)).rollout_correction == "sequence_mask"
    assert GRPOLossConfig.from_trl(trl.trl_args()).rollout_correction is None
    for field, value in (("use_adaptive_entropy", True), ("router_aux_loss_coef", 0.001)):
        with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
            GRPOLossConfig.from_trl(trl.trl_args(**{field: value}))
    for args in (None, {}):
        with pytest.raises(TypeError, match=f"args must be a trl.GRPOConfig, got {type(args).__name__}"):
            GRPOLossConfig.from_trl(args)
    real = importlib.import_module("trl").GRPOConfig(use_cpu=True, bf16=False, epsilon_high=0.28)
    assert GRPOLossConfig.from_trl(real) == GRPOLossConfig.from_trl(trl.trl_args(epsilon_high=0.28))
