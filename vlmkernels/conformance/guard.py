"""Calls of an adapter's methods, with checks of what they return and that they leave their arguments alone."""

from collections.abc import Iterator
from typing import Any

import torch

from vlmkernels.conformance.adapter import METHODS, Adapter, Sampled


class AdapterError(Exception):
    """A method of an adapter returned something that its docstring does not allow, or changed its arguments."""


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value: a tensor, a dataclass, or a container."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors(vars(value))


class Guarded:
    """An adapter whose methods raise ``AdapterError`` if they break their contract with the suite."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.adapter, name)
        if name not in METHODS:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*tensors((args, kwargs))]
            before = [x.detach().clone() for x in given]
            out = value(*args, **kwargs)
            changed = [
                (x, copy)
                for x, copy in zip(given, before, strict=True)
                if not torch.equal(x.detach().nan_to_num(), copy.nan_to_num())
            ]
            for x, copy in changed:
                x.detach().copy_(copy)  # for the reproduction, which prints the arguments, and for later cases
            if changed:
                raise AdapterError(f"{name} changed one of its arguments, a tensor of shape {tuple(changed[0][0].shape)}")
            problem = RETURNS[name](out, *args, **kwargs)
            if problem:
                raise AdapterError(f"{name} {problem}")
            return out

        return call


def _tensor(out: Any, shape: tuple[int, ...], floating: bool = True) -> str | None:
    if not isinstance(out, torch.Tensor):
        return f"must return a tensor, returned {type(out).__name__}"
    if tuple(out.shape) != shape:
        return f"must return a tensor of shape {shape}, returned {tuple(out.shape)}"
    if floating and not out.is_floating_point():
        return f"must return a floating-point tensor, returned {out.dtype}"
    return None


def _differentiable(out: torch.Tensor, *by: torch.Tensor) -> str | None:
    if any(x.requires_grad for x in by) and not out.requires_grad:
        return "must return a tensor with gradients, returned one without"
    return None


def _advantages(out, batch):
    return _tensor(out, (len(batch.rewards),))


def _loss(out, batch, config):
    return _tensor(out, ()) or _differentiable(out, batch.logps)


def _logps_from_logits(out, logits, targets, temperature):
    return _tensor(out, tuple(targets.shape)) or _differentiable(out, logits)


def _logps_from_hidden(out, hidden, weight, targets, temperature):
    return _tensor(out, tuple(targets.shape)) or _differentiable(out, hidden, weight)


def _logps(out, model, processor, samples, temperature):
    if not isinstance(out, list | tuple) or len(out) != len(samples):
        return f"must return a list of {len(samples)} tensors, one for each sample, returned {_size(out)}"
    for index, (each, sample) in enumerate(zip(out, samples, strict=True)):
        problem = _tensor(each, (len(sample.completion_ids),))
        if problem:
            return f"{problem} for sample {index}"
    return None


def _split(out, inputs, num_images, num_chunks):
    if not isinstance(out, list | tuple) or len(out) != num_chunks or not all(isinstance(each, dict) for each in out):
        return f"must return a list of {num_chunks} dicts, returned {_size(out)}"
    return None


def _positions(out, model, inputs):
    problem = None if isinstance(out, torch.Tensor) else f"must return a tensor, returned {type(out).__name__}"
    rows = tuple(inputs["input_ids"].shape)
    if problem is None and tuple(out.shape[-2:]) != rows:
        problem = f"must return a tensor whose last axes are {rows}, returned {tuple(out.shape)}"
    return problem


def _process(out, processor, samples):
    if not hasattr(out, "keys") or "input_ids" not in out.keys():  # noqa: SIM118  BatchFeature has keys(), and no `in` of dicts
        return f"must return a dict with input_ids, returned {_size(out)}"
    return None


def _sample(out, model, processor, samples, num_generations, max_tokens, temperature):
    expected = len(samples) * num_generations
    if not isinstance(out, list | tuple) or len(out) != expected or not all(isinstance(each, Sampled) for each in out):
        return f"must return a list of {expected} Sampled, returned {_size(out)}"
    return None


def _size(out: Any) -> str:
    return f"{type(out).__name__} of {len(out)}" if hasattr(out, "__len__") else type(out).__name__


RETURNS = {
    "advantages": _advantages,
    "loss": _loss,
    "logps_from_logits": _logps_from_logits,
    "logps_from_hidden": _logps_from_hidden,
    "logps": _logps,
    "split": _split,
    "positions": _positions,
    "process": _process,
    "sample": _sample,
}
