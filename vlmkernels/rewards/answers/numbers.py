"""Parse numbers and counts.

Every group of characters with a digit must be a number, or a name such as "H2O" or "GPT-4". If one is neither, such as "3-5",
"3:45", "5k" or "1.234.567", the text is not parsed: a part of what was written is never its value.
"""

import math
import re

from vlmkernels.rewards.answers.conclusion import or_of_conclusion
from vlmkernels.rewards.answers.number_words import SCALES, digits_for_words
from vlmkernels.rewards.answers.only import only
from vlmkernels.rewards.answers.plain import plain

_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
# Units that are written without a space. Letters that can also mean thousands or millions, such as m, are not among them.
_UNITS = (
    "cm|mm|km|kg|mg|g|lbs?|oz|ft|yd|m[lL]|[lL]|ms|s|sec|min|hrs?|h|mph|km/h|m/s|px|pt|dpi|k?Hz|MHz|GHz|[kMGT]B|k?[WV]"
    "|°[CF]?|[€£¥₹¢]"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<value>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,4}})|/(?P<divisor>\d+))?"
    rf"(?P<percent>%)?(?P<scale>{'|'.join(SCALES)})?(?P<unit>{_UNITS}|(?:-[A-Za-z]+)+)?"
)
_GROUP = re.compile(r"[^\s()\[\]{}\"=;|!?<>]+")
_DIGIT = re.compile(r"\d")
_NAME = re.compile(r"[^\W\d][\w-]*|\d*(?:1st|2nd|3rd|\dth)", re.IGNORECASE)
_EXPONENT = r"\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4}))(?![\d.])"

# Applied in this order, before the groups of characters are split.
_REWRITE = [
    (re.compile(r"[=-]>"), " "),
    (re.compile(r"(?<=[^\W\d]):(?=[-+€£¥₹.\d])"), ": "),  # Answer:5
    (re.compile(r"\b(minus|negative)\s+(?=[€£¥₹]?[.\d])", re.IGNORECASE), "-"),
    (re.compile(r"(?<=[=:(])\s*([-+])\s+(?=[€£¥₹.\d])"), r" \1"),  # x = - 5; but "- 5" can be an item of a list
    (re.compile(r"(?<=[-+])[€£¥₹~]\s?|(?<![\w.])(?:[€£¥₹~#≈]|(?:USD|EUR|GBP|Rs\.?)(?=\s?\d))\s?(?=[-+.\d])"), ""),
    (re.compile(r"\b(cm|mm|km|m|ft|in|inches|feet|units?|meters?|metres?)\s?\^\s*\{?-?[1-3]\}?"), r"\1"),  # 5 cm^2
    (re.compile(r"(?<=\d)\s*[x×*·]\s*10" + _EXPONENT), r"e\1\2"),
    (re.compile(r"(?<![\w.,^*/×-])10" + _EXPONENT), r"1e\1\2"),
    (re.compile(r"(?<=\d)\s*(?:%|per ?cent(?:age)?\b|pct\b)", re.IGNORECASE), "%"),
    (re.compile(r"(?<=[\d%])\s*(\*\*|[-+*/×÷^:])\s*(?=[-+]?[.\d{])"), r"\1"),
    (re.compile(rf"(?<=\d)\s*({'|'.join(SCALES)})s?\b(?![-\s]*(?:{'|'.join(SCALES)}))", re.IGNORECASE), r"\1"),
    (re.compile("(?<![\u3040-\u9fff])[\u3040-\u9fff]+|[\u3040-\u9fff]+"), " "),
]
_MIXED = re.compile(r"(?<![\w.,/-])(-?)(\d{1,15})\s+(\d{1,15})/([1-9]\d{0,14})(?![\w.,/%])")

# What makes a number a bound, a range, a part of a formula or of a larger expression. The alternatives need a digit.
_NOT_A_VALUE = re.compile(
    r"""(?:^|\s)[-+]\s+[€£¥]?[.\d] | (?:\\[a-z]+|\b(?:sqrt|log|ln|exp|sin|cos|tan))\s*[({\[_]*\s*[-.\d]
    | [<>≤≥±√π^]\s*[-+€£¥]?[.\d] | [.\d]\s*[<>≤≥±√π^‰] | \d\+(?!\d) | \d°\s*\d | \d\.\.+\d | \d\s+point\s+\d
    | \b(?:at\ (?:least|most)|(?:more|less|fewer|greater|larger|higher|lower)\ than|over|under|above|below|up\ to|not
      |half|twice|double|past|point)\s+(?:a\ |of\ )?[€£¥]?[-+.\d]
    | \d\s*\\[a-z] | \d\s*[×÷*^+]\s*[a-zA-Z(] | \bor\ [-+.\d] | \bbetween\s+\S+\s+and\s+[-+.\d]
    | \b(?:root|square|cube|third|quarter|fourth|fifth|tenth)\s+of\s+[-+.\d]
    | \d\D{0,30}\bor\ (?:more|less|fewer|greater|higher|lower|above|below|over|under|none)\b
    | \d\D{0,12}\b(?:below|under)\s+(?:zero|freezing)
    | \d\s+(?:[kKMBTGxyzXYZ]|bn|mn|mio|lakhs?|crores?|pi|squared|cubed|tens|scores?)(?![\w'])
    | \d\D{0,20}\band\ (?:an?|one|1|two|2|three|3)[\s-](?:half|thirds?|quarters?|fourths?)
    | \d[\s-](?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?)\b
    | \d\s*(?:hundred|thousand|million|billion|dozen)s?[\s-]+(?:hundred|thousand|million|billion|trillion)
    | [零一二三四五六七八九十百千万亿两半点分成负第多几余之下]\s*\d | \d\s*[零一二三四五六七八九十百千万亿半点分成多几余]""",
    re.VERBOSE,
)
# Groups of three digits, if the number is the whole text: "1 331", but not "the seats 1 331 and 2 400".
_SPACED = re.compile(r"([-+]?[1-9]\d{0,2})((?: \d{3})+)((?:[.,]\d+)?\s*[^\W\d]*\.?)")
# The left side of an equation of numbers: 3 + 4 = 7 is 7.
_SUM = re.compile(r"(?<![\w.,^*/×÷+(-])[(\d][\d.,() ]{0,30}(?:[-+*/×÷][\d.,() ]{1,30}){1,20}=\s*(?=[-+]?[€£¥₹.\d])")
_NONE = r"(?:none|no one|nobody|no (?:people|persons?|men|women|children|\w+[^\Ws]s))"
_PLACE = r"(?:of them|visible|present|shown|here|(?:in|on) (?:the|this) \w+)"
_NO_ONE = re.compile(
    rf"no|no \w+ (?:is|are) {_PLACE}|(?:there (?:are|were|is|was) )?{_NONE}(?: (?:are|is))?(?: {_PLACE}){{0,3}}"
    rf"|there (?:are|were)(?:n't| not) any \w+s?(?: {_PLACE}){{0,3}}",
    re.IGNORECASE,
)


class Percent(float):
    """The value of a number that was written with a percent sign: 0.5 for "50%"."""


def _value(match: re.Match[str]) -> float:
    """Return the value of a match of ``_NUMBER``; NaN if it has none."""
    if match["divisor"] and not int(match["divisor"][:400]):
        return math.nan
    value = float(match["value"].replace(",", "") + (f"e{match['exponent']}" if match["exponent"] else ""))
    value *= SCALES.get(match["scale"] or "", 1)
    value /= float(match["divisor"] or 1) * (100 if match["percent"] else 1)
    value = 0.0 - value if match["sign"] == "-" else value  # and not -0.0
    return Percent(value) if match["percent"] else value


def _mixed(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) + int(match[3]) / int(match[4])!r}"


def _rewritten(text: str) -> str | None:
    """Return a text in which each number is one group of characters, or None if a number in it is only a part of a value."""
    text = _SUM.sub("", digits_for_words(plain(text)))
    if match := _SPACED.fullmatch(text):
        text = match[1] + match[2].replace(" ", "") + match[3]
    for pattern, replacement in _REWRITE[:-1]:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(_mixed, text)
    if _NOT_A_VALUE.search(text):
        return None
    pattern, replacement = _REWRITE[-1]
    return pattern.sub(replacement, text)


def _values(text: str) -> list[float]:
    """Return the numbers in a text. The list has a NaN if a group of characters with a digit is not a number."""
    rewritten = _rewritten(text)
    if rewritten is None:
        return [math.nan]
    values = []
    for group in filter(_DIGIT.search, _GROUP.findall(rewritten)):
        group = group.strip("'*~,:…").rstrip(".,:'")
        match = _NUMBER.fullmatch(group)
        if match:
            values.append(_value(match))
        elif not _NAME.fullmatch(group):
            values.append(math.nan)
    return values


def _only_finite(values: list[float]) -> float | None:
    value = only(values)
    return value if value is not None and math.isfinite(value) else None


def as_number(text: str) -> float:
    """Parse a text that consists of one number, such as "1,234.5" or "12%" (0.12). Raises ValueError for any other text."""
    match = _NUMBER.fullmatch((_rewritten(text) or "").strip())
    value = _value(match) if match and not match["unit"] else math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, got {text!r:.80}")
    return value


@or_of_conclusion
def parse_number(text: str) -> float | None:
    """Parse the only number in a text; "12%" is ``Percent(0.12)``, "1/2" is 0.5, and "twenty-one" is 21.

    Currency and units are ignored. Returns None for several numbers, and for what is not one number: ranges, bounds such as
    "at least 5", times, dates, formulas, decimal commas.
    """
    return _only_finite(_values(text))


@or_of_conclusion
def parse_count(text: str) -> float | None:
    """Parse the only count in a text, a whole number in digits or words; "none" and "no cats" are 0."""
    if _NO_ONE.fullmatch(plain(text).rstrip(".")):
        return 0.0
    value = _only_finite(_values(text))
    is_count = value is not None and value >= 0 and value == int(value) and not isinstance(value, Percent)
    return value if is_count else None
