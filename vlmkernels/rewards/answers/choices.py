"""Parse option letters and yes or no."""

import re

from vlmkernels.rewards.answers.conclusion import or_of_conclusion
from vlmkernels.rewards.answers.only import only
from vlmkernels.rewards.answers.plain import plain

_END = r"(?!(?a:\w)|[+&'/-]|\.\w)"  # after a letter that stands alone: not A+, R&B, A's or D.C.
_ALONE = re.compile(r"[\"'(\[{<]*\s*([A-Za-z])\s*[\"')\]}>.:,]*")
_LABEL = r"[(\[]?([A-Z])[)\].:]"

_ANSWER = (
    r"(?:\b(?:answer|option|choice|ans)s?\b(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?(?:\s+(?:option|choice))?"
    r"|答案(?:是|为)?|(?:选择|选项?)(?:是|为)?)\s*[:=.]?\s*"
)
_NAMED = [
    re.compile(rf"(?i:{_ANSWER})[(\[\"']?([A-Z]){_END}(?!\s+(?!(?:because|since|as|for|due|is|was|and|or)\b)[a-z])"),
    re.compile(rf"(?i:{_ANSWER})(?:[(\[]([a-z])[)\]]|([a-z])(?=[.)]?\s*(?:$|\n)|[).:]\s))"),
    re.compile(rf"\b(?:[Ii]t\s+is|[Ii]t's|(?:I|i)(?:'d|\s+would)?\s+(?:choose|pick|select|say|go\s+with)|must\s+be|should\s+be|选)\s+[(\[]?([A-Z]){_END}[)\]]?(?=[.,;)]|\s*$)"),
    re.compile(r"(?:\b(?:is|be)\s+|[:,]\s*)\(([A-Z])\)|(?<![A-Za-z])\(([A-Z])\)[.!]?\s*$"),
    re.compile(rf"^\s*{_LABEL}(?=\s|$)", re.MULTILINE),
    re.compile(r"^\s*[(\[]?([a-z])(?:[)\]](?=\s)|[.:]\s(?=\s*\w{2}))"),
    re.compile(r"^\s*([A-Z])\s*(?:$|、|\s-\s)", re.MULTILINE),
    re.compile(r"^\s*([A-HJ-Z])(?:,\s+|\s+\()(?=\w{2})"),  # B, cat; B (cat)
    re.compile(r"^\s*([A-J])\.(?=\d)|([A-Z])选项"),
    re.compile(r"(?:^|[.\n]\s*|\b(?:[Tt]hus|[Ss]o|[Hh]ence|[Tt]herefore),?\s+)([A-HJ-Z])\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"),
]  # fmt: skip
_OTHER_LABEL = re.compile(r"(?<![A-Za-z])\(?([A-Z])[).:](?=\s+\S)|(?:^|[.,;:!?)]\s*)([A-Z])[).:](?=\s|$)")  # within a list
_SEVERAL = re.compile(
    r"(?<![A-Za-z'])[(\[]?[A-Z][)\].]*\s*(?:,\s*(?:and|or)?|/|&|\+|\band\b|\bor\b|和|或)\s*[(\[]?[A-Z](?![A-Za-z'])"
    r"|[(\[][a-z][)\]]\s*(?:,|/|&|\band\b|\bor\b)\s*[(\[][a-z][)\]]"
)
_DENIED = re.compile(
    rf"(?i:\bnot|n't|\bneither|\bexcept)\s+(?:(?i:option|choice)\s+)?[(\[]?[A-Z]{_END}"
    r"|(?<![A-Za-z])[A-Z][)\].]*\s+(?:is|are|was)\s+(?:not|wrong|incorrect|false)\b"
)


@or_of_conclusion
def parse_choice(text: str) -> str | None:
    r"""Parse the only option letter in a text: "B", "(b)", "**B.** a cat", "The answer is B", "\boxed{\text{B}}".

    A capital letter within a sentence, as in "Vitamin C.", is not an option.
    """
    text = plain(text)
    if match := _ALONE.fullmatch(text):
        return match[1].upper()
    if _SEVERAL.search(text):
        return None
    allowed = _DENIED.sub(" ", text)
    named = _letters(_NAMED, allowed)
    return only(named + _letters([_OTHER_LABEL], allowed)) if named else None


def _letters(patterns: list[re.Pattern[str]], text: str) -> list[str]:
    return [next(filter(None, match.groups())).upper() for pattern in patterns for match in pattern.finditer(text)]


_OTHER_WORDS = {"true": "yes", "false": "no", "是": "yes", "是的": "yes", "有": "yes", "不是": "no", "否": "no", "没有": "no"}
_YES = re.compile(r"\byes\b")
_NO = re.compile(
    r"(?:^|[.,;:!?\n]\s*|\b(?:is|say|answer)\s+)no\s*(?=[.,;:!?\n()\"'…-]|$)"  # no, as an answer
    r"|^(?:so|well|answer:)?\s*no\s+(?=[a-z])|\bthere\s+(?:is|are|was|were)\s+no\b|\bno\s*$"  # no cat; there is no cat
)
_NO_IDIOM = re.compile(
    r"\bno\s+(?:doubt|one|way|idea|clue|wonder|question|matter|longer|more|less|reason|information|indication|evidence|need|point"
    r"|clear|problem|other)\b|\bno\.\s*\d"
)
_EITHER = re.compile(r"\byes\s*(?:/|\||or|and|,)\s*no\b|\bno\s*(?:/|\||or|and|,)\s*yes\b|\bnot\s+(?:a\s+)?[\"']?(?:yes|no)\b")


@or_of_conclusion
def parse_yes_no(text: str) -> str | None:
    """Return "yes" or "no" if a text answers one of them: "Yes, it is.", "Answer: No", "There is no cat."

    Returns None if it has both, or "no" in another sense, as in "It has no wheels", "no doubt" and "No. 5".
    """
    text = plain(text).lower().strip("\"'()[]{}<> ")
    if word := _OTHER_WORDS.get(text.rstrip(".!")):
        return word
    if _EITHER.search(_NO_IDIOM.sub(" ", text)):
        return None
    answers = ["yes"] * bool(_YES.search(text)) + ["no"] * bool(_NO.search(_NO_IDIOM.sub(" ", text)))
    if answers == ["yes", "no"] and re.match(r"yes\b(?=[.,;:!?])", text):  # Yes, there is no cat
        rest = _NO_IDIOM.sub(" ", text[3:])
        return None if re.search(r"\bno\s*(?:[.,;:!?\n)\"'-]|$)", rest) or "yes" in rest else "yes"
    return only(answers)
