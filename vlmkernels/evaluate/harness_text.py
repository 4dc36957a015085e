"""How lmms-eval and VLMEvalKit read and score answers that are text; ``HARNESSES`` in ``tasks`` names the source of each.

These functions follow the harnesses in every detail, also where a person would read an answer differently, and therefore use
none of the parsers and scores of ``vlmkernels.rewards``.
"""

import ast
import re
import string
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from vlmkernels.evaluate.vqa import COUNTS, PERIODS_APART, without_punctuation

_REASONING = (("<think>", "</think>"), ("<analysis>", "</analysis>"))


# Completions


def without_reasoning(completion: str) -> str:
    """Remove reasoning, and everything before a closing tag without an opening one, as lmms-eval's command does by default."""
    for opening, closing in _REASONING:
        while opening in completion and (end := completion.find(closing, completion.find(opening))) >= 0:
            completion = completion[: completion.find(opening)] + completion[end + len(closing) :]
        if opening not in completion:
            completion = completion.rpartition(closing)[2]
    return completion.strip()


# References


def texts(reference: Any) -> list[str]:
    """Return the accepted answers of a reference, which is one answer or a list of answers."""
    return [str(r) for r in reference] if isinstance(reference, (list, tuple)) else [str(reference)]


def texts_or_literal(reference: Any) -> list[str]:
    """Return the accepted answers. As in VLMEvalKit, a text that is a Python list stands for the answers in it."""
    found = None
    if isinstance(reference, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = ast.literal_eval(reference.strip())
    return texts(found if isinstance(found, list) and found else reference)


def best(score: Callable[[str, str], float], accepted: Callable[[Any], list[str]] = texts) -> Callable[[str, Any], float]:
    """Return a score that is the highest one over the accepted answers of a reference."""
    return lambda prediction, reference: float(max(score(prediction, one) for one in accepted(reference)))


# Scores of one answer and one reference


def relaxed(prediction: str, reference: str) -> float:
    """Compare numbers that ``float`` reads within 5 %; other values and a reference of 0 as text."""
    ours, theirs = _float(prediction), _float(reference)
    if ours is not None and theirs:
        return float(abs(ours - theirs) / abs(theirs) <= 0.05)
    return float(prediction.lower() == reference.lower())


def _float(value: str) -> float | None:
    try:
        return float(value.rstrip("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        return None


def anls(prediction: str, reference: str) -> float:
    """ANLS: the distance is that of the texts with white space collapsed, but the length is that of the texts as given."""
    from rapidfuzz.distance import Levenshtein

    distance = Levenshtein.distance(*(" ".join(value.lower().split()) for value in (prediction, reference)))
    length = max(len(value.upper()) for value in (prediction, reference))
    similarity = 1 - (distance / length if length else 0.0)
    return similarity if similarity >= 0.5 else 0.0


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def equal_without_punctuation(prediction: str, reference: str) -> float:
    """Compare in lower case and without the punctuation of ASCII (``exact_match`` in lmms-eval). White space counts."""
    # Lower case is that of numpy, which keeps the length: "\u0130" becomes "i" without the dot above it.
    ours, theirs = (value.lower()[: len(value)].translate(_NO_PUNCTUATION) for value in (prediction, reference))
    return float(ours == theirs)


def equal_stripped(prediction: str, reference: str) -> float:
    """Compare in lower case, without surrounding white space."""
    return float(prediction.strip().lower() == reference.strip().lower())


# Yes or no


def whole_word(answer: str) -> str | None:
    """Read an answer that is nothing but yes or no (POPE in lmms-eval)."""
    answer = answer.lower().strip()
    return answer if answer in ("yes", "no") else None


def beginning(answer: str) -> str | None:
    """Read yes or no from the first four characters, or from a single letter (MME in lmms-eval)."""
    answer = answer.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer)
    return next((word for word in ("yes", "no") if word in answer[:4]), None)


def only_word(answer: str) -> str | None:
    """Read yes or no if one of them, and not the other, is among the words (VLMEvalKit)."""
    found = {"yes", "no"} & set(without_punctuation(answer.lower(), PERIODS_APART).split())
    return found.pop() if len(found) == 1 else None


# Counts

_TEENS = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_WORDS = (*COUNTS, *_TEENS, "twenty")
_DIGITS = {"none": "0", **{word: str(count) for count, word in enumerate(_WORDS)}}


def digits(answer: str) -> str:
    """Replace a number word up to twenty by digits (CountBench in lmms-eval)."""
    answer = answer.strip().lower()
    return _DIGITS.get(answer, answer)


def _whole(reference: Any) -> str:
    return str(int(reference)) if isinstance(reference, float) and reference.is_integer() else str(reference)


def equal_digits(prediction: str, reference: Any) -> float:
    """Compare the results of ``digits``."""
    return float(prediction == digits(_whole(reference)))


def contains_digits(prediction: str, reference: Any) -> float:
    """1 if the digits of the reference occur anywhere in the answer, so that "13" contains 3 (CountBenchQA in VLMEvalKit)."""
    return float(_whole(reference) in prediction)


# Option letters

LETTERS = ("A", "B", "C", "D")
_PHRASES = [f"{the}{what} is" for what in ("answer", "choice") for the in ("the ", "", "the correct ", "correct ", "my ")]
_PHRASES += [f"{the}{what} is" for what in ("best answer", "best option", "correct option") for the in ("the ", "")]
_PHRASES += ["i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def letter_by_format(answer: str) -> str | None:
    """Read a letter A to D: the first or the last character, or the last letter in the first format of the list that occurs.

    This is MMStar in lmms-eval. It reads the article in "A cat" as the letter A.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    inner, text = text.strip(), f" {text} "
    if inner[:1] in LETTERS and not inner[1:2].isalpha():
        return inner[0]
    if inner[-1:] in LETTERS and not inner[-2:-1].isalpha():
        return inner[-1]
    lower = text.lower()
    starts = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
    places = [[max((text.find(letter, start) for start in starts), default=-1) for letter in LETTERS]]
    places += [[text.rfind(form.format(letter)) for letter in LETTERS] for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}")]
    found = next((row for row in places if max(row) >= 0), None)
    return None if found is None else LETTERS[found.index(max(found))]


def letter_or_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Read the only option letter among the words, or the only option whose text occurs (``can_infer`` in VLMEvalKit).

    Args:
        answer: the text.
        options: texts of the options by letter.
    """
    letter = _option_letter(answer, options)
    if letter is None:
        answer = answer.lower()
        found = [letter for letter, option in options.items() if option.lower() in answer]
        short = len(answer) <= 2 * sum(map(len, options.values()))
        letter = found[0] if short and len(found) == 1 else None
    return letter if letter in options else None


def _option_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter, "Z" for a refusal, or None."""
    if "Failed to obtain answer via API" in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_SEPARATORS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    stated = _ANSWER_IS.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in options else None
