"""Parse numbers and counts."""

import math
import re

from vlmkernels.rewards.answers.only import only

# Numbers may have thousands separators, decimals, an exponent and a percent sign.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?%?(?!\w)")
_COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT_WORD = re.compile(rf"\b({'|'.join(_COUNT_WORDS)})\b")


def as_number(text: str) -> float:
    """Parse a text that consists of one number, such as "1,234.5" or "12%" (0.12). Raises ValueError for any other text."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"must be a number, got {text!r:.80}")
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def parse_number(text: str) -> float | None:
    """Parse the only number in a text; "12%" is 0.12."""
    return only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)])


def parse_count(text: str) -> float | None:
    """Parse the only count in a text, written in digits or as a word from zero to ten."""
    words = [float(_COUNT_WORDS.index(word)) for word in _COUNT_WORD.findall(text.lower())]
    return only([value for value in map(as_number, _NUMBER.findall(text)) if math.isfinite(value)] + words)
