"""Find the answer in a completion and parse it. Parsers return None if the text has no answer or an ambiguous one.

Rejecting ambiguous answers prevents most hacks of rule-based rewards: a second ``<answer>``, a copy of the prompt's list of
options, "yes or no", all numbers from 0 to 9, many boxes where the question is about one.
"""

from collections.abc import Callable

from vlmkernels.rewards.answers.choices import parse_choice, parse_yes_no
from vlmkernels.rewards.answers.completion import THINK, Messages, ends_in_think, find_answer, has_format, is_copied, text_of
from vlmkernels.rewards.answers.coordinates import Boxes, as_boxes, parse_box, parse_boxes, parse_point
from vlmkernels.rewards.answers.formulas import parse_formula
from vlmkernels.rewards.answers.numbers import Percent, as_number, parse_count, parse_number
from vlmkernels.rewards.answers.plain import plain

__all__ = [
    "PARSERS", "THINK", "Boxes", "Messages", "Percent", "as_boxes", "as_number", "ends_in_think", "find_answer", "has_format",
    "is_copied", "parse_box", "parse_boxes", "parse_choice", "parse_count", "parse_formula", "parse_number", "parse_point",
    "parse_yes_no", "plain", "text_of",
]  # fmt: skip

# Kind of answer -> its parser.
PARSERS: dict[str, Callable[[str], object]] = {
    "text": str.strip,
    "number": parse_number,
    "count": parse_count,
    "choice": parse_choice,
    "yes_no": parse_yes_no,
    "box": parse_box,
    "boxes": parse_boxes,
    "point": parse_point,
}
