"""Score answers that are text, numbers or formulas against a reference."""

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from vlmkernels.rewards.answers import as_number, parse_choice, parse_yes_no
from vlmkernels.rewards.batch import pure, third_party

_DELIMITED = re.compile(r"\$|\\[(\[]|\\boxed")
_WORDS = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|log|ln|exp|a?(?:sin|cos|tan))\b)[A-Za-z]{2,}")


def _text(value: object) -> str:
    if isinstance(value, (list, tuple, dict)):
        raise TypeError(f"must be a string or number, got {type(value).__name__}")
    return str(value).strip()


def _texts(value: object) -> list[str]:
    """Return the accepted answers as a list. A reference is one answer or a list of answers."""
    texts = [_text(v) for v in value] if isinstance(value, (list, tuple)) else [_text(value)]
    if not texts:
        raise ValueError("must be a string or a list with at least one string, got []")
    return texts


def _number(value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = float(cast(float, value)) if is_number else as_number(_text(value))
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def _yes_no(value: object) -> str:
    answer = {True: "yes", False: "no"}[value] if isinstance(value, bool) else parse_yes_no(_text(value))
    if answer is None:
        raise ValueError(f"must be yes or no, got {value!r:.80}")
    return answer


def _choice(value: object) -> str:
    letter = parse_choice(_text(value))
    if letter is None:
        raise ValueError(f"must be an option letter, got {value!r:.80}")
    return letter


@pure(_texts)
def exact_match(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """1 if the prediction equals the reference, or one of several references, up to surrounding white space, else 0."""
    fold = str.casefold if ignore_case else str
    return [float(fold(p.strip()) in map(fold, r)) for p, r in zip(predictions, references, strict=True)]


@pure(_choice)
def choice(predictions: list[str], references: list[str]) -> list[float]:
    """1 if the option letter is correct, else 0. Predictions come from ``answers.parse_choice``."""
    return [float(p == r) for p, r in zip(predictions, references, strict=True)]


@pure(_yes_no)
def yes_no(predictions: list[str], references: list[str], *, balanced: bool = False) -> list[float]:
    """1 if "yes" or "no" is correct, else 0.

    Args:
        predictions: "yes" or "no".
        references: "yes", "no", or a bool.
        balanced: divide each score by twice the share of its reference among the references of the batch. If both answers
            occur, a model that always says "yes" then scores 0.5 on average, whatever the share of "yes". The factor is
            constant within a group, so it has no effect if advantages are divided by the standard deviation of their group.
    """
    counts = Counter(references)
    weight = {answer: len(references) / (2 * count) if balanced else 1.0 for answer, count in counts.items()}
    return [weight[r] * (p == r) for p, r in zip(predictions, references, strict=True)]


@pure(_number)
def numeric(predictions: list[float], references: list[float], *, abs_tol: float = 0.0, rel_tol: float = 1e-6) -> list[float]:
    """1 if ``|p - r| <= max(abs_tol, rel_tol |r|)``, else 0."""
    if abs_tol < 0:
        raise ValueError(f"abs_tol must be >= 0, got {abs_tol}")
    if rel_tol < 0:
        raise ValueError(f"rel_tol must be >= 0, got {rel_tol}")
    return [float(abs(p - r) <= max(abs_tol, rel_tol * abs(r))) for p, r in zip(predictions, references, strict=True)]


@pure(_number)
def count(predictions: list[float], references: list[float], *, soft: bool = False) -> list[float]:
    """1 if the count is correct, else 0; with ``soft``: ``max(0, 1 - |p - r| / max(r, 1))``."""
    if not soft:
        return [float(p == r) for p, r in zip(predictions, references, strict=True)]
    return [max(0.0, 1 - abs(p - r) / max(r, 1)) for p, r in zip(predictions, references, strict=True)]


@pure(_texts)
def relaxed_accuracy(predictions: list[str], references: list[list[str]], *, tolerance: float = 0.05) -> list[float]:
    """ChartQA's relaxed accuracy: 1 if a number is within ``tolerance``, or a text is equal up to case, else 0.

    "25%" is 0.25 and not 25, as in pix2struct and Qwen-VL. Their code compares a reference of 0 as text, so that "0.0" is
    wrong; this function compares the numbers.

    Args:
        predictions: texts.
        references: accepted answers of each sample.
        tolerance: maximum relative error, inclusive.

    Source: https://arxiv.org/abs/2203.10244, section 5.1.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")

    def right(prediction: str, reference: str) -> bool:
        try:
            p, r = as_number(prediction), as_number(reference)
        except ValueError:
            return prediction.strip().lower() == reference.lower()
        return abs(p - r) <= tolerance * abs(r)

    return [float(any(right(p, r) for r in several)) for p, several in zip(predictions, references, strict=True)]


@pure(_text)
def math_equal(predictions: list[str], references: list[str]) -> list[float]:
    """1 if the prediction is mathematically equal to the reference, else 0: "1/2", ``\\frac{1}{2}`` and "0.5" are equal.

    Uses math-verify. A reference that cannot be parsed is compared as text. In the main thread, parsing and comparing are
    limited to 5 seconds each; in other threads there is no limit, because math-verify enforces it with a signal.

    Source: https://github.com/huggingface/Math-Verify
    """
    math_verify = third_party("math_verify", "math_equal")
    seconds = 5 if threading.current_thread() is threading.main_thread() else None

    def parse(text: str) -> list[Any]:
        # Without $...$, math-verify reads only the first number of a formula. In running text it finds the formula itself.
        formula = not _DELIMITED.search(text) and not _WORDS.search(text)
        found: list[Any] = math_verify.parse(f"${text}$" if formula else text, parsing_timeout=seconds)
        return found

    scores: list[float] = []
    parsed: dict[str, list[Any]] = {}
    for p, r in zip(predictions, references, strict=True):
        gold = parsed[r] = parsed[r] if r in parsed else parse(r)
        equal = p.strip() == r or (bool(gold) and math_verify.verify(gold, parse(p), timeout_seconds=seconds))
        scores.append(float(equal))
    return scores


def _distances(predictions: list[str], references: list[list[str]], name: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Compute the edit distance of each prediction to each of its references.

    Returns:
        Distances, predictions and references, with one entry per pair of prediction and reference.
    """
    process, distance = third_party("rapidfuzz.process", name), third_party("rapidfuzz.distance", name)
    repeated = [p for p, several in zip(predictions, references, strict=True) for _ in several]
    flat = [r for several in references for r in several]
    return process.cpdist(repeated, flat, scorer=distance.Levenshtein.distance, dtype="int32"), repeated, flat


def _best(scores: Iterable[float], references: list[list[str]]) -> list[float]:
    """Return the best score of each prediction over its references."""
    scores = iter(scores)
    return [max(next(scores) for _ in several) for several in references]


@pure(_texts)
def cer(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - min(1, CER)``, with the character error rate CER = edit distance / length of the reference.

    Uses rapidfuzz. Case-sensitive unless ``ignore_case``. Surrounding white space is ignored.
    """
    predictions, references = _folded(predictions, references, ignore_case)
    distances, _, flat = _distances(predictions, references, "cer")
    return _best([1 - min(1.0, d / max(len(r), 1)) for d, r in zip(distances.tolist(), flat, strict=True)], references)


@pure(_texts)
def edit_ratio(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - d / max(|p|, |r|)``, the normalized Levenshtein similarity; close to VLM-R1's OCR reward.

    Uses rapidfuzz. VLM-R1 uses ``ratio`` of python-Levenshtein, in which a substitution costs 2.
    """
    return _best(*_similarities(predictions, references, ignore_case, "edit_ratio"))


@pure(_texts)
def anls(predictions: list[str], references: list[list[str]], *, threshold: float = 0.5) -> list[float]:
    """ANLS, average normalized Levenshtein similarity: case-insensitive ``edit_ratio``, or 0 if it is below ``threshold``.

    A similarity of exactly ``threshold`` is kept, as in the published evaluation code; the paper sets it to 0.

    Source: https://arxiv.org/abs/1907.00490
    """
    scores, references = _similarities(predictions, references, True, "anls")
    return [score if score >= threshold else 0.0 for score in _best(scores, references)]


def _folded(predictions: list[str], references: list[list[str]], ignore_case: bool) -> tuple[list[str], list[list[str]]]:
    if not ignore_case:
        return [p.strip() for p in predictions], references
    return [p.strip().lower() for p in predictions], [[r.lower() for r in several] for several in references]


def _similarities(
    predictions: list[str], references: list[list[str]], ignore_case: bool, name: str
) -> tuple[list[float], list[list[str]]]:
    predictions, references = _folded(predictions, references, ignore_case)
    distances, repeated, flat = _distances(predictions, references, name)
    pairs = zip(distances.tolist(), repeated, flat, strict=True)
    return [1 - d / max(len(p), len(r), 1) for d, p, r in pairs], references
