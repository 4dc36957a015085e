"""Replace number words in a text by digits."""

import re

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fourty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
         "ninety": 90, "ninty": 90}  # fmt: skip
_UNITS = {word: value for value, word in enumerate(_SMALL.split())} | _TENS
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth"

# ASCII: otherwise, letters such as "\u0130" would match "i" up to case.
_WORD = rf"(?a:{'|'.join(_UNITS)}|(?:{'|'.join(SCALES)})s?)\b"
_PHRASE = re.compile(
    rf"\b(?<!\d )(?<!\d)(?:an?\s+(?=(?:{'|'.join(SCALES)})\b))?({_WORD}(?:(?:\s*-\s*|\s+|\s+and\s+){_WORD})*)"
    rf"(?:[\s-]({_ORDINALS})\b)?",
    re.IGNORECASE,
)
_SAME_TWICE = re.compile(r"(?<![\w.])(\d+) \(\1\)")
_PRONOUN = re.compile(
    r"\b(?:the|this|that|which|each|any|every|some|no|another|other|left|right|last|next|first|second|third)\s+one\b"
    r"|\bone\s+of\s+(?=the|these|those|them|us)\b",
    re.IGNORECASE,
)


# One Chinese numeral before a measure word or the end, or alone; not a part of a larger number, such as 二十三 or 三分之一.
_CHINESE = {word: value for value, word in enumerate("零一二三四五六七八九十")} | {"两": 2}
_CHINESE_NUMERAL = re.compile(
    r"(?<![\d零一二三四五六七八九十百千万亿两第几])([零一二三四五六七八九十两])(?=[个只条位名辆张本头匹朵棵把块片件]|[.\s]*$)"
)


def digits_for_words(text: str) -> str:
    """Replace "twenty-one" by "21", "a hundred and two" by "102", "two dozen" by "24" and "five (5)" by "5".

    "One" as a pronoun is removed.

    Words that are not one number, such as "nineteen eighty", become "19:80", which is no number either.
    """
    if not text.isascii():
        text = _CHINESE_NUMERAL.sub(lambda match: str(_CHINESE[match[1]]), text)
    return _SAME_TWICE.sub(r"\1", _PHRASE.sub(_digits, _PRONOUN.sub(" ", text)))


def _digits(match: re.Match[str]) -> str:
    words = re.split(r"[\s-]+", match[1].lower())
    if words[0].endswith("s") and words[0][:-1] in SCALES:
        return match[0]  # hundreds of people
    values, joints = [_Number()], []
    for word in words:
        if word == "and" and values[-1].may_continue_with_and():
            continue
        if word == "and" or not values[-1].add(word):
            joints.append(" and " if word == "and" else ":")
            values.append(_Number())
            if word != "and":
                values[-1].add(word)
    numbers = [str(value.total + value.group) for value in values]
    digits = numbers[0] + "".join(joint + number for joint, number in zip(joints, numbers[1:], strict=True))
    if not match[2]:
        return digits
    return "1st" if not joints and int(digits) >= 20 and int(digits) % 10 == 0 else f"{digits} {match[2]}"


class _Number:
    """A number that is read word by word.

    Attributes:
        total: the value of the words up to the last scale, such as thousand.
        group: the value of the words since then, below 1000.
    """

    def __init__(self) -> None:
        self.total, self.group, self.scale, self.empty = 0, 0, 10**15, True

    def may_continue_with_and(self) -> bool:
        return (self.group >= 100 and self.group % 100 == 0) or (self.group == 0 and self.total >= 1000)

    def add(self, word: str) -> bool:
        """Append a word. Returns False, and changes nothing, if the word does not continue the number."""
        scale = SCALES.get(word) or SCALES.get(word.removesuffix("s"))
        started, self.empty = not self.empty, False
        if scale is None:
            value = _UNITS[word]
            after_tens = self.group % 100 >= 20 and self.group % 10 == 0 and 0 < value < 10
            after_hundred = self.group % 100 == 0 and value > 0
            if started and not (after_tens or after_hundred):
                return False
            self.group += value
        elif scale == 100:
            if self.group >= 100 or (started and self.group == 0):
                return False
            self.group = (self.group or 1) * 100
        else:
            if scale >= self.scale or (started and self.group == 0):
                return False
            self.total, self.group, self.scale = self.total + (self.group or 1) * scale, 0, scale
        return True
