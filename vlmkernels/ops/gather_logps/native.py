"""gather_logps through the compiled module, for the backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import row_layout, unsupported_rows

# Few rows leave most of a GPU idle: share each among so many blocks that there are at least _BLOCKS (three per multiprocessor
# of an H100 keep its memory busy), of at least _MIN_SPLIT elements. More would not pay for the kernel that merges them.
_BLOCKS = 384
_MIN_SPLIT = 8192


class Native(Launcher):
    def unsupported(self, logits: torch.Tensor) -> str | None:
        return unsupported_dtype(logits) or unsupported_rows(logits)

    def _logits(self, logits):
        inner, stride_outer, stride_inner = row_layout(logits)
        return {
            "logits": address(logits),
            "dtype": DTYPES[logits.dtype],
            "num_rows": logits.shape[:-1].numel(),
            "vocab": logits.shape[-1],
            "inner": inner,
            "stride_outer": stride_outer,
            "stride_inner": stride_inner,
        }

    def fwd(self, logits, targets, mask, rows, temperature, logp, entropy, stats):
        num, vocab = targets.numel(), logits.shape[-1]
        splits = 1 if self.name == "cpp" else max(1, min(-(-_BLOCKS // num), vocab // _MIN_SPLIT))
        partial = stats.new_empty(num, splits, 3) if splits > 1 else None
        targets, mask, rows = (t if t is None else t.contiguous() for t in (targets, mask, rows))
        params = self.module.GatherLogps(
            **self._logits(logits),
            num_results=num,
            temperature=temperature,
            targets=address(targets),
            mask=address(mask),
            rows=address(rows),
            logp=address(logp),
            entropy=address(entropy),
            stats=address(stats),
            partial=address(partial),
            splits=splits,
        )
        self.launch("gather_logps_fwd", params, logits.device)

    def bwd(self, dlogp, targets, stats, dentropy, entropy, logits, mask, starts, temperature, out):
        inner, *strides = row_layout(logits)
        vocab = logits.shape[-1]
        # Fresh results are contiguous; otherwise `out` is `logits`.
        grad_stride_outer, grad_stride_inner = (inner * vocab, vocab) if out.is_contiguous() else strides
        dlogp, targets, stats, dentropy, mask = (
            t if t is None else t.contiguous() for t in (dlogp, targets, stats, dentropy, mask)
        )
        params = self.module.GatherLogps(
            **self._logits(logits),
            num_results=targets.numel(),
            temperature=temperature,
            targets=address(targets),
            mask=address(mask),
            entropy=address(entropy),
            stats=address(stats),
            dlogp=address(dlogp),
            dentropy=address(dentropy),
            starts=address(starts),
            dlogits=address(out),
            grad_stride_outer=grad_stride_outer,
            grad_stride_inner=grad_stride_inner,
        )
        self.launch("gather_logps_bwd", params, logits.device)
