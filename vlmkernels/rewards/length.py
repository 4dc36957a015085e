"""Scores of a completion's length and of its repetitions, in tokens."""

import math
from collections.abc import Sequence

from vlmkernels.ops.checks import require


def cosine_length(
    lengths: Sequence[int],
    correct: Sequence[bool | None],
    *,
    max_length: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> list[float | None]:
    """A half cosine wave from one value at length 0 to another at ``max_length``: short right answers are worth more than long
    ones, and long wrong ones more than short ones. None where ``correct`` is.

    Args:
        lengths: tokens of each completion.
        correct: whether each is right.
        right, wrong: the values at length 0 and at max_length.
        exceeded: the value of a completion of max_length tokens or more.

    Source: https://arxiv.org/abs/2502.03373, with right=(2, 1), wrong=(-10, 0), exceeded=-10; the defaults are open-r1's.
    """
    require(max_length > 0, "max_length", "be > 0", max_length)

    def score(length: int, good: bool) -> float:
        if length >= max_length:
            return exceeded
        start, end = right if good else wrong
        return end + (start - end) * (1 + math.cos(math.pi * length / max_length)) / 2

    return [None if good is None else score(n, good) for n, good in zip(lengths, correct, strict=True)]


def soft_overlong(lengths: Sequence[int], *, max_length: int, cache: int) -> list[float]:
    """DAPO's penalty: 0 up to ``max_length - cache`` tokens, then falling linearly to -1 at ``max_length``, -1 beyond.

    Source: https://arxiv.org/abs/2503.14476, equation 13
    """
    require(0 < cache <= max_length, "cache", f"be in (0, max_length = {max_length}]", cache)
    return [-min(1.0, max(0.0, (n - (max_length - cache)) / cache)) for n in lengths]


def repetition(ids: Sequence[Sequence[int]], *, ngram: int = 3, max_penalty: float = -1.0) -> list[float]:
    """``max_penalty * (1 - distinct n-grams / n-grams)`` of a completion's tokens, 0 where it has none.

    Source: https://arxiv.org/abs/2502.03373, appendix C.2
    """
    require(ngram >= 1, "ngram", "be >= 1", ngram)
    require(max_penalty <= 0, "max_penalty", "be <= 0", max_penalty)

    def score(tokens: Sequence[int]) -> float:
        total = len(tokens) - ngram + 1
        distinct = len(set(zip(*(tokens[i:] for i in range(ngram)), strict=False)))
        return max_penalty * (1 - distinct / total) if total > 0 else 0.0

    return [score(tokens) for tokens in ids]
