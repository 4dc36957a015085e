"""What the rules read from stored completions."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import fmean
from typing import Any, NamedTuple

from vlmkernels.doctor.history import Run, correlation
from vlmkernels.doctor.rule import Example

RECENT = 3  # stored steps that are compared with the first ones
NGRAM = 4  # words of the sequences whose repetition is counted
MAX_IMAGES = 4  # of an example
MAX_UNITS = 2000  # words of a completion that are read
MAX_CACHED = 2**14  # completions: windows of steps overlap, and a run in training is checked at every log
MARKS = ("<answer>", "\\boxed")  # of answers, in prompts that ask for them
ANSWERS = (
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"(?:final answer|answer is|answer:)\W*(.+)", re.IGNORECASE),
)
SPECIAL = re.compile(
    r"<\|?(?:image|video|audio|vision)_?(?:pad|start|end|token|soft_token)?\|?>|<\|?(?:pad|padding|endoftext|unk)\|?>|\[PAD\]|<img>"
    r"|<image_soft_token>|<IMG_CONTEXT>"
)


class Row(NamedTuple):
    """A stored completion, the group that holds it, and its step."""

    step: int
    group: dict[str, Any]
    row: dict[str, Any]

    @property
    def text(self) -> str:
        return str(self.row["text"])

    @property
    def advantage(self) -> float:
        return self.row["advantage"] or 0.0

    @property
    def is_scored(self) -> bool:
        return any(value is not None for value in self.row["rewards"].values())

    @property
    def total(self) -> float:
        """The sum of the rewards, without weights."""
        return sum(value or 0.0 for value in self.row["rewards"].values())

    def reward(self, name: str) -> float:
        return self.row["rewards"].get(name) or 0.0

    def example(self) -> Example:
        images = tuple(self.group["images"][:MAX_IMAGES])
        return Example(self.step, self.group["prompt"], self.text, self.row["rewards"], self.group["references"], images)


def rows_of(run: Run, steps: list[int]) -> list[Row]:
    """Return the completions of stored steps."""
    return [Row(step, group, row) for step in steps for group in run.completions[step] for row in group["completions"]]


def groups_of(run: Run, steps: list[int]) -> list[dict[str, Any]]:
    """Return the groups of stored steps that have completions. Batches that several steps train on are counted once."""
    groups: list[dict[str, Any]] = []
    previous: list[dict[str, Any]] = []
    for step in steps:
        if run.completions[step] != previous:
            groups += [group for group in run.completions[step] if group["completions"]]
        previous = run.completions[step]
    return groups


def recent(run: Run) -> Iterator[list[int]]:
    """Yield windows of ``RECENT`` stored steps, the last one first."""
    steps = sorted(run.completions)
    for end in range(len(steps), 0, -1):
        yield steps[max(0, end - RECENT) : end]


def since(run: Run, holds: Callable[[list[int]], bool]) -> list[int]:
    """Return the steps of the earliest window since which ``holds`` is true without a break; [] if it is false at the end."""
    found: list[int] = []
    for steps in recent(run):
        if not holds(steps):
            break
        found = steps
    return found


def example(run: Run, step: int, key: Callable[[Row], Any]) -> Example | None:
    """Return the completion with the largest key, of the first stored step from ``step`` on, else of the last one."""
    stored = sorted(run.completions)
    chosen = [s for s in stored if s >= step][:1] or stored[-1:]
    rows = rows_of(run, chosen)
    return max(rows, key=key).example() if rows else None


@lru_cache(MAX_CACHED)
def answer_of(text: str) -> str:
    """Return the marked answer of a completion, else all of its text after the reasoning, in a form that can be compared."""
    marked = [found[-1] for pattern in ANSWERS if (found := pattern.findall(text))]
    return " ".join((marked[0] if marked else text.rpartition("</think>")[2]).casefold().split())[:200]


def has_answer(text: str) -> bool:
    """Whether a completion marks its answer with a tag, a box or the word."""
    return any(pattern.search(text) for pattern in ANSWERS)


def context(group: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what makes the prompt of a group the same as another; None if its images are not stored."""
    if group.get("images_missing"):
        return None
    return group["prompt"], tuple(image[0] for image in group["images"]), tuple(sorted(group["references"].items()))


@lru_cache(MAX_CACHED)
def repetition(text: str) -> float:
    """Return the share of the sequences of ``NGRAM`` words that occurred before; of characters for a text without words."""
    units: Any = text.split()[:MAX_UNITS]
    units = units if len(units) >= 2 * NGRAM else text[:MAX_UNITS]
    if len(units) < 2 * NGRAM:
        return 0.0
    grams = [tuple(units[k : k + NGRAM]) for k in range(len(units) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def length_correlation(run: Run, steps: list[int]) -> float:
    """Return the correlation of advantages and lengths within the groups of stored steps."""
    advantages: list[float] = []
    lengths: list[float] = []
    for group in groups_of(run, steps):
        rows = group["completions"]
        advantages += _centered([row["advantage"] or 0.0 for row in rows])
        lengths += _centered([len(row["text"]) for row in rows])
    return correlation(advantages, lengths)


def _centered(values: list[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]


def most_common(values: list[Any]) -> tuple[Any, float]:
    """Return the most common of the values, and its share."""
    (value, count), *_ = Counter(values).most_common(1)
    return value, count / len(values)
