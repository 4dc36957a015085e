"""Shared code of the scoring functions, which turn a batch of predictions and references into a batch of scores.

A scoring function takes N parsed predictions and N references, and returns N floats. A prediction of None means that no answer
could be parsed; a reference of None means that the sample has no reference, as in a mixture of tasks. In both cases the score
is None. The caller decides which reward an unparsed answer gets; see ``builtin``.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol, cast

import torch


class Unparsed(float):
    """The reward of an answer that could not be parsed. NaN means that such answers are not scored."""


class ScoringFunction(Protocol):
    """A function decorated with ``pure``.

    Attributes:
        reference: parses a reference, and raises ValueError or TypeError for a value that is not one.
    """

    reference: Callable[[object], object]

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> list[float | None]: ...


def pure(reference: Callable[[object], object]) -> Callable[[Callable[..., Any]], ScoringFunction]:
    """Decorate a scoring function so that it receives only pairs in which neither prediction nor reference is None.

    Args:
        reference: parses a reference for the function. If it raises ValueError or TypeError, the index of the reference is
            added to the message.
    """

    def decorate(function: Callable[..., Any]) -> ScoringFunction:
        @functools.wraps(function)
        def scored(predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> list[float | None]:
            if len(predictions) != len(references):
                raise ValueError(f"predictions must have one entry per reference, {len(references)}, got {len(predictions)}")
            pairs = zip(predictions, references, strict=True)
            chosen = [index for index, (p, r) in enumerate(pairs) if p is not None and r is not None]
            parsed = [check_reference(reference, references[index], f"references[{index}]") for index in chosen]
            values = function([predictions[index] for index in chosen], parsed, **options)
            values = values.tolist() if isinstance(values, torch.Tensor) else values
            scores: list[float | None] = [None] * len(predictions)
            for index, value in zip(chosen, values, strict=True):
                scores[index] = value
            return scores

        scored.reference = reference  # type: ignore[attr-defined]
        return cast(ScoringFunction, scored)

    return decorate


def check_reference(reference: Callable[[object], object], value: object, name: str) -> object:
    """Return ``reference(value)``. If it raises ValueError or TypeError, ``name`` is put in front of the message."""
    try:
        return reference(value)
    except TypeError as error:
        raise TypeError(f"{name} {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def third_party(module: str, user: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        user: name of the feature that needs the module, for the ImportError.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {module.partition('.')[0]}: pip install 'vlmkernels[rewards]'") from error
