"""Find the formula that an answer consists of."""

import re
from itertools import pairwise
from typing import NamedTuple

from vlmkernels.rewards.answers.conclusion import or_of_conclusion
from vlmkernels.rewards.answers.number_words import digits_for_words
from vlmkernels.rewards.answers.numbers import Percent, parse_number
from vlmkernels.rewards.answers.plain import WRAPPED, ascii_text, boxed, without_markdown
from vlmkernels.rewards.answers.units import UNITS, unit_of_words, without_unit

# In LaTeX, a dollar sign opens a formula before, and closes it after, a character that is not a space: not $5 and $6.
_DELIMITED = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$(?=\S)((?:[^$\n\\]|\\.)*?(?<=\S))\$(?!\d)", re.DOTALL
)
# Between formulas that are one answer.
_CONNECTOR = re.compile(r"\s*(?:,?\s*(?:and|or)|[,;])\s*", re.IGNORECASE)
_CURRENCY = re.compile(r"\\?\$|[€£¥₹]")
# What a sentence says before its formula. The formula is what follows the last "so" or "therefore" and the verb.
_AFTER_ANSWER = re.compile(r".*\b(?:answer|result|solution)\b\D{0,40}?(?:\bis\b|[:=])", re.IGNORECASE | re.DOTALL)
_LEAD = re.compile(
    r"\s*(?:so|thus|hence|therefore|then|it is|it's|it equals|there (?:are|is)|about|approximately|around|[≈~])[\s,:]+",
    re.IGNORECASE,
)
# Words with which the value is not that of the formula: at least 5, not 5, 5 million, the square root of 5.
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower) than|up to|not|never|half|twice"
    r"|double|or (?:more|less|fewer|greater|above|below|none)|squared|cubed|(?:square|cube)? root|(?:cube|square) of"
    r"|(?:third|quarter|fourth|fifth|tenth)s? of|dozen|hundred|thousand|million|billion|trillion|past)\b",
    re.IGNORECASE,
)
_THUS = re.compile(r".*(?:\b(?:so|thus|hence|therefore)\b(?!\s+that)|\\therefore|∴)[\s,:]*", re.IGNORECASE | re.DOTALL)
_SUBJECT = re.compile(r"\s*the\b[^=<>$\\\d]*\b(?:is|are|equals)\s+(?:equal to\s+|about\s+)?", re.IGNORECASE)
# Between two formulas of which the second is the answer: the value of $x$ is $5$.
_VERB = re.compile(r"(?:\s*(?:is|equals|is equal to)\s*|.*\b(?:gives?|get|then|means)\b[\s,:]*)", re.IGNORECASE)
# Names of what a formula is the value of: ∠ABC = 90, "x is 5".
_ANGLE = re.compile(r"(?<![A-Za-z])m?(?:∠|\\angle)\s*[A-Z0-9]{1,3}\s*(?:=|is\b)")
_EQUALS = re.compile(r"^\s*([A-Za-z])\s+(?:is|equals|is equal to)\s+(?=\S)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
_ENVIRONMENT = re.compile(r"\\(begin|end)\{[a-z]*(?:matrix|cases|array|aligned?)\*?\}")
# Words that are a part of a formula. Other words of up to three letters can be products of variables, such as abc.
_COMMANDS = re.compile(
    r"a?(?:sin|cos|tan|cot|sec|csc)h?|arc(?:sin|cos|tan)|sqrt|log|ln|exp|pi|theta|alpha|beta|gamma|delta|lambda|mu|phi|omega|sigma"
)
_SHORT_WORD = re.compile(
    r"is|it|sq|the|of|to|in|at|on|by|for|from|as|we|be|are|was|has|had|not|no|yes|so|if|an|my|our|per|its|this|that|all|any|two|one"
    r"|six|ten",
    re.IGNORECASE,
)
_CUT = re.compile(r"(?<!_)\d\s+\d(?!\d*/)|[(\[]$")  # numbers that only a space separates, or an opened bracket
_MATHS = re.compile(r"[A-Za-z0-9∞π∅]|\\[a-z]")
_CHINESE_LEAD = re.compile("^[぀-鿿]+[,:]?")
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d.])", re.IGNORECASE)
_SPACE = re.compile(r"(?<!\\)\\(?:displaystyle|left|right|big|Big|[,;:!> ]|quad|qquad)(?![A-Za-z])")
_EDGES = re.compile(r"^(?:[\s,;:]|\.(?!\d))+|[\s.,;:]+$")  # of a piece: the point of .5 is a part of the number
# How people write formulas -> LaTeX that math-verify reads.
_LATEX = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?)[eE]([-+]?\d+)\b"), r"\1\\cdot 10^{\2}"),
    (re.compile(r"(?<![\d.^/])(\d+)\s+(\d+)/(\d+)(?![\d.])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?:√|\\sqrt)\s*\(((?:[^()]|\([^()]*\))*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\w+)"), r"\\sqrt{\1}"),
    (re.compile(r"\s*percent(?:age)?\b"), "%"),
    (re.compile(r"\\?%"), r"\\%"),
]
_SYMBOLS = {"*": r"\cdot ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
            "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
            "∅": r"\emptyset ", "°": r"^\circ "}  # fmt: skip
_MOST_NESTED = 3  # boxes within boxes
_LONGEST = 2000  # characters


class Formula(NamedTuple):
    """A formula in LaTeX, without delimiters, and its unit, or "" if it has none that is known."""

    latex: str
    unit: str


def parse_formula(text: str) -> Formula | None:
    r"""Find the formula that an answer consists of, with its unit: "The answer is **5 cm**.", "$x=1$ or $x=2$", ``\boxed{2}``.

    A sentence about one number, such as "The length of AB is 5", is that number. Returns None for words, and for several
    formulas that are not joined by "and", "or" or commas.
    """
    formula = _whole_formula(text) or _whole_formula(digits_for_words(text))  # five hours
    if formula is None and (number := parse_number(text)) is not None:
        digits = f"{100 * number if isinstance(number, Percent) else number:.15g}"
        formula = None if "e" in digits else Formula(digits + r"\%" * isinstance(number, Percent), "")
    return formula


@or_of_conclusion
def _whole_formula(text: str) -> Formula | None:
    if len(text) > _LONGEST:
        text = ", ".join(boxed(text)) or text[max(text.lower().rfind("answer"), 0) :]
        if len(text) > _LONGEST:
            return None
    text = _MINUS.sub("-", _CHINESE_LEAD.sub("", _SPACE.sub(" ", without_markdown(ascii_text(text)))))
    if _BOUND.search(text):
        return None
    for _ in range(_MOST_NESTED):
        text = ", ".join(boxed(text)) or text
    if (thus := _THUS.match(text)) and _MATHS.search(text, thus.end()):
        text = text[thus.end() :]
    if found := list(_DELIMITED.finditer(text)):
        return _delimited(text, found)
    answer = _AFTER_ANSWER.match(text)
    text = text[answer.end() :] if answer else text
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    subject = _SUBJECT.match(text)
    return _formula(_ANGLE.sub(" ", text[subject.end() :] if subject else text).lstrip(" ="))


def _delimited(text: str, found: list[re.Match[str]]) -> Formula | None:
    formulas = [next(filter(None, match.groups())).strip() for match in found]
    between = [text[a.end() : b.start()] for a, b in pairwise(found)]
    rest = text[found[-1].end() :]
    if between and _VERB.fullmatch(between[-1]):
        formulas, between = formulas[-1:], []
    if len(set(formulas)) > 1 and not all(map(_CONNECTOR.fullmatch, between)):
        answer = _AFTER_ANSWER.match(text)
        formulas = [f for f, match in zip(formulas, found, strict=True) if answer and match.start() >= answer.end()]
        if len(formulas) != 1:
            return None
    unit = unit_of_words(rest.split()) if len(rest.split()) < 4 else ""
    joined = _formula(", ".join(dict.fromkeys(formulas)))
    return joined and Formula(joined.latex, joined.unit or unit)


def _formula(text: str) -> Formula | None:
    """Split words from the formula in a text without delimiters."""
    currency = _CURRENCY.findall(text)
    text, unit = without_unit(_CURRENCY.sub("", text))
    text = _EQUALS.sub(r"\1=", WRAPPED.sub(r" \1 ", WRAPPED.sub(r" \1 ", text)))
    text = re.sub(r"(?<=\d)\s*(?:percent(?:age)?|per cent|pct)\b", "%", text)
    pieces, words = _pieces(text)
    formulas = [piece for piece in pieces if _MATHS.search(piece) and not (words and piece in ("a", "A", "I"))]
    if len(set(formulas)) != 1 or _CUT.search(formulas[0]):
        return None
    last = pieces.index(formulas[0])
    unit = unit or unit_of_words(words[last : last + 2]) or (UNITS.get(currency[0].lstrip("\\"), "") if currency else "")
    return Formula(_latex(formulas[0]), unit)


def _pieces(text: str) -> tuple[list[str], list[str]]:
    """Return what stands between the words of a text, and the words. There is one piece more than words."""
    kept = {name for match in _ENVIRONMENT.finditer(text) for name in re.findall(r"[a-z]+", match[0])}
    words: list[str] = []

    def mark(match: re.Match[str]) -> str:
        word = match[0]
        if _COMMANDS.fullmatch(word):
            return "\\" + word + " "
        if word.lower() in ("and", "or"):
            return ","
        if word in kept or (len(word) <= 3 and not _SHORT_WORD.fullmatch(word) and word.lower() not in UNITS):
            return word
        if word.lower() in ("infinity", "inf"):
            return r"\infty "
        power = re.match(r"\s*\^\s*\{?([23])\}?", text[match.end() :])
        words.append(word + ("^" + power[1] if power else ""))
        return "\x00"

    marked = re.sub(r"\x00\s*\^\s*\{?[23]\}?", "\x00", _WORD.sub(mark, text.replace("\x00", " ")))
    return [_EDGES.sub("", piece) for piece in marked.split("\x00")], words


def _latex(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return "".join(_SYMBOLS.get(character, character) for character in text).strip()
