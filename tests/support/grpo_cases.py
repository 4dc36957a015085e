"""Batches and configurations for the tests of grpo_loss and linear_grpo_loss."""

import torch

from vlmkernels import grpo_loss

# Every row of the tables of variants, and every branch of the kernels.
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
    "papo": {"perception_loss_weight": 0.3, "der_loss_weight1": 0.2, "der_loss_weight2": 0.1, "beta": 0.1},
}


def make(B=5, T=9, dtype=torch.float64, spread=0.4, per_token=False, seed=0):
    """A batch with holes in its mask, one empty completion and one complete one."""
    rng = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, T, generator=rng, dtype=torch.float64) * 3

    def around():
        return logps + spread * torch.randn(B, T, generator=rng, dtype=torch.float64)

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
    # Some tokens have no masked images, and some are far more likely without their image.
    batch["masked_logps"] = logps + 4 * spread * torch.randn(B, T, generator=rng, dtype=torch.float64)
    batch["masked_logps"][torch.rand(B, T, generator=rng) < 0.2] = torch.nan
    return {name: x.to(dtype) for name, x in batch.items()} | {"loss_mask": mask}


def run(batch, config, backend="auto", **options):
    """The loss, its gradients, and the metrics. Passes only the inputs that config uses."""
    batch = {name: x.detach().clone() for name, x in batch.items() if x is not None}
    if config.rollout_correction is None and config.off_policy_mask_threshold is None:
        batch.pop("rollout_logps", None)
    if not config.perception:
        batch.pop("masked_logps", None)
    leaves = {"dlogps": batch["logps"]}
    leaves |= {"dentropy": batch["entropy"]} if config.entropy_coef else {}
    leaves |= {"dmasked": batch["masked_logps"]} if config.perception else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss, metrics = grpo_loss(**batch, config=config, backend=backend, **options)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return {"loss": loss.detach()} | gradients | metrics


def on(device, batch):
    return {name: x if x is None else x.to(device) for name, x in batch.items()}


def packed(batch):
    """The batch without its masked tokens, one sequence after another, with ``cu_seqlens``."""
    mask = batch["loss_mask"]
    result = {name: x[mask] if x.shape == mask.shape else x for name, x in batch.items() if name != "loss_mask"}
    lengths = mask.sum(1)
    return result | {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()}
