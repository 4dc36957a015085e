"""Find JSON values, Python literals and tuples of coordinates in a text."""

import ast
import json
import re
from typing import Any, NamedTuple

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
TWO, FOUR = (r"\(\s*" + r"\s*,\s*".join([NUMBER] * count) + r"\s*\)" for count in (2, 4))
_CORNERS = re.compile(rf"{FOUR}|{TWO}\s*,?\s*{TWO}")  # (x1, y1, x2, y2) or (x1, y1), (x2, y2)
_NUMBERS = re.compile(NUMBER)
_OPENING = re.compile(r"[\[{(]")
_LIST_OF_NUMBERS = re.compile(rf"\(\s*{NUMBER}\s*(?:[,)]|$)")
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[\]}])')
_BRACKETS = re.compile(r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'" + r"|[\[{(\]})]")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


class Found(NamedTuple):
    """A value in a text, with its place: ``text[start:end]``."""

    start: int
    end: int
    value: Any


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _end(text: str, start: int) -> int | None:
    """Return the end of the brackets that open at ``start``. Returns None if they are not closed in order."""
    open_brackets: list[str] = []
    for match in _BRACKETS.finditer(text, start):
        mark = match[0]
        if mark in _CLOSING:
            open_brackets.append(_CLOSING[mark])
        elif mark in _CLOSING.values():
            if mark != open_brackets.pop():
                return None
            if not open_brackets:
                return match.end()
    return None


def is_balanced(text: str) -> bool:
    """Whether all brackets outside quotes are closed in order."""
    place = 0
    while match := _BRACKETS.search(text, place):
        end = match.end() if match[0][0] in "\"'" else _end(text, match.start()) if match[0] in _CLOSING else None
        if end is None:
            return False
        place = end
    return True


def _python(text: str) -> Any:
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _unique([(ast.dump(key), None) for key in node.keys if key is not None])
    return ast.literal_eval(tree)


_FAILURES = (ValueError, SyntaxError, MemoryError, RecursionError, TypeError)


def _value(text: str, start: int) -> Found | None:
    """Read the JSON value or Python literal that begins at ``start``."""
    try:
        value, end = _JSON.raw_decode(text, start)
        return Found(start, end, value)
    except _FAILURES:
        end = _end(text, start)
    for read in (lambda found: _JSON.decode(_TRAILING_COMMA.sub(r"\1", found)), _python) if end is not None else ():
        try:
            return Found(start, end, read(text[start:end]))
        except _FAILURES:
            continue
    return None


def values_in(text: str) -> list[Found] | None:
    """Return the lists, dicts and tuples of coordinates in a text, in order, and not what is within them.

    A tuple is (x1, y1, x2, y2) or (x1, y1), (x2, y2); both become four numbers. Other parentheses are part of the text.
    Returns None if brackets cannot be read, for example because the text was cut off or a quote is not escaped.
    """
    found: list[Found] = []
    place = 0
    while match := _OPENING.search(text, place):
        start = match.start()
        if match[0] != "(":
            value = _value(text, start)
        elif corners := _CORNERS.match(text, start):
            value = Found(start, corners.end(), tuple(map(float, _NUMBERS.findall(corners[0]))))
        elif _LIST_OF_NUMBERS.match(text, start):
            return None
        else:
            place = start + 1
            continue
        if value is None:
            return None
        found.append(value)
        place = value.end
    return found
