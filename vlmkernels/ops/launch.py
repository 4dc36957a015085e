"""Calls into the compiled module ``vlmkernels._C``: what every op's ``native.py`` shares."""

import torch

from vlmkernels import backend

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unsupported_dtype(tensor: torch.Tensor) -> str | None:
    if tensor.dtype not in DTYPES:
        return f"takes {', '.join(DTYPES.values())}, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Launcher:
    """Base of an op's ``Native``: the backend's name and its compiled module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = backend.NATIVE[name]()

    def launch(self, function: str, params: object, device: torch.device) -> None:
        """Run ``function`` with its Params struct: on torch's threads, or on the current stream of ``device``."""
        if self.name == "cpp":
            getattr(self.module, f"{function}_cpu")(params, torch.get_num_threads())
            return
        on_gpu = device.type == "cuda"
        # As torch.cuda.current_stream(device).cuda_stream, without a Stream object. Inductor's launchers use it too.
        stream = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
        getattr(self.module, f"{function}_cuda")(params, device.index if on_gpu else 0, stream)
