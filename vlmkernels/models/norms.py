"""The RMS norms of transformers models as one kernel on a GPU."""

from types import MethodType

import torch
from torch.nn.functional import rms_norm

_EPS = ("variance_epsilon", "eps")  # the names of epsilon in the classes of transformers


def use_fused_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Compute the RMS norms of ``model`` with ``torch.nn.functional.rms_norm`` where tensors are on a GPU.

    There one kernel replaces 6 to 8, and in 16 bits it rounds once, at the end, so that results are closer to fp64. In the
    norms of Gemma and Qwen3.5, whose weight is an offset from 1, 5 replace 8. On other devices, where ``rms_norm`` is not one
    kernel, nothing changes.

    Changes ``model`` in place: the ``forward`` of its norms. ``undo_fused_norms`` undoes it.

    Args:
        model: a transformers model, or a part of one. Modules that compute something else, and those whose ``forward`` has
            been replaced, stay as they are.

    Returns:
        ``model``.
    """
    replaced: dict[type, object] = {}
    for module in model.modules():
        kind = type(module)
        has_weight = isinstance(module._parameters.get("weight"), torch.nn.Parameter)  # Gemma 4 has norms without
        if not kind.__name__.endswith("RMSNorm") or "forward" in vars(module) or not has_weight:
            continue
        if kind not in replaced:
            replaced[kind] = next((f for f, offset in _FORWARDS.items() if _computes_rms_norm(kind, offset)), None)
        if replaced[kind] is not None:
            module.forward = MethodType(replaced[kind], module)  # type: ignore[arg-type]
    return model


def undo_fused_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``use_fused_norms`` in ``model``, in place, and return it."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in _FORWARDS:
            del module.forward
    return model


def _is_fused(norm: torch.nn.Module, x: torch.Tensor) -> bool:
    weight = norm.weight
    return x.is_cuda and x.dtype == weight.dtype and type(weight) in (torch.nn.Parameter, torch.Tensor)


def _epsilon(norm: torch.nn.Module) -> float:
    return next(float(value) for name in _EPS if isinstance(value := vars(norm).get(name), float))


def _weight_forward(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if _is_fused(self, hidden_states):
        # With autocast, rms_norm returns fp32.
        return rms_norm(hidden_states, self.weight.shape, self.weight, _epsilon(self)).type_as(hidden_states)
    out: torch.Tensor = type(self).forward(self, hidden_states)
    return out


def _offset_forward(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if _is_fused(self, hidden_states):
        weight = self.weight.float() + 1
        return rms_norm(hidden_states.float(), weight.shape, weight, _epsilon(self)).type_as(hidden_states)
    out: torch.Tensor = type(self).forward(self, hidden_states)
    return out


_FORWARDS = {_weight_forward: 0, _offset_forward: 1}  # -> what is added to the weight
for _function in _FORWARDS:
    _function.__name__ = "forward"  # pickle finds the forward of the class by this name


def _computes_rms_norm(kind: type, offset: int) -> bool:
    """Whether modules of a class of norms, built from (width, eps), compute ``rms_norm`` with their weight plus ``offset``."""
    x, weight = torch.linspace(-1, 2, 24, device="cpu").view(3, 8), torch.linspace(0.5, 2, 8, device="cpu")
    try:
        with torch.device("cpu"), torch.no_grad():
            norm = kind(8, eps=0.1)
            norm.weight.copy_(weight)
            return _epsilon(norm) == 0.1 and torch.allclose(norm(x).double(), rms_norm(x, (8,), weight + offset, 0.1).double())
    except (TypeError, AttributeError, RuntimeError, StopIteration):
        return False
