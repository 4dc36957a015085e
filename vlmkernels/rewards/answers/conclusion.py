"""Find the last line of a solution that states its answer, such as "Final Answer: 5" or "#### 5"."""

import functools
import re
from collections.abc import Callable
from typing import TypeVar

from vlmkernels.rewards.answers.plain import ascii_text, boxed, without_markdown

T = TypeVar("T")

_STATED = re.compile(
    r"(?:####|\b(?:answer|ans)\b[^\n\d:=]{0,40}?(?:\bis\b(?!\s+not\b)|[:=])|^\s*(?:the\s+)?final\s+answer\s*$"
    r"|答案(?:是|为|:))[ \t]*:?",
    re.IGNORECASE | re.MULTILINE,
)
_STATED_AGAIN = re.compile(rf"\W*(?:(?:the|final|correct)\s+)*{_STATED.pattern}", _STATED.flags)
_EXPLANATION = re.compile(r"\n[ \t]*(?:explanation|reason(?:ing)?|rationale|justification)s?\s*:.*", re.IGNORECASE | re.DOTALL)
_POLITE = re.compile(r"I hope (?:it|this) is correct\.?\s*$", re.IGNORECASE)


def conclusion(text: str) -> str:
    r"""Return the statement of the answer at the end of a solution of several lines, without Markdown; else the whole text.

    "2 + 3 = 5\nThe answer is 5." becomes "5", and "5\nExplanation: 2 + 3" becomes "5". The text stays whole if it has text
    after the statement, or states different answers: which of them counts is then not clear. Contents of ``\boxed{}`` are
    left to the parsers.
    """
    text = without_markdown(ascii_text(text))
    if boxed(text):
        return text
    text = _POLITE.sub("", _EXPLANATION.sub("", text)).rstrip()
    after = [text[match.end() :].strip() for match in _STATED.finditer(text)]
    # Of "Final Answer: The answer is 5", only what follows the second is a statement.
    stated = {part.partition("\n")[0].rstrip(". ") for part in after if not _STATED_AGAIN.match(part)}
    return stated.pop() if len(stated) == 1 and "\n" not in after[-1] else text


def or_of_conclusion(parse: Callable[[str], T | None]) -> Callable[[str], T | None]:
    """Decorate a parser so that it parses the ``conclusion`` of a text that it cannot parse as a whole."""

    @functools.wraps(parse)
    def parsed(text: str) -> T | None:
        value = parse(text)
        if value is None and (last := conclusion(text)) != text:
            value = parse(last)
        return value

    return parsed
