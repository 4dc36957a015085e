"""What the pure functions share: a batch of predictions and references to a batch of scores.

A pure function takes N predictions and N references, parsed, and returns N floats. None among them says why there is no score:
a prediction is None where an answer could not be parsed, a reference where a sample has none (a mixture of tasks), and the
score of either is None. What such an answer is worth is for the caller to say, not for the formula; see ``builtin``.
"""

import functools
import importlib
from collections.abc import Callable, Sequence

import torch

from vlmkernels.ops.checks import require


class Unparsed(float):
    """The reward of an answer that could not be parsed; NaN where such an answer is not scored."""


def pure(reference: Callable) -> Callable:
    """Decorator of a function of parsed predictions and references, neither None, that returns as many scores.

    ``reference`` turns each reference into what the function takes, and raises ValueError or TypeError for a wrong one, which
    is raised again with its index.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def scored(predictions: Sequence, references: Sequence, **options) -> list[float | None]:
            require(
                len(predictions) == len(references),
                "predictions",
                f"be as many as the references, {len(references)}",
                len(predictions),
            )
            chosen = [
                i for i, (p, r) in enumerate(zip(predictions, references, strict=True)) if p is not None and r is not None
            ]
            scores: list[float | None] = [None] * len(predictions)
            checked = [check_reference(reference, references[i], i) for i in chosen]
            values = function([predictions[i] for i in chosen], checked, **options)
            values = values.tolist() if isinstance(values, torch.Tensor) else values
            for index, value in zip(chosen, values, strict=True):
                scores[index] = value
            return scores

        return scored

    return decorate


def check_reference(reference: Callable, value: object, index: int) -> object:
    """What ``reference`` makes of a value; its error names the index."""
    try:
        return reference(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"references[{index}] {error}") from error


def third_party(module: str, user: str):
    """An optional package; ``user``: what needs it, named in the error where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {module.partition('.')[0]}: pip install 'vlmkernels[rewards]'") from error
