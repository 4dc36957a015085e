"""few_rows_linear with the compiled module: backend "cpp"."""

import torch

from vlmkernels.ops.launch import Launcher, address, unless_fp32
from vlmkernels.ops.layout import unsupported_last_axis


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        return next(filter(None, (unless_fp32(x) or unsupported_last_axis(x) for x in tensors)), None)

    def fwd(self, x, weight, bias):
        out = x.new_empty(len(x), len(weight))
        bias = None if bias is None else bias.contiguous()
        params = self.module.FewRowsLinear(
            x=x.data_ptr(),
            stride_x=x.stride(0),
            weight=weight.data_ptr(),
            stride_weight=weight.stride(0),
            bias=address(bias),
            out=out.data_ptr(),
            rows=len(x),
            outputs=len(weight),
            width=x.shape[1],
        )
        self.launch("few_rows_linear", params, x.device)
        return out
