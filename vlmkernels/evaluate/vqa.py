"""VQA accuracy: an answer is right as far as people agree with it."""

import re
from collections.abc import Sequence

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


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it.

    Punctuation goes where it stands beside a space (or the answer holds a number such as 1,000), and becomes a space elsewhere;
    periods that no digit follows go; number words up to ten become digits, articles go, contractions get their apostrophes.

    Source: https://visualqa.org/evaluation.html
    """
    answer = result = re.sub(r"[\n\t]", " ", answer).strip()
    for mark in _PUNCTUATION:
        drop = f"{mark} " in answer or f" {mark}" in answer or _DIGIT_COMMA.search(answer)
        result = result.replace(mark, "" if drop else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", result).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def people(reference: Sequence) -> list[str]:
    """The answers of people, given as texts or as dicts with ``answer``. Raises TypeError, ValueError."""
    if isinstance(reference, str) or not isinstance(reference, Sequence):
        raise TypeError(f"must be a list of people's answers, got {type(reference).__name__}")
    answers = [answer["answer"] if isinstance(answer, dict) and "answer" in answer else answer for answer in reference]
    if len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"must be at least two texts, got {answers!r:.80}")
    return answers


def vqa_accuracy(prediction: str, reference: Sequence) -> float:
    """The mean, over the people left out one at a time, of ``min(others who gave this answer / 3, 1)``.

    Source: https://arxiv.org/abs/1505.00468; https://visualqa.org/evaluation.html
    """
    agree = np.array([normalise(answer) for answer in people(reference)]) == normalise(prediction)
    return float(np.minimum((agree.sum() - agree) / 3, 1).mean())
