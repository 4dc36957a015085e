"""rotary through the compiled module, for the backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        reasons = [unsupported_dtype(tensor) or unsupported_last_axis(tensor) for tensor in tensors]
        pairs, most = tensors[-1].shape[-1], self.module.rotary_max_pairs
        if self.name == "cuda" and pairs > most:
            reasons.append(f"takes at most {most} pairs, got {pairs}")
        return next(filter(None, reasons), None)

    def _heads(self, x, out):
        stride_batch, stride_token, stride_head, _ = x.stride()
        strides = {"stride_batch": stride_batch, "stride_token": stride_token, "stride_head": stride_head}
        return self.module.RotaryHeads(x=address(x), out=address(out), num=x.shape[2], **strides)

    def _table(self, x):
        return self.module.RotaryTable(values=address(x), stride_batch=x.stride(0), stride_token=x.stride(1))

    def fwd(self, query, key, cos, sin, inverse, query_out, key_out):
        params = self.module.Rotary(
            query=self._heads(query, query_out),
            key=self._heads(key, key_out),
            cos=self._table(cos),
            sin=self._table(sin),
            dtype=DTYPES[query.dtype],
            table_dtype=DTYPES[cos.dtype],
            batch=query.shape[0],
            tokens=query.shape[1],
            width=query.shape[3],
            pairs=cos.shape[-1],
            inverse=inverse,
        )
        self.launch("rotary", params, query.device)
