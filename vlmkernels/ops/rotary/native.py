"""rotary with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        reasons = [unsupported_dtype(tensor) or unsupported_last_axis(tensor) for tensor in tensors]
        pairs, most = tensors[-1].shape[-1], self.module.rotary_max_pairs
        if self.name == "cuda" and pairs > most:
            reasons.append(f"supports at most {most} pairs, got {pairs}")
        return next(filter(None, reasons), None)

    def _heads(self, x, out, heads_first):
        *batch, token, head = range(x.dim() - 1)
        if heads_first:
            token, head = head, token
        strides = x.stride()
        return self.module.RotaryHeads(
            x=x.data_ptr(),
            out=out.data_ptr(),
            num=x.shape[head],
            stride_batch=strides[0] if batch else 0,
            stride_token=strides[token],
            stride_head=strides[head],
        )

    def _table(self, x):
        *batch, stride_token, _ = x.stride()
        stride_batch = batch[0] if batch else 0
        return self.module.RotaryTable(values=x.data_ptr(), stride_batch=stride_batch, stride_token=stride_token)

    def fwd(self, query, key, cos, sin, inverse, heads_first, query_out, key_out):
        *batch, tokens, pairs = cos.shape
        params = self.module.Rotary(
            query=self._heads(query, query_out, heads_first),
            key=self._heads(key, key_out, heads_first),
            cos=self._table(cos),
            sin=self._table(sin),
            dtype=DTYPES[query.dtype],
            table_dtype=DTYPES[cos.dtype],
            batch=batch[0] if batch else 1,
            tokens=tokens,
            width=query.shape[-1],
            pairs=pairs,
            inverse=inverse,
        )
        self.launch("rotary", params, query.device)
