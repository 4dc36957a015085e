"""Deterministic mode: log-probabilities that do not depend on the batch, bit for bit.

A library chooses the kernel of a matrix product, and with it the order of sums, by the number of rows, and attention kernels
split keys by the size of the batch. So the log-probability of a token depends, within rounding, on how many sequences run with
it, on padding and on packing. In the mode, every operation whose result for a row can depend on other rows runs in pieces of
fixed sizes. ``Deterministic`` sees the operations of PyTorch below autograd (``TorchDispatchMode``), so that it needs no code
per model, and leaves backward passes as they are.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmkernels.models.attention import VARLEN, use_tree_attention
from vlmkernels.models.families import prefix_sharing_unsupported, recurrent_layers
from vlmkernels.models.hooks import remove_hooks
from vlmkernels.models.positions import prompt_positions
from vlmkernels.ops.fixed_matmul import fixed_matmul, fixed_rows, is_fixed

aten = torch.ops.aten
PIECE = 2**15  # elements of a tensor that one thread computes, in vectors: PyTorch does not split smaller ones
VECTORS = 64  # elements; a multiple of all sizes of vectors


def use_deterministic(model: PreTrainedModel) -> PreTrainedModel:
    """Let the forward passes of ``model`` compute hidden states and log-probabilities that do not depend on the batch.

    For the same tokens, images and weights, ``completion_logps`` returns the same bits for any number of sequences, padding,
    packing and division into micro-batches, and a decoding step for any number of slots: on the same device, with the same
    number of threads, dtype and versions. Gradients are not covered. docs/mismatch.md says what it costs.

    Changes ``model`` in place: it calls ``use_tree_attention`` and adds hooks. ``undo_deterministic`` removes the hooks.

    Args:
        model: a transformers model without adapters around it.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: see ``deterministic_unsupported``.
    """
    if reason := deterministic_unsupported(model):
        raise NotImplementedError(f"model must support the deterministic mode: {reason}")
    if not is_deterministic(model):
        use_tree_attention(model)
        model.register_forward_pre_hook(_add_positions, with_kwargs=True)
        for module in _scopes(model):
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)
    return model


def undo_deterministic(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the hooks of ``use_deterministic`` from ``model``, in place, and return it."""
    remove_hooks(model, [_enter, _leave, _add_positions])
    return model


def is_deterministic(model: PreTrainedModel) -> bool:
    """Return whether ``use_deterministic`` was called on ``model``."""
    return _enter in model._forward_pre_hooks.values()


def _scopes(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules that run in the mode: the model, and the parts of layers that gradient checkpointing runs again."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return [model, *(part for layer in layers for part in layer.children())]


_stack = threading.local()  # .modes: for each module that is running the mode that it entered, or None if it was active


def _enter(module: torch.nn.Module, args: tuple) -> None:
    vars(_stack).setdefault("modes", []).append(None if is_fixed() else Deterministic().__enter__())


def _leave(module: torch.nn.Module, args: tuple, output: Any) -> None:
    if (mode := _stack.modes.pop()) is not None:
        mode.__exit__(None, None, None)


def deterministic_unsupported(model: PreTrainedModel) -> str | None:
    """Return why ``use_deterministic`` does not support ``model``, or None if it does."""
    name, config = type(model).__name__, model.config.get_text_config()
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "it must not be compiled"
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        return f"{name} is quantized, and its products do not have fixed sizes"
    if layers := recurrent_layers(config):
        return f"{name} has recurrent layers ({', '.join(sorted(layers))}), whose chunks depend on the pack"
    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "model_type", None) == "pixtral" and vision._attn_implementation != VARLEN:
        return f"{name} runs all images as one masked sequence (use_varlen_vision changes that, with transformers >= 5.20)"
    return prefix_sharing_unsupported(model)


def _add_positions(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Add position ids that do not count padding, where the model would count it: rotary embeddings round differently then."""
    mask, is_pack = kwargs.get("attention_mask"), kwargs.get("tree_layout") is not None or kwargs.get("tree_cache") is not None
    if is_pack or mask is None or mask.dim() != 2 or kwargs.get("position_ids") is not None:
        return None
    if hasattr(model.base_model, "get_rope_index"):
        return None
    return args, kwargs | {"position_ids": prompt_positions(model, {"attention_mask": mask})}


class Deterministic(TorchDispatchMode):
    """A ``with`` block in which PyTorch computes rows in pieces of fixed sizes; see ``use_deterministic``.

    Raises:
        NotImplementedError: an operation in the block mixes rows, or has sizes that depend on the batch, and has no
            deterministic implementation here.
    """

    def __enter__(self) -> "Deterministic":
        self._fixed = fixed_rows()
        self._fixed.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fixed.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.linear.default, aten.matmul.default):  # within torch.inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        packet = func.overloadpacket
        if packet in REFUSED:
            raise NotImplementedError(
                f"the deterministic mode must run without {func}, which has no implementation of fixed sizes"
            )
        replacement = REPLACED.get(func)
        if replacement is not None:
            return replacement(*args, **kwargs)
        if packet in ELEMENTWISE:
            return _elementwise(func, *args, **kwargs)
        return func(*args, **kwargs)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return fixed_matmul(a, b)


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if beta != 1 or alpha != 1 or bias.dim() != 1:
        return bias * beta + fixed_matmul(a, b) * alpha
    return fixed_matmul(a, b, bias=bias.expand(b.shape[1]).contiguous())


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[2] == 1:  # a product of rotary embeddings, without sums
        return a * b
    return torch.stack([fixed_matmul(x, y) for x, y in zip(a, b, strict=True)])


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The products of the experts: rows up to offs[e] of ``a`` (T, K) with b[e] (K, N)."""
    if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None:
        raise NotImplementedError(
            f"_grouped_mm must multiply (T, K) by (E, K, N) in the deterministic mode, got {tuple(a.shape)} by {tuple(b.shape)}"
        )
    ends = offs.tolist()
    parts = [fixed_matmul(a[s:e], w, out_dtype=out_dtype) for s, e, w in zip([0, *ends], ends, b, strict=False)]
    rest = a.new_zeros(len(a) - ends[-1], b.shape[2], dtype=parts[0].dtype)
    return torch.cat([*parts, rest])


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, *rest: Any
) -> torch.Tensor:
    """Patch embeddings as products; other convolutions sample by sample."""
    dilation, transposed, _, groups = rest
    sizes = weight.shape[2:]
    if tuple(stride) == tuple(sizes) and not any(padding) and all(d == 1 for d in dilation) and not transposed and groups == 1:
        patches = x
        for axis, size in enumerate(sizes, 2):
            patches = patches.unfold(axis, size, size)  # (n, C, h, w, ..., size)
        places = patches.shape[2 : x.dim()]
        rows = patches.movedim(1, x.dim() - 1).flatten(x.dim() - 1).flatten(0, -2)
        out = fixed_matmul(rows, weight.flatten(1).t(), bias=bias)
        return out.unflatten(0, (len(x), *places)).movedim(-1, 1)
    parts = [aten.convolution.default(sample, weight, bias, stride, padding, *rest) for sample in x.split(1)]
    return torch.cat(parts)


def _elementwise(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Apply a function in pieces of whole vectors: the last elements of a piece would run in a scalar version of the function.

    PyTorch splits large tensors among threads at any element, except those of ``PIECE`` elements for each thread.
    """
    if x.device.type != "cpu" or not x.is_contiguous() or (x.numel() % VECTORS == 0 and torch.get_num_threads() == 1):
        return _strided(func, x, *args, **kwargs)
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % VECTORS))
    size = PIECE * torch.get_num_threads()
    whole = len(flat) // size * size
    parts = [*flat[:whole].split(size), *flat[whole:].split(PIECE)]
    out = torch.cat([func(part, *args, **kwargs) for part in parts if len(part)]) if len(flat) else func(flat, *args, **kwargs)
    return out[: x.numel()].view(x.shape)


def _strided(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if x.device.type == "cpu" and not x.is_contiguous():
        return _elementwise(func, x.contiguous(), *args, **kwargs)
    result: torch.Tensor = func(x, *args, **kwargs)
    return result


REPLACED: dict[Any, Callable[..., torch.Tensor]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten._grouped_mm.default: _grouped_mm,
    aten.convolution.default: _convolution,
}
# Functions of one tensor whose scalar and vectorized versions can differ in the last bit.
ELEMENTWISE = {
    getattr(aten, name)
    for name in ("silu", "gelu", "sigmoid", "tanh", "softplus", "rsqrt", "exp", "cos", "sin", "log", "mish", "elu")
}
REFUSED = {getattr(aten, name) for name in ("baddbmm", "addbmm", "cudnn_convolution")}
