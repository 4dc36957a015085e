"""Rules about the length of completions, and about rewards that are gained by length or repetition."""

import math
from itertools import accumulate
from statistics import fmean

from vlmkernels.doctor.completions import RECENT, Row, example, length_correlation, recent, repetition, rows_of, since
from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import COMPLETIONS, Evidence, Rule
from vlmkernels.doctor.rules.common import changed, large_share
from vlmkernels.record.html import short

LENGTH = "completions/mean_length"
CLIPPED = "completions/clipped_ratio"
REPEATED = "completions/frac_repeated"
CORRELATION = "reward_length_correlation"


def _length(row: Row) -> int:
    return len(row.text)


_cut_off = large_share(
    CLIPPED, 0.25, "{share} of the completions are cut off at max_completion_length, and scored unfinished.", _length, kept=0.8
)


def _truncated(run: Run) -> Evidence | None:
    length = run.curve(LENGTH)
    # Completions of one token, such as the letter of a choice, have no room for the end of the sequence.
    return None if len(length) and length.window() <= 1 else _cut_off(run)


def _by_length(run: Run) -> Evidence | None:
    return _by_logged_length(run) if run.curve(CORRELATION).covers(WINDOW) else _by_stored_length(run)


def _by_logged_length(run: Run) -> Evidence | None:
    length, correlation = run.curve(LENGTH), run.curve(CORRELATION)
    # The largest one so far counts: when all completions have the maximum length, there is no correlation.
    # Of many windows, the largest one exceeds that of most by some standard errors.
    least, error = correlation.least, 1.25 * correlation.noise / math.sqrt(correlation.width)
    windows = map(correlation.window, range(least, len(correlation) + 1))
    largest = list(accumulate((value if value > 4 * error else 0.0 for value in windows), max))

    def strongest(step: int) -> float:
        count = correlation.count(step)
        return largest[count - least] if count >= least else 0.0

    def holds(value: float, step: int) -> bool:
        has_grown = value >= 1.5 * length.start and value - length.start > 3 * length.noise
        return has_grown and strongest(step) >= 0.5

    if (step := length.since(holds)) is None:
        return None
    return _length_evidence(run, step, strongest(step), length.start, length.window(), "tokens")


def _by_stored_length(run: Run) -> Evidence | None:
    first = sorted(run.completions)[:RECENT]
    start = _mean_length(run, first)

    def holds(steps: list[int]) -> bool:
        if steps[0] <= first[-1] or len(rows_of(run, steps)) < 32:
            return False
        return _mean_length(run, steps) >= 1.5 * start and length_correlation(run, steps) >= 0.5

    if not (steps := since(run, holds)):
        return None
    now = _mean_length(run, next(recent(run)))
    return _length_evidence(run, steps[-1], length_correlation(run, steps), start, now, "characters")


def _mean_length(run: Run, steps: list[int]) -> float:
    return fmean([_length(row) for row in rows_of(run, steps)] or [0])


def _length_evidence(run: Run, step: int, value: float, start: float, now: float, unit: str) -> Evidence:
    text = f"Within groups, the correlation of reward and length is {value:.2f}; the mean length rose from {short(start)}"
    shown = example(run, step, lambda row: (row.advantage > 0, _length(row)))
    return Evidence(step, f"{text} to {short(now)} {unit}: length is rewarded.", LENGTH, now, start, shown)


def _by_repetition(run: Run) -> Evidence | None:
    share = run.curve(REPEATED)
    if share.covers(2 * WINDOW):
        start, now = share.start, share.window()
        step = share.since(lambda value, _: value >= max(0.3, start + 0.2))
    else:
        first = sorted(run.completions)[:RECENT]
        start = _mean_repetition(run, first)
        steps = since(run, lambda steps: steps[0] > first[-1] and _mean_repetition(run, steps) >= max(0.3, start + 0.2))
        step, now = (steps[-1], _mean_repetition(run, next(recent(run)))) if steps else (None, 0.0)
    if step is None:
        return None
    reward = "rose with it" if run.improved(step) else "did not rise"
    text = f"{now:.0%} of the sequences of four words or tokens occurred before in the same completion, at first {start:.0%}"
    return Evidence(
        step, f"{text}; the reward {reward}.", REPEATED, now, start, example(run, step, lambda row: repetition(row.text))
    )


def _mean_repetition(run: Run, steps: list[int]) -> float:
    return fmean([repetition(row.text) for row in rows_of(run, steps)] or [0])


RULES = (
    Rule(
        "length-explosion",
        "the mean length doubled, and the reward fell or has not risen; a note if it is too early to say",
        "Use loss_type='dapo' or 'dr_grpo' instead of a mean per completion, add the reward soft_overlong, or lower"
        " max_completion_length.",
        (LENGTH,),
        changed(LENGTH, 2, "The mean length {} tokens", _length, may_be_intended=True),
        "twice the length at the beginning; Dr. GRPO (arXiv 2503.20783), section 3",
    ),
    Rule(
        "length-collapse",
        "the mean length halved, and the reward fell or has not risen; a note if it is too early to say",
        "Remove rewards that favor short completions, or lower their weight in reward_weights; lower learning_rate.",
        (LENGTH,),
        changed(LENGTH, 0.5, "The mean length {} tokens", lambda row: -_length(row), may_be_intended=True),
        "half the length at the beginning",
    ),
    Rule(
        "truncation",
        "many completions are cut off, and their number does not fall",
        "Increase max_completion_length, add the reward soft_overlong, or set mask_truncated_completions=True.",
        (CLIPPED,),
        _truncated,
        "a quarter of the completions, and at least 0.8 times the share at the beginning; DAPO (arXiv 2503.14476), section 3.4",
    ),
    Rule(
        "reward-by-length",
        "longer completions of a group get higher rewards, and the length rises",
        "Make the reward independent of the length, or add the reward soft_overlong or cosine_length.",
        (f"{CORRELATION} or {COMPLETIONS}", f"{LENGTH} or {COMPLETIONS}"),
        _by_length,
        "a correlation of 0.5 (the length explains a quarter of the variance) and of four standard errors; 1.5 times the length"
        " at the beginning",
    ),
    Rule(
        "repetition",
        "completions repeat themselves more than at the beginning",
        "Add the reward repetition, or correct a reward that pays for repeated text; lower temperature if the text is noise.",
        (f"{REPEATED} or {COMPLETIONS}",),
        _by_repetition,
        "three of ten sequences of four words, 0.2 more than at the beginning",
    ),
)
