"""Tensors that claim to be on a GPU and compute on the CPU, to find on any machine what would fail or wait on a GPU.

``on_gpu(x)`` returns such a tensor. In a ``PretendGPU`` block, operations on them run on the CPU and return tensors of the same
kind. An operation that mixes them with tensors on the CPU raises the error of a GPU, and the block counts the operations for
which the host would wait for the device, by their place in the code.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from transformers import TrainingArguments

from vlmkernels.models import attention
from vlmkernels.ops.tree_attention import tree_attention
from vlmkernels.record import phases
from vlmkernels.rollout import decoder
from vlmkernels.rollout.step_graphs import StepGraphs

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")


class OnGPU(torch.Tensor):
    """A tensor with the device ``DEVICE``, whose values are in ``host``, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, host):
        # For C++, the tensor is on the meta device, because the autograd engine would ask the driver about a GPU.
        size = host.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(host.shape, host.stride(), strict=True))
        with _disable_current_modes():
            memory = torch.empty(max(size, 0), dtype=host.dtype, device="meta")
            if host.numel():
                meta = memory.as_strided(host.shape, host.stride(), host.storage_offset())
            else:
                meta = memory.new_empty(host.shape)
        return torch.Tensor._make_subclass(cls, meta, host.requires_grad, device_for_backend_keys=DEVICE)

    def __init__(self, host):
        self.host = host.detach()

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def to(self, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        stays = device is None or device.type == "cuda"
        if stays and dtype in (None, self.dtype) and memory_format is None and not copy:
            return self
        if stays:
            return torch.ops.aten._to_copy(self, dtype=dtype or self.dtype, memory_format=memory_format)
        return super().to(device, dtype or self.dtype, non_blocking=non_blocking, copy=copy)

    def cuda(self, *args, **kwargs):
        return self

    def __getitem__(self, index):  # C++ would put the indices of a list on the meta device
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} must run in a PretendGPU block")

    def __repr__(self):
        return f"OnGPU({self.host})"


def on_gpu(x):
    """Tensors, in any nested structure, moved to the pretended GPU."""
    return tree_map(lambda t: OnGPU(t) if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU) else t, x)


def _index(index):
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
    return parts if isinstance(index, tuple) else parts[0]


# Operations whose result has a size that depends on values, or that read a value.
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_consecutive, aten._unique2, aten.unique_dim),
    *(aten.bincount, aten.equal, aten.is_nonzero, aten.repeat_interleave, aten._unique),
}
# Operations that accept indices on the CPU, which they copy to the device.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten._unsafe_index_put}
# Operations that accept tensors of both devices.
MOVING = {aten._to_copy, aten.copy_, aten.copy}


def _place(folders=("/vlmkernels/", "/transformers/")):
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for folder in folders:
            if folder in name and "/tests/" not in name:
                return f"{name[name.rindex(folder) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "test"


def _is_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")  # for C++, our tensors are on the latter


class PretendGPU(TorchDispatchMode):
    """See the module.

    Attributes:
        waits: how often the host would wait, by (operation, place in the code).
        operations: the number of operations on the device.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.operations = Counter(), 0

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes parameters of another class
        self._patched = torch.cuda._lazy_init, torch.tensor
        torch.cuda._lazy_init, torch.tensor = lambda: None, self._tensor
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        torch.cuda._lazy_init, torch.tensor = self._patched
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        return super().__exit__(*error)

    def clear(self):
        self.waits.clear()
        self.operations = 0

    def _wait(self, what):
        self.waits[what, _place()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        requested = kwargs.get("device")
        if packet in (aten._pin_memory, aten.pin_memory):
            return args[0]
        if not ours and not _is_gpu(requested):
            return func(*args, **kwargs)
        self.operations += 1
        if packet in MOVING:
            self._note_move(packet, args, kwargs, requested)
        elif ours:
            self._check(func, args, kwargs, tensors, ours)
        if requested is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        inner_args, inner_kwargs = tree_map(lambda t: t.host if isinstance(t, OnGPU) else t, (args, kwargs))
        with _disable_current_modes():
            result = self.run(func, inner_args, inner_kwargs)
        to_gpu = _is_gpu(requested) if requested is not None else bool(ours)
        if packet in (aten.copy_, aten.copy):
            to_gpu = isinstance(args[0], OnGPU)
        if packet is aten._local_scalar_dense:
            return result
        if to_gpu:
            result = tree_map(lambda t: OnGPU(t) if isinstance(t, torch.Tensor) else t, result)
        if not to_gpu:
            return args[0] if packet is aten.copy_ else result
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _tensor(self, data, *, device=None, **options):
        if isinstance(data, (list, tuple)):
            data = tree_map(lambda x: x.item() if isinstance(x, OnGPU) else x, data)
        made = self._patched[1](data, **options)
        return made.to(device) if device is not None else made

    def run(self, func, args, kwargs):
        if func is aten.histc.default and not args[0].is_floating_point():
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _note_move(self, packet, args, kwargs, requested):
        if packet is aten._to_copy:
            source, target = (
                isinstance(args[0], OnGPU),
                _is_gpu(requested) if requested is not None else isinstance(args[0], OnGPU),
            )
            waits = not kwargs.get("non_blocking", False)
        else:
            source, target = isinstance(args[1], OnGPU), isinstance(args[0], OnGPU)
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source != target and (waits or source):  # memory that is not pinned is read at once
            self._wait("to the device" if target else "to the host")

    def _check(self, func, args, kwargs, tensors, ours):
        packet = func.overloadpacket
        others = [x for x in tensors if not isinstance(x, OnGPU)]
        if packet in WAITING and kwargs.get("output_size") is None:
            self._wait(packet.__name__)
        if packet in INDEXING:
            if not isinstance(args[0], OnGPU):
                raise RuntimeError(f"indices should be on the CPU in {func}, {_place()}")
            # The value of one number in place of a mask is that of masked_fill.
            is_fill = len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1
            for index in args[1]:
                if is_fill and index.dtype == torch.bool:
                    continue
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._wait("indexing with a mask")
                elif index is not None and not isinstance(index, OnGPU):
                    self._wait("indices to the device")
            others = [x for x in args[2:3] if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)]
        if any(x.dim() for x in others):
            raise RuntimeError(f"Expected all tensors to be on the same device in {func}, {_place()}")


def _tree_attention(query, key, value, layout, *, window=None, scale=None):
    """``tree_attention``, whose backends for GPUs cannot run here."""
    if not isinstance(query, OnGPU):
        return tree_attention(query, key, value, layout, window=window, scale=scale)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask = on_gpu(layout.mask(window))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@contextmanager
def pretended_gpu():
    """A ``PretendGPU`` block in which the decoder and the trainer run as on a GPU.

    Decoding steps are captured, which raises an error if they wait, and then run eagerly.
    """
    mode = PretendGPU()

    def capture(function):
        def replay():
            before = mode.waits.copy()
            function()
            if waits := mode.waits - before:
                raise AssertionError(f"operation not permitted when stream is capturing: {next(iter(waits))}")

        return replay, None

    def graphs(model, device):
        return StepGraphs(capture) if device.type == "cuda" else None

    with ExitStack() as stack:
        replace = lambda *args: stack.enter_context(patch.object(*args))  # noqa: E731
        replace(TrainingArguments, "device", property(lambda self: (self._setup_devices, DEVICE)[1]))
        replace(Accelerator, "device", property(lambda self: DEVICE))
        replace(phases, "_CudaClock", phases._Clock)
        replace(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        replace(attention, "tree_attention", _tree_attention)
        replace(decoder, "step_graphs", graphs)
        yield stack.enter_context(mode)
