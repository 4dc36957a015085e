"""The fused rows of linear_grpo_loss with the compiled module: backends "cpp" and "cuda"."""

from vlmkernels.ops.grpo_loss.native import variant
from vlmkernels.ops.launch import address
from vlmkernels.ops.linear_logps import native


class Native(native.Native):
    def sweep(self, logits, hidden, selected, tokens, config, head, out) -> None:
        params = self.params(
            logits,
            out.dtype,
            selected,
            head,
            **self.reading(logits, hidden, head),
            objective=True,
            variant=variant(self.module, config),
            old_logp=address(tokens.old_logps),
            ref_logp=address(tokens.ref_logps),
            rollout_logp=address(tokens.rollout_logps),
            masked_logp=address(tokens.masked_logps),
            advantages=address(tokens.advantages),
            share=address(tokens.share),
            entropy_scale=tokens.entropy_scale,
            **self.writing(out),
        )
        self.launch("linear_logps", params, logits.device)
