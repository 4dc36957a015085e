"""Parse option letters and yes or no."""

import re

from vlmkernels.rewards.answers.only import only

_OPTION = re.compile(r"[(\[]?([A-Za-z])[)\].:]?")
_OPTIONS = re.compile(
    r"(?<![A-Za-z])(?:\(([A-Z])\)|([A-Z])[).:](?![A-Za-z])|(?:[Aa]nswer|[Oo]ption)(?: is)?:? ([A-Z])(?![A-Za-z]))"
)
_YES_NO = re.compile(r"\b(yes|no)\b")


def parse_choice(text: str) -> str | None:
    """Parse the only option letter in a text: "B", "(b)", "**B.** a cat", "The answer is B"."""
    text = text.replace("*", "").strip()
    if match := _OPTION.fullmatch(text):
        return match[1].upper()
    return only([next(filter(None, groups)) for groups in _OPTIONS.findall(text)])


def parse_yes_no(text: str) -> str | None:
    """Return "yes" or "no", whichever occurs in a text, or None if both or neither occur."""
    return only(_YES_NO.findall(text.lower()))
