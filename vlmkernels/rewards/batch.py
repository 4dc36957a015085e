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
            rule = f"be as many as the references, {len(references)}"
            require(len(predictions) == len(references), "predictions", rule, len(predictions))
            pairs = zip(predictions, references, strict=True)
            chosen = [index for index, (p, r) in enumerate(pairs) if p is not None and r is not None]
            checked = [check_reference(reference, references[index], f"references[{index}]") for index in chosen]
            values = function([predictions[index] for index in chosen], checked, **options)
            values = values.tolist() if isinstance(values, torch.Tensor) else values
            scores: list[float | None] = [None] * len(predictions)
            for index, value in zip(chosen, values, strict=True):
                scores[index] = value
            return scores

        scored.reference = reference
        return scored

    return decorate


def check_reference(reference: Callable, value: object, name: str) -> object:
    """What ``reference`` makes of a value; its error begins with the name."""
    try:
        return reference(value)
    except TypeError as error:
        raise TypeError(f"{name} {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def third_party(module: str, user: str):
    """An optional package; ``user``: what needs it, named in the error where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {module.partition('.')[0]}: pip install 'vlmkernels[rewards]'") from error
