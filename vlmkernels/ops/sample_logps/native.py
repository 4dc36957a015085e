"""sample_logps with the compiled module: backends "cpp" and "cuda"."""

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis


class Native(Launcher):
    def unsupported(self, logits):
        return unsupported_dtype(logits) or unsupported_last_axis(logits)

    def fwd(self, inputs, filters, outputs) -> None:
        logits, uniform, seen, banned, banned_rows = inputs
        num, vocab = logits.shape
        uniform, banned, banned_rows = (t if t is None else t.contiguous() for t in (uniform, banned, banned_rows))
        seen = seen if seen is None or seen.stride(1) == 1 else seen.contiguous()
        # Sums of each block of tokens.
        blocks = -(-vocab // self.module.token_block)
        workspace = None if self.name == "cpp" else outputs.logps.new_empty(num, blocks, 6)
        params = self.module.SampleLogps(
            logits=address(logits),
            dtype=DTYPES[logits.dtype],
            num_rows=num,
            vocab=vocab,
            stride=logits.stride(0),
            uniform=address(uniform),
            seen=address(seen),
            seen_stride=0 if seen is None else seen.stride(0),
            banned=address(banned),
            banned_rows=address(banned_rows),
            num_banned=0 if banned is None else len(banned),
            temperature=filters.temperature,
            top_k=filters.top_k,
            removable=filters.removable,
            min_p_distance=filters.min_p_distance,
            repetition_penalty=filters.repetition_penalty,
            ids=address(outputs.ids),
            logps=address(outputs.logps),
            log_kept_mass=address(outputs.log_kept_mass),
            entropy=address(outputs.entropy),
            workspace=address(workspace),
        )
        self.launch("sample_logps", params, logits.device)
