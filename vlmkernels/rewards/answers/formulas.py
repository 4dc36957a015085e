"""Find the formula that an answer consists of."""

import re
from itertools import pairwise
from typing import NamedTuple

from vlmkernels.rewards.answers.conclusion import or_of_conclusion
from vlmkernels.rewards.answers.numbers import Percent, parse_number
from vlmkernels.rewards.answers.plain import WRAPPED, ascii_text, boxed, without_markdown

# In LaTeX, a dollar sign opens a formula before, and closes it after, a character that is not a space: not $5 and $6.
_DELIMITED = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$(?=\S)((?:[^$\n\\]|\\.)*?(?<=\S))\$(?!\d)", re.DOTALL
)
_CONNECTOR = re.compile(r"\s*(?:,?\s*(?:and|or)|[,;])\s*", re.IGNORECASE)
_CURRENCY = re.compile(r"\\?\$|[€£¥₹]")
_AFTER_ANSWER = re.compile(r".*\b(?:answer|result|solution)\b\D{0,40}?(?:\bis\b|[:=])", re.IGNORECASE | re.DOTALL)
_LEAD = re.compile(
    r"\s*(?:so|thus|hence|therefore|then|it is|it's|it equals|there (?:are|is)|about|approximately|around|[≈~])[\s,:]+",
    re.IGNORECASE,
)
# Words that make the value of a formula another one.
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower) than|up to|not|never|half|twice"
    r"|double|or (?:more|less|fewer|greater|above|below|none))\b",
    re.IGNORECASE,
)
_ANGLE = re.compile(r"(?<![A-Za-z])m?(?:∠|\\angle)\s*[A-Z0-9]{1,3}\s*(?:=|is\b)")
_EQUALS = re.compile(r"^\s*([A-Za-z])\s+(?:is|equals|is equal to)\s+(?=\S)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
_ENVIRONMENT = re.compile(r"\\(begin|end)\{[a-z]*(?:matrix|cases|array|aligned?)\*?\}")
_COMMANDS = re.compile(
    r"a?(?:sin|cos|tan|cot|sec|csc)h?|arc(?:sin|cos|tan)|sqrt|log|ln|exp|pi|theta|alpha|beta|gamma|delta|lambda|mu|phi|omega|sigma"
)
_SHORT_WORD = re.compile(
    r"is|it|sq|the|of|to|in|at|on|by|for|from|as|we|be|are|was|has|had|not|no|yes|so|if|an|my|our|per|its|this|that|all|any|two|one"
    r"|six|ten",
    re.IGNORECASE,
)
# Unit -> its names. Each name may also have a plural "s".
_UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter meters metre metres", "km": "kilometer", "in": "inch inches",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "mi/h": "mph", "g": "gram", "kg": "kilogram", "mg": "milligram",
    "lb": "pound lbs", "oz": "ounce", "s": "second sec", "ms": "millisecond", "min": "minute", "h": "hour hr hrs",
    "day": "day", "week": "week", "month": "month", "year": "year yr", "l": "liter litre", "ml": "milliliter millilitre",
    "°": "degree deg", "rad": "radian", "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen yuan rmb", "¢": "cent",
    "hz": "hertz", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "mol": "mole",
}  # fmt: skip
UNITS = {name + plural: unit for unit, names in _UNITS.items() for name in (unit, *names.split()) for plural in ("", "s")}
_ONE_LETTER_UNIT = re.compile(r"\s*(-?[\d.,]+)\s+([mgshLNJWV])\s*(\^\s*\{?[23]\}?)?\s*\.?\s*")
_ONE_LETTER_TEXT = re.compile(r"(.+)\\(?:text|mathrm)\s*\{\s*([mgshLNJWV])\s*\}\s*(\^\s*\{?[23]\}?)?\s*\.?\s*", re.DOTALL)
_TEXT_POWER = re.compile(r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]{2,})\s*\}\s*\^\s*\{?([23])\}?")
_MATHS = re.compile(r"[A-Za-z0-9∞π∅]|\\[a-z]")
_CHINESE_LEAD = re.compile("^[぀-鿿]+[,:]?")
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d.])", re.IGNORECASE)
_RATE = re.compile(
    r"(?<=[\d}])\s*(?:\\(?:text|mathrm)\s*\{)?\s*([A-Za-z]+)(?:\s*/\s*|\s+per\s+)([A-Za-z]+)\s*\}?\s*\.?$"
)  # 60 km/h
_SPACE = re.compile(r"(?<!\\)\\(?:displaystyle|left|right|big|Big|[,;:!> ]|quad|qquad)(?![A-Za-z])")
_EDGES = re.compile(r"^(?:[\s,;:]|\.(?!\d))+|[\s.,;:]+$")  # of a piece: the point of .5 is a part of the number
_LATEX = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\\log_(\w)"), r"\\log_{\1}"),
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


_MOST_NESTED = 3
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
    formula = _whole_formula(text)
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
    if found := list(_DELIMITED.finditer(text)):
        return _delimited(text, found)
    answer = _AFTER_ANSWER.match(text)
    text = text[answer.end() :] if answer else text
    lead = _LEAD.match(text)
    return _formula(_ANGLE.sub(" ", text[lead.end() :] if lead else text).lstrip(" ="))


def _delimited(text: str, found: list[re.Match[str]]) -> Formula | None:
    formulas = [next(filter(None, match.groups())).strip() for match in found]
    between = [text[a.end() : b.start()] for a, b in pairwise(found)]
    rest = text[found[-1].end() :]
    if len(set(formulas)) > 1 and not all(map(_CONNECTOR.fullmatch, between)):
        answer = _AFTER_ANSWER.match(text)
        formulas = [f for f, match in zip(formulas, found, strict=True) if answer and match.start() >= answer.end()]
        if len(formulas) != 1:
            return None
    unit = _unit(rest.split()) if len(rest.split()) < 4 else ""
    joined = _formula(", ".join(dict.fromkeys(formulas)))
    return joined and Formula(joined.latex, joined.unit or unit)


def _unit(words: list[str]) -> str:
    square = next(
        (power for word, power in (("square", "^2"), ("sq", "^2"), ("cubic", "^3")) if words and words[0].lower() == word), ""
    )
    name = re.sub(r"[.,;{} ]", "", "".join(words[bool(square) :][:1]))
    base, power = re.fullmatch(r"([^\^]*)(\^[23])?.*", name).groups()
    unit = UNITS.get(base) or UNITS.get(base.lower(), "")
    return unit + (square or power or "") if unit else ""


def _formula(text: str) -> Formula | None:
    """Split words from the formula in a text without delimiters."""
    currency = _CURRENCY.findall(text)
    text, unit = _without_unit(_CURRENCY.sub("", text))
    text = _EQUALS.sub(r"\1=", WRAPPED.sub(r" \1 ", WRAPPED.sub(r" \1 ", text)))
    text = re.sub(r"(?<=\d)\s*(?:percent(?:age)?|per cent|pct)\b", "%", text)
    pieces, words = _pieces(text)
    formulas = [piece for piece in pieces if _MATHS.search(piece) and not (words and piece in ("a", "A", "I"))]
    if len(set(formulas)) != 1 or re.search(r"\d\s+\d(?!\d*/)|[(\[]$", formulas[0]):
        return None
    last = pieces.index(formulas[0])
    unit = unit or _unit(words[last : last + 2]) or (UNITS.get(currency[0].lstrip("\\"), "") if currency else "")
    return Formula(_latex(formulas[0]), unit)


def _without_unit(text: str) -> tuple[str, str]:
    r"""Split units that are not words from the end of a text: 5 m, 5 km/h, 5\text{ m}. Returns the text and the unit."""
    text = _TEXT_POWER.sub(r" \1^\2 ", text)
    if (match := _RATE.search(text)) and match[1].lower() in UNITS and match[2].lower() in UNITS:
        return text[: match.start()], f"{UNITS[match[1].lower()]}/{UNITS[match[2].lower()]}"
    match = _ONE_LETTER_UNIT.fullmatch(text) or _ONE_LETTER_TEXT.fullmatch(text)
    return (match[1], match[2].lower() + re.sub(r"[{} ]", "", match[3] or "")) if match else (text, "")


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
