"""VQA accuracy: the agreement of an answer with the answers of several people."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

ARTICLES = {"a", "an", "the"}
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(count) for count, word in enumerate(COUNTS)}}
CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll
ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're
why's won't would've wouldn't y'all you'd you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED.split()}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalize(answer: str) -> str:
    """Return an answer in the form in which the VQA evaluation compares answers.

    Punctuation next to a space is removed, also if the answer has a number such as 1,000; other punctuation becomes a space.
    Periods that no digit follows and articles are removed, number words up to ten become digits, and contractions get their
    apostrophes.

    Source: https://visualqa.org/evaluation.html
    """
    answer = result = re.sub(r"[\n\t]", " ", answer).strip()
    for mark in _PUNCTUATION:
        drop = f"{mark} " in answer or f" {mark}" in answer or _DIGIT_COMMA.search(answer)
        result = result.replace(mark, "" if drop else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", result).lower().split()]
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


def vqa_accuracy(prediction: str, reference: Any) -> float:
    """Return the mean over people of ``min(number of other people who gave this answer / 3, 1)``.

    Args:
        prediction: the answer.
        reference: see ``human_answers``.

    Source: https://arxiv.org/abs/1505.00468; https://visualqa.org/evaluation.html
    """
    agree = np.array([normalize(answer) for answer in human_answers(reference)]) == normalize(prediction)
    return float(np.minimum((agree.sum() - agree) / 3, 1).mean())
