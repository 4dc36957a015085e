"""The fused rows of linear_grpo_loss through the compiled module, for the backends "cpp" and "cuda"."""

from vlmkernels.ops.grpo_loss.native import variant
from vlmkernels.ops.launch import address
from vlmkernels.ops.linear_logps import native


class Native(native.Native):
    def sweep(self, logits, hidden, tokens, config, head, logp, entropy, out) -> None:
        stats = logp.new_empty(len(logp), 2)
        params = self.params(
            logits,
            out.dtype,
            tokens.targets,
            head,
            logp,
            entropy,
            stats,
            **self.reading(logits, hidden, head),
            objective=True,
            variant=variant(self.module, config),
            old_logp=address(tokens.old_logps),
            ref_logp=address(tokens.ref_logps),
            rollout_logp=address(tokens.rollout_logps),
            advantages=address(tokens.advantages),
            share=address(tokens.share),
            entropy_scale=tokens.entropy_scale,
            **self.writing(out),
        )
        self.launch("linear_logps", params, logits.device)
