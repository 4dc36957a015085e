"""A stand-in for CUDA graphs on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    """Records the ops that write to memory, and keeps what was in the memory that existed before."""

    def __init__(self):
        super().__init__()
        self.calls, self.new, self.previous = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func.overloadpacket is torch.ops.aten.index:
            waits = any(x.dtype == torch.bool for x in args[1] if x is not None)
        if waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for x in (named[name] for name in written):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.new | self.previous.keys():
                self.previous[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        fresh = [x for x in outputs if x.untyped_storage().data_ptr() not in storages]
        self.new |= {x.untyped_storage().data_ptr() for x in fresh}
        if written or fresh:
            self.calls.append((func, args, kwargs, outputs if fresh else []))
        return result

    def undo(self):
        for storage, content in self.previous.values():
            storage.copy_(content)


class RecordedGraphs:
    """Records the ops of a function with the tensors they read and write, like ``CudaCapture``, and replays them on these.

    A replay does not run the function: what the function does in Python, and memory that it gets anew, is as it was when it was
    captured. What waits for a GPU cannot be captured.
    """

    def __init__(self):
        self.captures, self.replays = 0, 0

    def __call__(self, function):
        recorder = _Recorder()
        try:
            with torch.random.fork_rng(devices=[]), recorder:  # a capture draws no random numbers
                result = function()
        finally:
            recorder.undo()
        self.captures += 1

        def replay():
            self.replays += 1
            for func, args, kwargs, outputs in recorder.calls:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for recorded, x in zip(outputs, again, strict=False):
                    recorded.copy_(x)

        return replay, result
