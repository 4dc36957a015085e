"""Checks that several rules share."""

from collections.abc import Callable
from functools import partial

from vlmkernels.doctor.completions import Row, example
from vlmkernels.doctor.history import WINDOW, Curve, Run, reward_of
from vlmkernels.doctor.rule import Evidence
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


def changed(name: str, factor: float, what: str, key: Key | None = None, least: float = 0.0) -> Check:
    """Return a check whether a metric rose (or fell) by a factor above (or below) 1 and by at least ``least``, without profit.

    The change must exceed three standard deviations of the metric's noise, and the reward must not have risen.

    Args:
        what: the beginning of the sentence, with the unit as {} after the numbers.
    """
    subject, _, unit = what.partition("{}")
    sign = 1 if factor > 1 else -1

    def check(run: Run) -> Evidence | None:
        curve = run.curve(name)

        def holds(value: float, step: int) -> bool:
            difference = sign * (value - curve.start)
            beyond = sign * (value - factor * curve.start) >= 0 and difference >= least and difference > 3 * curve.noise
            return curve.start > 0 and beyond and not run.improved(step)

        if (step := curve.since(holds)) is None:
            return None
        verb = "rose" if sign > 0 else "fell"
        text = f"{subject}{verb} from {short(curve.start)} to {short(curve.window())}{unit}, and the reward did not rise."
        return Evidence(step, text, name, curve.window(), curve.start, key and example(run, step, key))

    return check
