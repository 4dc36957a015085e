"""linear_grpo_loss on a chunk of logits in Triton: the kernel of linear_logps with a surrogate."""

from vlmkernels.ops.grpo_loss.config import GRPOLossConfig
from vlmkernels.ops.grpo_loss.triton import KL, SURROGATES
from vlmkernels.ops.linear_grpo_loss.tokens import Tokens
from vlmkernels.ops.linear_logps.inputs import SelectedRows
from vlmkernels.ops.linear_logps.triton import launch, reading, unsupported

__all__ = ["sweep", "unsupported"]


def sweep(logits, hidden, selected: SelectedRows, tokens: Tokens, config: GRPOLossConfig, head, out) -> None:
    surrogate, _ = SURROGATES[config.loss.surrogate]
    launch(
        logits,
        selected,
        head,
        **reading(logits, hidden, head),
        WRITE=True,
        SURROGATE=surrogate,
        KL=KL[config.kl],
        p=config.scalars,
        BIAS_CORRECTED=config.use_bias_correction_kl,
        ROLLOUT=config.rollout_correction is not None,
        ROLLOUT_MASK=config.rollout_correction == "token_mask",
        old_logp_ptr=tokens.old_logps,
        ref_logp_ptr=tokens.ref_logps,
        rollout_logp_ptr=tokens.rollout_logps,
        masked_logp_ptr=tokens.masked_logps,
        adv_ptr=tokens.advantages,
        share_ptr=tokens.share,
        entropy_scale=tokens.entropy_scale,
        dx_ptr=out,
        stride_dx=out.stride(0),
    )
