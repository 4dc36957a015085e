"""Score answers that are text, numbers or formulas against a reference."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import numpy as np

from vlmkernels.rewards.answers import (
    Percent,
    as_number,
    parse_choice,
    parse_count,
    parse_formula,
    parse_number,
    parse_yes_no,
    plain,
)  # fmt: skip
from vlmkernels.rewards.answers.conclusion import conclusion
from vlmkernels.rewards.batch import Unparsed, pure, third_party
from vlmkernels.rewards.formula_equality import compare

_TOWER = re.compile(r"(\d{1,300})\s*\^\s*[{(]*\s*(\d{1,300})\s*\^\s*[{(]*\s*(\d{1,9})")
_HUGE = re.compile(r"\d\s*\^\s*[{(]*\s*-?\d{7,}|\d{6,}\s*!|!\s*[)}]*\s*!|\^\s*[{(]*\s*\d+\s*\^\s*[{(]*\s*\d+\s*\^")
_OPTION = re.compile(r"(?:\\text\s*\{)?\(?([A-J])\)?\}?")
_DECIMAL = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,300})(?:\.\d{0,300})?")


def _scalar(value: object) -> object:
    """Return an element of an array or tensor as a Python value, with the digits that its own dtype shows."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    item = cast(Any, value).item()
    return float(str(np.float32(item))) if isinstance(item, float) and "32" in str(cast(Any, value).dtype) else item


def _text(value: object) -> str:
    value = _scalar(value)
    if not isinstance(value, (str, int, float, Decimal, Fraction)):
        raise TypeError(f"must be a string or number, got {type(value).__name__}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must be a string or a finite number, got {value}")
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e16 else repr(value)
    return str(value).strip()


def texts(value: object) -> list[str]:
    """Return the accepted answers of a reference, which is one answer or several. The number 3.0 accepts "3" and "3.0"."""
    value = value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) else value
    values = value if isinstance(value, (list, tuple)) else [value]
    accepted = [_text(v) for v in values]
    if not accepted:
        raise ValueError("must be a string or a list with at least one string, got []")
    whole = [
        text
        for v, text in zip(map(_scalar, values), accepted, strict=True)
        if isinstance(v, float) and text.lstrip("-").isdigit()
    ]
    return accepted + [text + ".0" for text in whole]


def _number(value: object, parse: Callable[[str], float | None] = parse_number) -> float:
    value = _scalar(value)
    is_number = isinstance(value, (int, float, Decimal, Fraction)) and not isinstance(value, bool)
    number = float(cast(float, value)) if is_number else parse(_text(value))
    if number is None:
        raise ValueError(f"must be a number, got {value!r:.80}")
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def _count(value: object) -> float:
    return _number(value, parse_count)


def _yes_no(value: object) -> str:
    value = _scalar(value)
    written = _text(value)
    answer = {"1": "yes", "0": "no"}.get(written) or parse_yes_no(written)
    if answer is None:
        raise ValueError(f"must be yes or no, got {value!r:.80}")
    return answer


def _choice(value: object) -> str:
    letter = parse_choice(_text(value))
    if letter is None:
        raise ValueError(f"must be an option letter, got {value!r:.80}")
    return letter


@pure(texts)
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
    """1 if ``|p - r| <= max(abs_tol, rel_tol |r|)``, else 0.

    If one of them is a percentage, it may be meant as a fraction or as percents: "50%" equals 0.5 and 50.
    """
    if abs_tol < 0:
        raise ValueError(f"abs_tol must be >= 0, got {abs_tol}")
    if rel_tol < 0:
        raise ValueError(f"rel_tol must be >= 0, got {rel_tol}")

    def near(p: float, r: float) -> bool:
        return abs(p - r) <= max(abs_tol, rel_tol * abs(r))

    def right(p: float, r: float) -> bool:
        in_percents = 100 * p if isinstance(p, Percent) else p, 100 * r if isinstance(r, Percent) else r
        return near(p, r) or (isinstance(p, Percent) != isinstance(r, Percent) and near(*in_percents))

    return [float(right(p, r)) for p, r in zip(predictions, references, strict=True)]


@pure(_count)
def count(predictions: list[float], references: list[float], *, soft: bool = False) -> list[float]:
    """1 if the count is correct, else 0; with ``soft``: ``max(0, 1 - |p - r| / max(r, 1))``."""
    if not soft:
        return [float(p == r) for p, r in zip(predictions, references, strict=True)]
    return [max(0.0, 1 - abs(p - r) / max(r, 1)) for p, r in zip(predictions, references, strict=True)]


@pure(texts)
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
    r"""1 if the prediction is mathematically equal to the reference, else 0: "1/2", ``\frac{1}{2}`` and "0.5" are equal.

    Both are compared as a whole: of "1 or 2", "1" is wrong. A unit may be missing in one of them, but "5 cm" is not "5 m". If
    one of them is not a formula, they are compared as text; the score is then ``Unparsed`` if only the prediction is none.

    Uses math-verify, in a process of its own, which is killed if a formula takes more than 5 seconds, such as ``9^{9^{9}}``.
    The score of such a formula is ``Unparsed``. This works on any thread. Within the process of a reward with a ``timeout``,
    the timeout is the limit.

    Source: https://github.com/huggingface/Math-Verify
    """
    third_party("math_verify", "math_equal")
    return [_math_score(p, r) for p, r in zip(predictions, references, strict=True)]


def _math_score(prediction: str, reference: str) -> float:
    if prediction.strip() == reference or _folded_text(prediction) == _folded_text(reference):
        return 1.0
    if (option := _OPTION.fullmatch(reference)) and parse_choice(prediction) == option[1]:
        return 1.0
    gold, answer = parse_formula(reference), parse_formula(prediction)
    if gold is None:
        return 0.0
    if answer is None or _is_huge(answer.latex):
        return Unparsed(0.0)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return 0.0
    if gold.latex.startswith("(") and answer.latex.startswith((r"\{", "{")):  # math-verify takes a set for an ordered pair
        return 0.0
    numbers = _DECIMAL.fullmatch(gold.latex), _DECIMAL.fullmatch(answer.latex)
    if all(numbers):
        r, p = (Fraction(latex.replace(",", "").replace(" ", "")) for latex in (gold.latex, answer.latex))
        return float(p == r or (p.denominator * r.denominator > 1 and abs(p - r) <= abs(r) / 10**6))
    result = compare(gold.latex, answer.latex)
    return float(result.equal) if result.parsed or not result.reference_parsed else Unparsed(0.0)


def _is_huge(formula: str) -> bool:
    """Whether a formula has numbers of about a million digits or very many brackets, so that the process need not try."""
    towers = ((int(base), int(a), int(b)) for base, a, b in _TOWER.findall(formula))
    nested = max(formula.count("{"), formula.count("(")) > 100
    return (
        nested
        or bool(_HUGE.search(formula))
        or any(base > 1 and a > 1 and b * math.log10(a) + math.log10(math.log10(base)) > 6 for base, a, b in towers)
    )


def _folded_text(text: str) -> str:
    """Return a text without LaTeX, Markdown, case and final periods. Letters of a formula keep their case."""
    text = " ".join(plain(conclusion(text)).split()).rstrip(".")
    return text.casefold() if len(text) > 1 and text.replace(" ", "").isalpha() else text


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


@pure(texts)
def cer(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - min(1, CER)``, with the character error rate CER = edit distance / length of the reference.

    Uses rapidfuzz. Case-sensitive unless ``ignore_case``. Surrounding white space is ignored.
    """
    predictions, references = _folded(predictions, references, ignore_case)
    distances, _, flat = _distances(predictions, references, "cer")
    return _best([1 - min(1.0, d / max(len(r), 1)) for d, r in zip(distances.tolist(), flat, strict=True)], references)


@pure(texts)
def edit_ratio(predictions: list[str], references: list[list[str]], *, ignore_case: bool = False) -> list[float]:
    """``1 - d / max(|p|, |r|)``, the normalized Levenshtein similarity; close to VLM-R1's OCR reward.

    Uses rapidfuzz. VLM-R1 uses ``ratio`` of python-Levenshtein, in which a substitution costs 2.
    """
    return _best(*_similarities(predictions, references, ignore_case, "edit_ratio"))


@pure(texts)
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
