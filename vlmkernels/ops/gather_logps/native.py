"""gather_logps with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import row_layout, unsupported_rows

# With few rows, one block per row would leave most of a GPU idle. Rows are split so that there are at least _BLOCKS blocks
# (three per multiprocessor of an H100) with at least _MIN_SPLIT elements each. Merging smaller parts costs more than it saves.
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

    def fwd(self, logits, targets, mask, rows, temperature, outputs):
        num, vocab = targets.numel(), logits.shape[-1]
        splits = 1 if self.name == "cpp" else max(1, min(-(-_BLOCKS // num), vocab // _MIN_SPLIT))
        partial = outputs.stats.new_empty(num, splits, 3) if splits > 1 else None
        targets, mask, rows = (t if t is None else t.contiguous() for t in (targets, mask, rows))
        params = self.module.GatherLogps(
            **self._logits(logits),
            num_results=num,
            temperature=temperature,
            targets=address(targets),
            mask=address(mask),
            rows=address(rows),
            logp=address(outputs.logp),
            entropy=address(outputs.entropy),
            stats=address(outputs.stats),
            partial=address(partial),
            splits=splits,
        )
        self.launch("gather_logps_fwd", params, logits.device)

    def bwd(self, logits, results, temperature, out):
        inner, *strides = row_layout(logits)
        vocab = logits.shape[-1]
        # A new `out` is contiguous; otherwise `out` is `logits`.
        grad_stride_outer, grad_stride_inner = (inner * vocab, vocab) if out.is_contiguous() else strides
        results = results.contiguous()
        params = self.module.GatherLogps(
            **self._logits(logits),
            num_results=results.targets.numel(),
            temperature=temperature,
            targets=address(results.targets),
            mask=address(results.mask),
            entropy=address(results.entropy),
            stats=address(results.stats),
            dlogp=address(results.dlogp),
            dentropy=address(results.dentropy),
            offsets=address(results.offsets),
            dlogits=address(out),
            grad_stride_outer=grad_stride_outer,
            grad_stride_inner=grad_stride_inner,
        )
        self.launch("gather_logps_bwd", params, logits.device)
