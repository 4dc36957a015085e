"""grpo_loss with the compiled module: backends "cpp" and "cuda"."""

from functools import lru_cache

import torch

from vlmkernels.ops.grpo_loss.config import GRPOLossConfig
from vlmkernels.ops.launch import Launcher, address, unless_fp32

# The tensors with one row per sequence: the name in LossInputs, and the fields of GrpoLoss for the address and the stride.
ROWS = (
    ("logps", "logp", "logp_stride"),
    ("old_logps", "old_logp", "old_logp_stride"),
    ("ref_logps", "ref_logp", "ref_logp_stride"),
    ("rollout_logps", "rollout_logp", "rollout_logp_stride"),
    ("masked_logps", "masked_logp", "masked_logp_stride"),
    ("entropy", "entropy", "entropy_stride"),
    ("advantages", "advantages", "advantages_stride"),
    ("loss_mask", "loss_mask", "loss_mask_stride"),
)


@lru_cache(maxsize=256)
def variant(module, config: GRPOLossConfig):
    """Convert the configuration to the struct of the compiled module."""
    level, _, bound = (config.rollout_correction or "").partition("_")
    return module.GrpoVariant(
        surrogate=config.loss.surrogate,
        kl=config.kl,
        sequence_level=config.level == "sequence",
        kl_bias_corrected=config.use_bias_correction_kl,
        per_length=config.aggregation.per_length,
        rollout=config.rollout_correction is not None,
        rollout_sequence=level == "sequence",
        rollout_mean=config.rollout_sequence_ratio == "mean",
        rollout_mask=bound == "mask",
        off_policy_mask=config.off_policy_mask_threshold is not None,
        perception=config.perception,
        **config.scalars._asdict(),
    )


class Native(Launcher):
    def unsupported(self, logps: torch.Tensor) -> str | None:
        return unless_fp32(logps)

    def fwd(self, inputs, config, loss, dlogp, dentropy, dmasked, stats):
        divisor, num_items, by_tokens = inputs.divisor(config)
        per_token = inputs.per_token
        scalars = [t if t is None else t.contiguous() for t in (inputs.cu_seqlens, inputs.entropy_threshold, num_items)]
        cu_seqlens, entropy_threshold, num_items = map(address, scalars)
        rows, copies = {}, []
        for field, name, stride in ROWS:
            tensor = getattr(inputs, field)
            if tensor is None:
                continue
            strides = tensor.stride()
            if strides[-1] != 1 and (field != "advantages" or per_token):
                tensor = tensor.contiguous()
                copies.append(tensor)  # keep it alive until the launch
                strides = tensor.stride()
            rows[name], rows[stride] = tensor.data_ptr(), strides[0]
        partial = stats.new_empty(inputs.num_sequences, len(self.module.grpo_columns)) if self.name == "cuda" else None
        params = self.module.GrpoLoss(
            variant=variant(self.module, config),
            num_sequences=inputs.num_sequences,
            num_tokens=inputs.logps.numel(),
            cu_seqlens=cu_seqlens,
            **rows,
            advantage_per_token=per_token,
            entropy_threshold=entropy_threshold,
            num_items=num_items,
            divisor=divisor,
            divide_by_tokens=by_tokens,
            entropy_coef=config.entropy_coef,
            accumulation_steps=inputs.accumulation_steps,
            partial=address(partial),
            dlogp=dlogp.data_ptr(),
            dentropy=dentropy.data_ptr() if dentropy.numel() else 0,
            dmasked=dmasked.data_ptr() if dmasked.numel() else 0,
            loss=loss.data_ptr(),
            stats=stats.data_ptr(),
        )
        self.launch("grpo_loss", params, inputs.logps.device)
