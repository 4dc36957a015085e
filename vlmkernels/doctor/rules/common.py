"""Checks that several rules share."""

from collections.abc import Callable
from functools import partial

from vlmkernels.doctor.completions import Row, example
from vlmkernels.doctor.history import SMALL, WINDOW, Curve, Run, reward_of
from vlmkernels.doctor.rule import NOTE, PROBLEM, Evidence
from vlmkernels.doctor.trend import Trend
from vlmkernels.record.html import short

Check = Callable[[Run], Evidence | None]
Key = Callable[[Row], object]  # the completion with the largest key is the example


def large_share(pattern: str, least: float, text: str, key: Key | None = None, kept: float = 0.0) -> Check:
    """Return a check whether a share is large.

    Args:
        pattern: name of the metric, with * for the name of a reward function.
        least: the smallest share that is large.
        text: the sentence, with {share} and {reward}.
        kept: part of the share at the beginning; a smaller share is falling, and no fault.
    """

    def check(run: Run) -> Evidence | None:
        for name in run.names(pattern):
            share = run.curve(name)
            limit = max(least, kept * share.start) if len(share) else least
            if (step := share.since(partial(_is_above, limit, share), 2 * WINDOW if kept else WINDOW)) is not None:
                sentence = text.format(share=f"{share.window():.0%}", reward=reward_of(name))
                shown = key and example(run, step, key)
                return Evidence(step, sentence, name, share.window(), share.start, shown)
        return None

    return check


def _is_above(limit: float, share: Curve, value: float, step: int) -> bool:
    # The median of the few values that a share of a small batch has can exceed the mean by far.
    return value >= limit and share.mean(share.count(step), windows=1)[0] >= limit


def changed(
    name: str, factor: float, what: str, key: Key | None = None, least: float = 0.0, may_be_intended: bool = False
) -> Check:
    """Return a check whether a metric rose (or fell) by a factor above (or below) 1 and by at least ``least``, without profit.

    The change must exceed three standard deviations of the metric's noise, and no rise of the reward must be visible.

    Args:
        what: the beginning of the sentence, with the unit as {} after the numbers.
        may_be_intended: whether the change is a problem only if the reward has fallen or its rise is excluded, else a note.
    """
    subject, _, unit = what.partition("{}")
    sign = 1 if factor > 1 else -1

    def check(run: Run) -> Evidence | None:
        curve, reward = run.curve(name), run.curve("reward")

        def holds(value: float, step: int) -> bool:
            difference = sign * (value - curve.start)
            beyond = sign * (value - factor * curve.start) >= 0 and difference >= least and difference > 3 * curve.noise
            return curve.start > 0 and beyond and not run.improved(step)

        if (step := curve.since(holds)) is None:
            return None
        verb = "rose" if sign > 0 else "fell"
        text = f"{subject}{verb} from {short(curve.start)} to {short(curve.window())}{unit}"
        text = f"{text} without a visible rise of the reward{_gain_of(reward)}."
        is_certain = is_stuck(run) or reward.has_fallen(curve.steps[-1])
        severity = NOTE if may_be_intended and not is_certain else PROBLEM
        return Evidence(step, text, name, curve.window(), curve.start, key and example(run, step, key), severity)

    return check


def _gain_of(reward: Curve) -> str:
    trend = reward.trend(len(reward)) if len(reward) else None
    return f" (a gain of {gain_text(trend)})" if trend else ""


def gain_text(trend: Trend) -> str:
    """Return the gain of a line with its standard error."""
    return f"{short(trend.line.gain)} +- {short(trend.line.error)}"


def is_stuck(run: Run, name: str = "reward") -> bool:
    """Whether a gain of a reward that matters is excluded."""
    curve = run.curve(name)
    trend = curve.trend(len(curve)) if len(curve) else None
    return trend is not None and trend.excludes(SMALL * run.spread(name))
