"""Calls of the compiled module ``vlmkernels._C``, shared by the ``native.py`` of every op."""

from typing import Any

import torch

from vlmkernels import backend
from vlmkernels.ops.checks import dtype_name

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unsupported_dtype(tensor: torch.Tensor) -> str | None:
    """Return why kernels for ``DTYPES`` do not support ``tensor``; None if they do."""
    if tensor.dtype not in DTYPES:
        return f"supports {', '.join(DTYPES.values())}, got {dtype_name(tensor.dtype)}"
    return None


def unless_fp32(tensor: torch.Tensor) -> str | None:
    """Return why kernels for fp32 do not support ``tensor``; None if they do."""
    return None if tensor.dtype == torch.float32 else f"supports float32, got {dtype_name(tensor.dtype)}"


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Launcher:
    """Base of an op's ``Native``: the name of the backend and its compiled module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: Any = backend.NATIVE[name]()

    def launch(self, function: str, params: object, device: torch.device) -> None:
        """Run ``function`` with its Params struct, on torch's threads (cpp) or on the current stream of ``device`` (cuda)."""
        if self.name == "cpp":
            getattr(self.module, f"{function}_cpu")(params, torch.get_num_threads())
            return
        on_gpu = device.type == "cuda"
        # The same as torch.cuda.current_stream(device).cuda_stream without a Stream object; Inductor's launchers use it too.
        stream = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
        getattr(self.module, f"{function}_cuda")(params, device.index if on_gpu else 0, stream)
