"""VQA accuracy: the agreement of an answer with the answers of several people."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

ARTICLES = {"a", "an", "the"}
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(count) for count, word in enumerate(COUNTS)}}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
# The evaluation adds one missing apostrophe, and it has one word the wrong way round.
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
PERIODS = re.compile(r"\.(?!\d)")
PERIODS_APART = re.compile(r"(?<!\d)\.(?!\d)")  # of VLMEvalKit: "3." is not "3"


def without_punctuation(answer: str, periods: re.Pattern = PERIODS, comma: re.Pattern = _COMMA) -> str:
    """Remove punctuation next to a space, or everywhere if ``comma`` occurs, and replace other punctuation by a space.

    Of the periods that match ``periods``, the first 32 are removed: the evaluation passes the flag ``re.UNICODE`` as the count.
    """
    result, has_comma = answer, comma.search(answer) is not None
    for mark in _PUNCTUATION:
        drop = has_comma or f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if drop else " ")
    return periods.sub("", result, count=32)


@lru_cache(maxsize=4096)
def normalize(answer: str, periods: re.Pattern = PERIODS, comma: re.Pattern = _COMMA) -> str:
    """Return an answer in the form in which the VQA evaluation compares answers.

    Punctuation next to a space is removed, also if the answer has a number such as 1,000; other punctuation becomes a space.
    Periods that no digit follows and articles are removed, number words up to ten become digits, and contractions get their
    apostrophes.

    Source: https://visualqa.org/evaluation.html
    """
    answer = re.sub(r"[\n\t]", " ", answer).strip()
    words = [NUMBERS.get(word, word) for word in without_punctuation(answer, periods, comma).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def human_answers(reference: Any) -> list[str]:
    """Return the answers of a reference, which are texts or dicts with ``answer``.

    Raises:
        TypeError: the reference is not a list. ValueError: it has fewer than two texts, or other values.
    """
    if isinstance(reference, str) or not isinstance(reference, Sequence):
        raise TypeError(f"must be a list of people's answers, got {type(reference).__name__}")
    answers = [answer["answer"] if isinstance(answer, dict) and "answer" in answer else answer for answer in reference]
    if len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"must be at least two texts, got {answers!r:.80}")
    return answers


def vqa_accuracy(prediction: str, reference: Any, normalize: Callable[[str], str] = normalize) -> float:
    """Return the mean over people of ``min(number of other people who gave this answer / 3, 1)``.

    Args:
        prediction: the answer.
        reference: see ``human_answers``.
        normalize: returns an answer in the form in which answers are compared.

    Source: https://arxiv.org/abs/1505.00468; https://visualqa.org/evaluation.html
    """
    ours, people = normalize(prediction), [normalize(answer) for answer in human_answers(reference)]
    agree = np.array([answer == ours for answer in people])
    return float(np.minimum((agree.sum() - agree) / 3, 1).mean())
