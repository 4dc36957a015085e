"""grpo_loss through the compiled module, for the backends "cpp" and "cuda"."""

from functools import lru_cache

import torch

from vlmkernels.ops.grpo_loss.config import GRPOLossConfig
from vlmkernels.ops.launch import Launcher, address

# The tensors whose sequences are rows of (B, T), or stretches of (N,): the name in Batch, the name in the Params struct.
ROWS = {
    "logps": "logp",
    "old_logps": "old_logp",
    "ref_logps": "ref_logp",
    "rollout_logps": "rollout_logp",
    "entropy": "entropy",
    "advantages": "advantages",
    "mask": "mask",
}


@lru_cache(maxsize=256)
def variant(module, config: GRPOLossConfig):
    """What the configuration decides, as the struct of the compiled module."""
    level, _, bound = (config.rollout_correction or "").partition("_")
    return module.GrpoVariant(
        surrogate=module.surrogates.index(config.loss.surrogate),
        kl=module.kl_estimators.index(config.kl),
        sequence_level=config.level == "sequence",
        kl_bias_corrected=config.use_bias_correction_kl,
        per_length=config.aggregation.per_length,
        rollout=config.rollout_correction is not None,
        rollout_sequence=level == "sequence",
        rollout_mean=config.rollout_sequence_ratio == "mean",
        rollout_mask=bound == "mask",
        off_policy_mask=config.off_policy_mask_threshold is not None,
        **config.scalars._asdict(),
    )


class Native(Launcher):
    def unsupported(self, logps: torch.Tensor) -> str | None:
        return None if logps.dtype == torch.float32 else f"takes float32, got {str(logps.dtype).removeprefix('torch.')}"

    def fwd(self, batch, config, loss, dlogp, dentropy, stats):
        divisor, num_items, by_tokens = batch.divisor(config)
        params = self.module.GrpoLoss(
            variant=variant(self.module, config),
            num_sequences=batch.num_sequences,
            num_tokens=batch.logps.numel(),
            advantage_per_token=batch.per_token,
            divisor=divisor,
            divide_by_tokens=by_tokens,
            entropy_coef=config.entropy_coef,
            accumulation_steps=batch.accumulation_steps,
        )
        kept = [batch.cu_seqlens, batch.entropy_threshold, num_items]
        kept = [t if t is None else t.contiguous() for t in kept]
        params.cu_seqlens, params.entropy_threshold, params.num_items = map(address, kept)
        for field, name in ROWS.items():
            tensor = getattr(batch, field)
            if tensor is None:
                continue
            if tensor.stride(-1) != 1 and (tensor.dim() == 2 or field != "advantages" or batch.per_token):
                tensor = tensor.contiguous()
                kept.append(tensor)  # alive until the launch
            setattr(params, name, address(tensor))
            setattr(params, f"{name}_stride", tensor.stride(0))
        params.dlogp, params.loss, params.stats = map(address, (dlogp, loss, stats))
        params.dentropy = address(dentropy if dentropy.numel() else None)
        if self.name == "cuda":
            partial = stats.new_empty(batch.num_sequences, self.module.grpo_columns)
            params.partial = address(partial)
        self.launch("grpo_loss", params, batch.logps.device)
