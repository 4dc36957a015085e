"""Score the length of a completion in tokens, and repeated tokens in it."""

import math
from collections.abc import Sequence


def cosine_length(
    lengths: Sequence[int],
    correct: Sequence[bool | None],
    *,
    max_length: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> list[float | None]:
    """Interpolate rewards along half a cosine wave from length 0 to ``max_length``, for correct and for wrong answers.

    With the default values, short correct answers score higher than long ones, and long wrong answers higher than short ones.

    Args:
        lengths: number of tokens of each completion.
        correct: whether each completion is correct; None = not scored.
        max_length: length at which the wave ends, > 0.
        right: rewards of a correct answer at length 0 and at ``max_length``.
        wrong: rewards of a wrong answer at length 0 and at ``max_length``.
        exceeded: reward of a completion with ``max_length`` or more tokens, correct or not.

    Source: https://arxiv.org/abs/2502.03373, with right=(2, 1), wrong=(-10, 0), exceeded=-10; the defaults are open-r1's.
    """
    if max_length <= 0:
        raise ValueError(f"max_length must be > 0, got {max_length}")

    def score(length: int, good: bool) -> float:
        if length >= max_length:
            return exceeded
        start, end = right if good else wrong
        return end + (start - end) * (1 + math.cos(math.pi * length / max_length)) / 2

    return [None if good is None else score(n, good) for n, good in zip(lengths, correct, strict=True)]


def soft_overlong(lengths: Sequence[int], *, max_length: int, cache: int) -> list[float]:
    """DAPO's length penalty: 0 up to ``max_length - cache`` tokens, then linear to -1 at ``max_length``, and -1 beyond.

    Args:
        lengths: number of tokens of each completion.
        max_length: length from which the penalty is -1.
        cache: number of tokens before ``max_length`` over which the penalty falls, in (0, max_length].

    Source: https://arxiv.org/abs/2503.14476, equation 13
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache must be in (0, max_length = {max_length}], got {cache}")
    return [-min(1.0, max(0.0, (n - (max_length - cache)) / cache)) for n in lengths]


def repetition(ids: Sequence[Sequence[int]], *, ngram: int = 3, max_penalty: float = -1.0) -> list[float]:
    """``max_penalty * (1 - distinct n-grams / n-grams)`` over the tokens of a completion; 0 if it has no n-gram.

    Args:
        ids: token ids of each completion.
        ngram: n, >= 1.
        max_penalty: penalty that a completion approaches when it only repeats itself, <= 0.

    Source: https://arxiv.org/abs/2502.03373, appendix C.2
    """
    if ngram < 1:
        raise ValueError(f"ngram must be >= 1, got {ngram}")
    if max_penalty > 0:
        raise ValueError(f"max_penalty must be <= 0, got {max_penalty}")

    def score(tokens: Sequence[int]) -> float:
        total = len(tokens) - ngram + 1
        distinct = len(set(zip(*(tokens[i:] for i in range(ngram)), strict=False)))
        return max_penalty * (1 - distinct / total) if total > 0 else 0.0

    return [score(tokens) for tokens in ids]
