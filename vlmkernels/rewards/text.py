"""Scores of answers that are words, numbers or formulas, against the column that holds the right one."""

import math
import re
import threading
from collections import Counter

from vlmkernels.ops.checks import require
from vlmkernels.rewards.answers import as_number, parse_choice, parse_yes_no
from vlmkernels.rewards.batch import pure, third_party

_DELIMITED = re.compile(r"\$|\\[(\[]|\\boxed")
_WORDS = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|log|ln|exp|a?(?:sin|cos|tan))\b)[A-Za-z]{2,}")


def _text(value: object) -> str:
    if isinstance(value, (list, tuple, dict)):
        raise TypeError(f"must be a text or number, got {type(value).__name__}")
    return str(value).strip()


def _texts(value: object) -> list[str]:
    """One or several right answers."""
    texts = [_text(v) for v in value] if isinstance(value, (list, tuple)) else [_text(value)]
    if not texts:
        raise ValueError("must be a text or a list of at least one, got []")
    return texts


def _number(value: object) -> float:
    number = float(value) if type(value) in (int, float) else as_number(_text(value))
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
        raise ValueError(f"must be an option's letter, got {value!r:.80}")
    return letter


@pure(_texts)
def exact_match(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """1 where the prediction is the reference (or one of several), surrounding white space aside, else 0."""
    fold = str.casefold if ignore_case else str
    return [float(fold(p.strip()) in map(fold, r)) for p, r in zip(predictions, references, strict=True)]


@pure(_choice)
def choice(predictions: list[str], references: list[str]) -> list[float]:
    """1 where the option's letter is the right one. Predictions: of ``answers.parse_choice``."""
    return [float(p == r) for p, r in zip(predictions, references, strict=True)]


@pure(_yes_no)
def yes_no(predictions: list[str], references: list[str], *, balanced: bool = False) -> list[float]:
    """1 where "yes" or "no" is right. References: those, or bool.

    Args:
        balanced: divide by twice the share of the right answer among the references of the batch. Where both answers occur, who
            always says "yes" gets 0.5 on average, however many answers are "yes". A constant factor within a group: it takes
            effect where advantages are not divided by the group's standard deviation.
    """
    counts = Counter(references)
    weight = {answer: len(references) / (2 * count) if balanced else 1.0 for answer, count in counts.items()}
    return [weight[r] * (p == r) for p, r in zip(predictions, references, strict=True)]


@pure(_number)
def numeric(predictions: list[float], references: list[float], *, abs_tol: float = 0.0, rel_tol: float = 1e-6) -> list[float]:
    """1 where ``|p - r| <= max(abs_tol, rel_tol |r|)``, else 0."""
    require(abs_tol >= 0, "abs_tol", "be >= 0", abs_tol)
    require(rel_tol >= 0, "rel_tol", "be >= 0", rel_tol)
    return [float(abs(p - r) <= max(abs_tol, rel_tol * abs(r))) for p, r in zip(predictions, references, strict=True)]


@pure(_number)
def count(predictions: list[float], references: list[float], *, soft: bool = False) -> list[float]:
    """1 where the count is right, else 0, or with ``soft`` ``max(0, 1 - |p - r| / max(r, 1))``."""
    if not soft:
        return [float(p == r) for p, r in zip(predictions, references, strict=True)]
    return [max(0.0, 1 - abs(p - r) / max(r, 1)) for p, r in zip(predictions, references, strict=True)]


@pure(_texts)
def relaxed_accuracy(predictions: list[str], references: list[list[str]], *, tolerance: float = 0.05) -> list[float]:
    """ChartQA's: 1 where a number is within ``tolerance`` (relative, inclusive) of the right one, or a text equals it, case
    aside.

    A percentage is a hundredth, as in the common implementations (pix2struct, Qwen-VL): "25%" and "0.25" are equal, "25%" and
    "25" are not. Those compare with a right answer of 0 as texts, which "0.0" fails; here the numbers are compared.
    Source: https://arxiv.org/abs/2203.10244, section 5.1.
    """
    require(tolerance >= 0, "tolerance", "be >= 0", tolerance)

    def right(prediction: str, reference: str) -> bool:
        try:
            p, r = as_number(prediction), as_number(reference)
        except ValueError:
            return prediction.strip().lower() == reference.lower()
        return abs(p - r) <= tolerance * abs(r)

    return [float(any(right(p, r) for r in several)) for p, several in zip(predictions, references, strict=True)]


@pure(_text)
def math_equal(predictions: list[str], references: list[str]) -> list[float]:
    """1 where the prediction is mathematically equal to the reference, LaTeX or plain: "1/2", ``\\frac{1}{2}``, "0.5". By
    math-verify.

    A reference that does not parse is compared as text. Off the main thread there is no time-out, which needs a signal.
    Source: https://github.com/huggingface/Math-Verify
    """
    math_verify = third_party("math_verify", "math_equal")
    seconds = 5 if threading.current_thread() is threading.main_thread() else None

    def parse(text: str) -> list:
        # A bare formula is taken as LaTeX, or only its first number would be read; among words, math-verify finds it.
        formula = not _DELIMITED.search(text) and not _WORDS.search(text)
        return math_verify.parse(f"${text}$" if formula else text, parsing_timeout=seconds)

    scores, parsed = [], {}
    for p, r in zip(predictions, references, strict=True):
        gold = parsed[r] = parsed[r] if r in parsed else parse(r)
        equal = p.strip() == r or (bool(gold) and math_verify.verify(gold, parse(p), timeout_seconds=seconds))
        scores.append(float(equal))
    return scores


def _distances(predictions: list[str], references: list[list[str]], name: str):
    """Edit distances of each prediction to each of its references, one after the other; both texts; and how many of each."""
    process, distance = third_party("rapidfuzz.process", name), third_party("rapidfuzz.distance", name)
    repeated = [p for p, several in zip(predictions, references, strict=True) for _ in several]
    flat = [r for several in references for r in several]
    return process.cpdist(repeated, flat, scorer=distance.Levenshtein.distance, dtype="int32"), repeated, flat


def _best(scores: list[float], references: list[list[str]]) -> list[float]:
    """The best score of each prediction over its references."""
    scores = iter(scores)
    return [max(next(scores) for _ in several) for several in references]


@pure(_texts)
def cer(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - min(1, CER)``, the character error rate: the edit distance over the length of the reference. By rapidfuzz."""
    predictions, references = _folded(predictions, references, ignore_case)
    distances, _, flat = _distances(predictions, references, "cer")
    return _best([1 - min(1.0, d / max(len(r), 1)) for d, r in zip(distances.tolist(), flat, strict=True)], references)


@pure(_texts)
def edit_ratio(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - d / max(|p|, |r|)``, the normalised Levenshtein similarity; VLM-R1's OCR reward. By rapidfuzz.

    VLM-R1 takes python-Levenshtein's ``ratio``, in which a substitution costs 2.
    """
    return _best(*_similarities(predictions, references, ignore_case, "edit_ratio"))


@pure(_texts)
def anls(predictions: list[str], references: list[list[str]], *, threshold: float = 0.5) -> list[float]:
    """Average normalised Levenshtein similarity of a question: ``edit_ratio``, case aside, or 0 where it is below
    ``threshold``.

    Source: https://arxiv.org/abs/1907.00490. Its text says 0 from a distance of 0.5 on, the published evaluation keeps a
    similarity of exactly 0.5; so does this.
    """
    scores, references = _similarities(predictions, references, True, "anls")
    return [score if score >= threshold else 0.0 for score in _best(scores, references)]


def _folded(predictions: list[str], references: list[list[str]], ignore_case: bool) -> tuple[list[str], list[list[str]]]:
    if not ignore_case:
        return [p.strip() for p in predictions], references
    return [p.strip().lower() for p in predictions], [[r.lower() for r in several] for several in references]


def _similarities(predictions, references, ignore_case: bool, name: str) -> tuple[list[float], list[list[str]]]:
    predictions, references = _folded(predictions, references, ignore_case)
    distances, repeated, flat = _distances(predictions, references, name)
    pairs = zip(distances.tolist(), repeated, flat, strict=True)
    return [1 - d / max(len(p), len(r), 1) for d, p, r in pairs], references
