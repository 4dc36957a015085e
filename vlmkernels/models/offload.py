"""Activations in host memory between the forward and the backward pass.

``torch.autograd.graph.save_on_cpu`` also copies what autograd saves of the weights, which stay on the device anyway, and copies
a tensor once for each operation that saves it.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from vlmkernels.models.hooks import remove_hooks

MIN_BYTES = 2**16  # smaller copies take longer to launch than to run
_VIEWS = ("TBackward0", "ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0", "TransposeBackward0", "PermuteBackward0")


class _OnHost(NamedTuple):
    """A tensor in host memory, and the device that it came from."""

    copy: torch.Tensor
    device: torch.device


def is_moved(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a device with memory of its own, and large enough to be worth a copy."""
    return tensor.device.type != "cpu" and tensor.untyped_storage().nbytes() >= MIN_BYTES


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _is_weight(tensor: torch.Tensor) -> bool:
    """Return whether a saved tensor is a trained parameter, a view of one, or its copy in another dtype."""
    node = tensor.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return hasattr(node, "variable") if node is not None else tensor.is_leaf and tensor.requires_grad


class HostActivations(saved_tensors_hooks):
    """A ``with`` block in which autograd saves activations in pinned host memory. Gradients stay the same, bit for bit.

    Not moved: parameters and trained parameters that autocast has converted, and tensors for which ``is_moved`` is False, such
    as all on the CPU. A tensor that several operations save is copied once. The copies run in the stream of the computation.

    Args:
        model: its parameters are not moved.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        copies: dict[tuple[Any, ...], tuple[StorageWeakRef, _OnHost]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor | _OnHost:
            storage = tensor.untyped_storage()
            if not is_moved(tensor) or storage.data_ptr() in kept or _is_weight(tensor):
                return tensor
            # The weak reference keeps the address of the storage from being used again, but not its memory.
            reference = StorageWeakRef(storage)
            key = reference.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
            if key not in copies:
                copies[key] = reference, _OnHost(_to_host(tensor), tensor.device)
            return copies[key][1]

        def unpack(saved: torch.Tensor | _OnHost) -> torch.Tensor:
            return saved.copy.to(saved.device, non_blocking=True) if isinstance(saved, _OnHost) else saved

        self._copies = copies
        super().__init__(pack, unpack)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.clear()  # the graph holds those that it needs


def use_activation_offloading(model: PreTrainedModel) -> PreTrainedModel:
    """Let forward passes of ``model`` with gradients save their activations with ``HostActivations``.

    This covers the vision tower and the layers, but not the language-model head, whose backward pass follows at once. With
    gradient checkpointing, it moves the inputs of the layers.

    Changes ``model`` in place: it adds hooks. ``undo_activation_offloading`` removes them.

    Args:
        model: a transformers model without adapters around it.

    Returns:
        ``model``.
    """
    base = model.base_model
    if _enter not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_enter)
        base.register_forward_hook(_leave, always_call=True)
    return model


def undo_activation_offloading(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the hooks of ``use_activation_offloading`` from ``model``, in place, and return it."""
    remove_hooks(model, [_enter, _leave])
    return model


def _enter(module: torch.nn.Module, args: tuple) -> None:
    if torch.is_grad_enabled():
        module.host_activations = HostActivations(module)
        module.host_activations.__enter__()


def _leave(module: torch.nn.Module, args: tuple, output: Any) -> None:
    if "host_activations" in vars(module):
        vars(module).pop("host_activations").__exit__(None, None, None)
