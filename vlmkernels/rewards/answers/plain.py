"""One way of writing the same answer: ASCII minus signs and digits, no Markdown, no LaTeX wrappers.

All parsers of numbers, options, yes or no, and formulas begin with these functions.
"""

import re
import unicodedata

_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe58\ufe63\uff0d"), "-")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_QUOTES = {**dict.fromkeys(map(ord, "\u2018\u2019\u2032"), "'"), **dict.fromkeys(map(ord, "\u201c\u201d"), '"')}
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3002: "."}
_CHARACTERS = {**_FULL_WIDTH, **_SIGNS, **_INVISIBLE, **_QUOTES}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")

_FRACTION = re.compile("[¼-¾⅐-⅞]")
_POWER = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
_OTHER_DIGIT = re.compile(r"[^\x00-\x7f]")
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
# As in CommonMark, emphasis begins before and ends after a character that is not a space, and not within a word: 2*3*4.
_EMPHASIS = re.compile(r"(?<![\w*\\^])(\*{1,3}|_{1,3}|`{1,3}|~~)(?=\S)([^\n]{1,300}?)(?<=\S)\1(?![\w*])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_GLM_BOX = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)  # how GLM-4.1V and GLM-4.5V write \boxed{}
_WRAPPERS = r"boxed|fbox|text(?:bf|it|rm|tt|sf|normal)?|mbox|math(?:rm|bf|it|sf|tt|normal)|operatorname|emph|underline|bf|rm"
WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}|(\d)\s*(\d))")
_SYMBOLS = re.compile(
    r"\\(times|cdot|div|approx|sim|circ|degree|%|\$|#|&|_|left|right|displaystyle|[,;:!> ]|quad|qquad)(?![a-z])"
)
_SYMBOL = {"times": "×", "cdot": "×", "div": "÷", "approx": "~", "sim": "~", "circ": "°", "degree": "°",
           "%": "%", "$": "$", "#": "#", "&": "&", "_": "_", "!": "", "left": "", "right": ""}  # fmt: skip
_AMOUNT = re.compile(r"(?<=[-+])\s?\$\s?|\b(?:US|AU|CA|HK|NZ|[ACS])\$")
_MOST_NESTED = 8
_MOST_BOXES = 20


def ascii_text(text: str) -> str:
    """Write minus signs, digits, quotes and spaces in ASCII, superscripts with ``^``, fractions with ``/``, boxes in LaTeX."""
    text = _GLM_BOX.sub(r"\\boxed{\1}", text)
    if not text.isascii():
        text = _THIN_SPACE.sub("", text).translate(_CHARACTERS)
        text = _FRACTION.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
        text = _POWER.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
        text = _OTHER_DIGIT.sub(lambda match: _digit_or_space(match[0]), text)
    return text.strip()


def _digit_or_space(character: str) -> str:
    return " " if character.isspace() else str(unicodedata.decimal(character, character))


def without_markdown(text: str) -> str:
    """Remove the marks of Markdown for headings, bold, italic and code."""
    text = re.sub(r"^\s*(?:#{1,6}|>)\s+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", text)
    for _ in range(3):
        text, count = _EMPHASIS.subn(r"\2", text)
        if not count:
            break
    return text


def boxed(text: str) -> list[str]:
    r"""Return the different contents of the ``\boxed{}`` in a text, up to the brace that closes each, in order."""
    found: dict[str, None] = {}
    end = 0
    while (match := _BOX.search(text, end)) and len(found) < _MOST_BOXES:
        end, depth = match.end(), 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        found[text[match.end() : end - (not depth)].strip()] = None
    return list(found)


def plain(text: str) -> str:
    r"""Return an answer as plain text: what is in its ``\boxed{}``, if it has one, without Markdown and LaTeX.

    ``"**Answer:** $\text{B}$"`` becomes ``"Answer: B"``, ``"\frac{1}{2}"`` becomes ``"1/2"``, and U+2212 becomes ``"-"``.
    """
    text = without_markdown(ascii_text(text)).replace("{,}", ",")
    if "\\" not in text:
        return _without_dollars(text)
    text = "; ".join(boxed(text)) or text
    text = _THIN_SPACE.sub("", text)
    for _ in range(_MOST_NESTED):
        before = text
        text = _LATEX_FRACTION.sub(_slash, WRAPPED.sub(r" \1 ", text))
        if text == before:
            break
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = _SYMBOLS.sub(lambda match: _SYMBOL.get(match[1], " "), text)
    text = re.sub(r"\^\s*\{?\s*°\s*\}?", "°", text)
    return _without_dollars(text)


def _without_dollars(text: str) -> str:
    """Remove dollar signs, of LaTeX and of amounts, so that a sign before one stays with its number: -$5."""
    return _AMOUNT.sub("", text).replace("$", " ").strip() if "$" in text else text.strip()


def _slash(match: re.Match[str]) -> str:
    over, under = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    apart = " " if match.start() and match.string[match.start() - 1].isalnum() else ""
    return f"{apart}{over}/{under} " if re.fullmatch(r"-?\w+", over) and under.isalnum() else f"{apart}({over})/({under}) "
