"""Whether a metric rises or falls, with the uncertainty that its noise leaves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

PACES = 0.1, 1 / 3, math.inf  # of learning curves: the share of the run that makes 63% of the gain; inf: a straight line
# In standard errors. A gain of VISIBLE is visible; about 1% of the runs that gain nothing have one at some pace. A gain is
# excluded if it is EXCLUDED above the estimate, so far that every log may be tested, and if the estimate is at most HINT.
HINT, VISIBLE, EXCLUDED = 1.5, 2.5, 4.0
POWER = 0.84  # a gain of VISIBLE + POWER is visible in four of five runs
MIN_BLOCK = 4  # logs


class Fit(NamedTuple):
    """A learning curve: the value at the beginning, the gain up to the end, and the standard error of the gain."""

    start: float
    gain: float
    error: float


@dataclass(frozen=True)
class Trend:
    """Learning curves at several paces that were fitted to a metric.

    Attributes:
        fits: by pace.
        freedom: degrees of freedom of the standard errors.
    """

    fits: tuple[Fit, ...]
    freedom: int

    @property
    def line(self) -> Fit:
        return self.fits[-1]

    @property
    def detectable(self) -> float:
        """The gain that would be visible at every pace in four of five runs."""
        return (quantile(VISIBLE, self.freedom) + POWER) * max(fit.error for fit in self.fits)

    @cached_property
    def rising(self) -> list[Fit]:
        """The fits with a visible gain."""
        return [fit for fit in self.fits if fit.gain > max(quantile(VISIBLE, self.freedom) * fit.error, 1e-9)]

    @cached_property
    def falling(self) -> list[Fit]:
        """The fits with a visible loss."""
        return [fit for fit in self.fits if -fit.gain > max(quantile(VISIBLE, self.freedom) * fit.error, 1e-9)]

    def excludes(self, gain: float) -> bool:
        """Whether a gain can be excluded at every pace, and no gain is even indicated."""
        widest = quantile(EXCLUDED, self.freedom)
        return all(fit.gain <= HINT * fit.error and fit.gain + widest * fit.error < gain for fit in self.fits)


def fit(steps: Sequence[int], values: Sequence[float]) -> Trend:
    """Fit learning curves to at least three values.

    They are ``start + gain * (1 - exp(-time / pace)) / (1 - exp(-1 / pace))`` with a time from 0 to 1.
    """
    y, time = np.array(values), np.array(steps, dtype=float)
    time = (time - time[0]) / (time[-1] - time[0])
    found: list[tuple[float, float, float]] = []
    best, least = y, math.inf
    for pace in PACES:
        shape = time if pace == math.inf else np.expm1(-time / pace) / math.expm1(-1 / pace)
        centered = shape - shape.mean()
        spread = float(centered @ centered)
        gain = float(centered @ y) / spread
        residuals = y - y.mean() - gain * centered
        if (squares := float(residuals @ residuals)) < least:
            best, least = residuals, squares
        found.append((float(y.mean() - gain * shape.mean()), gain, spread))
    variance = _variance(best)
    return Trend(tuple(Fit(start, gain, math.sqrt(variance / spread)) for start, gain, spread in found), len(y) - 2)


def _variance(residuals: np.ndarray) -> float:
    """Return the variance of the residuals of a line.

    Neighbors may deviate together, for example in a batch of hard prompts. The sums of blocks then vary more than those of
    independent values, and the variance is that of independent values whose sums vary as much.
    """
    count = len(residuals)
    variance, length = float(residuals @ residuals) / (count - 2), math.isqrt(count)
    if length < MIN_BLOCK:
        return variance
    sums = np.convolve(residuals, np.ones(length), "valid")
    lost = 1 - 2 * length / count  # the part of the variance of sums that is left when a line has been subtracted
    return max(variance, float(sums @ sums) / (len(sums) * length * lost))


def quantile(z: float, freedom: int) -> float:
    """Return the quantile of Student's distribution for a quantile of the normal distribution (Cornish-Fisher)."""
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
