"""Point values, confidence intervals and paired comparisons of metrics.

A metric is a function of sums: each completion contributes a vector of statistics (hits and ones for an accuracy, edit distance
and length for an error rate, true and false positives for a precision), the metric is computed from their totals. A bootstrap
replicate then is a vector of weights, and all replicates of a metric are one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

REPLICATES = 1000
CHUNK = 2**24  # weights at a time


class Statistic(Protocol):
    """What was measured on N samples with G completions each, G = 1 where the metric is one of a whole group."""

    shape: tuple[int, int]

    def value(self, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """The metric, (R,), with weights (R, N) of samples and (R, G) of seeds; NaN where there is nothing to divide by."""


@dataclass(frozen=True)
class Sums:
    """statistics: (N, G, K) fp64. finish: totals (R, K) to the metric (R,)."""

    statistics: np.ndarray
    finish: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        return self.statistics.shape[:2]

    def value(self, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.finish(np.einsum("rgk,rg->rk", np.tensordot(samples, self.statistics, 1), seeds))


def mean_of(scores: np.ndarray) -> Sums:
    """The mean of scores (N, G); NaN counts as not scored."""
    scored = ~np.isnan(scores)
    return Sums(np.stack([np.where(scored, scores, 0.0), scored], -1), lambda total: total[:, 0] / total[:, 1])


class Estimate(NamedTuple):
    """A metric and its confidence interval; num_samples is what it was measured on."""

    value: float
    low: float
    high: float
    num_samples: int


class Difference(NamedTuple):
    """A metric of one run minus that of another on the same samples; p_value is two-sided; test names how it was made."""

    value: float
    low: float
    high: float
    p_value: float
    test: str


def point_value(statistic: Statistic) -> float:
    num_samples, num_seeds = statistic.shape
    return float(statistic.value(np.ones((1, num_samples)), np.ones((1, num_seeds)))[0])


@lru_cache(maxsize=2)
def _weights(num_samples: int, options: "Bootstrap", start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each sample, (rows, num_samples), and each run, (rows, runs), is drawn; kept for the next metric of a group."""
    rng = np.random.default_rng([options.seed, start])
    draw = lambda n: rng.multinomial(n, np.full(n, 1 / n), rows).astype(np.float64)  # noqa: E731
    return draw(num_samples), draw(options.runs)


def _replicates(statistic: Statistic, options: "Bootstrap") -> np.ndarray:
    """The metric of R bootstrap replicates: the same ones for all metrics of as many samples, so that two runs are paired."""
    num_samples = statistic.shape[0]
    count = min(options.replicates, getattr(statistic, "max_replicates", options.replicates))
    step, parts = max(1, CHUNK // num_samples), []
    for start in range(0, options.replicates, step):
        samples, runs = _weights(num_samples, options, start, min(step, options.replicates - start))
        samples, runs = samples[: count - start], runs[: count - start]
        parts.append(statistic.value(samples, _per_completion(runs, statistic)))
        if start + step >= count:
            break
    return np.concatenate(parts)


def _per_completion(runs: np.ndarray, statistic: Statistic) -> np.ndarray:
    """Weights (R, G) of completions, from those of the runs (R, runs) that made them; ones for a metric of a whole group."""
    per_run = statistic.shape[1] // runs.shape[1]
    return np.repeat(runs, per_run, axis=1) if per_run else np.ones((len(runs), statistic.shape[1]))


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Samples are drawn with replacement, each with all its completions, so that both the choice of samples and chance in sampling
    are counted. Where completions come from several runs (training seeds), runs are drawn too, independently of samples; where
    they differ by chance alone that is too wide rather than too narrow (Owen, The pigeonhole bootstrap, 2007).
    """

    confidence: float = 0.95
    replicates: int = REPLICATES
    seed: int = 0
    runs: int = 1


def estimate(statistic: Statistic, options: Bootstrap = Bootstrap()) -> Estimate:
    """The metric with its percentile bootstrap interval."""
    low, high = _interval(_replicates(statistic, options), options.confidence)
    return Estimate(point_value(statistic), low, high, statistic.shape[0])


def _outcomes(statistic: Statistic) -> np.ndarray | None:
    """(N,) of 0 and 1, where each sample is either right or wrong and nothing else goes into the metric."""
    if not isinstance(statistic, Sums) or statistic.statistics.shape[1:] != (1, 2):
        return None
    hits, ones = statistic.statistics[:, 0].T
    return hits if (ones == 1).all() and np.isin(hits, (0, 1)).all() else None


def compare(ours: Statistic, theirs: Statistic, options: Bootstrap = Bootstrap()) -> Difference:
    """``ours - theirs`` on the same samples.

    The interval is a paired bootstrap's. The p-value is McNemar's (exact, by scipy) where each sample is right or wrong, else
    the paired bootstrap's: twice the smaller share of replicates on one side of 0.
    """
    from scipy.stats import binomtest

    values = _replicates(ours, options) - _replicates(theirs, options)
    low, high = _interval(values, options.confidence)
    value = point_value(ours) - point_value(theirs)
    a, b = _outcomes(ours), _outcomes(theirs)
    if a is not None and b is not None:
        won, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        return Difference(value, low, high, binomtest(won, won + lost).pvalue if won + lost else 1.0, "McNemar")
    values = values[~np.isnan(values)]
    share = min((values <= 0).sum(), (values >= 0).sum()) + 1  # + 1: no p-value is 0
    return Difference(value, low, high, min(1.0, 2 * share / (len(values) + 1)), "paired bootstrap")


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """The probability that one of k completions is right, (N,): ``1 - C(n - c, k) / C(n, k)``, unbiased.

    Args:
        correct: (N, n) of 0 and 1; c of a row are right.

    Source: https://arxiv.org/abs/2107.03374, equation 1.
    """
    n = correct.shape[1]
    wrong = n - correct.sum(1, keepdims=True)
    # C(n - c, k) / C(n, k) as a product of k factors; 0 as soon as there are fewer than k wrong ones.
    return 1 - np.clip((wrong - np.arange(k)) / (n - np.arange(k)), 0, None).prod(1)


def majority_at_k(answers: list[list], correct: np.ndarray, k: int) -> np.ndarray:
    """Whether the most frequent of k answers is right, (N,), the mean over the ``n // k`` runs of k completions.

    Args:
        answers: N lists of n answers, None where there is none: it has no vote. Of equally frequent ones the first wins.
        correct: (N, n) of 0 and 1.
    """
    result = np.zeros(len(answers))
    runs = correct.shape[1] // k
    for row, (given, right) in enumerate(zip(answers, correct, strict=True)):
        for start in range(0, runs * k, k):
            votes: dict = {}
            for index in range(start, start + k):
                if given[index] is not None:
                    votes.setdefault(given[index], []).append(index)
            if votes:
                result[row] += right[max(votes.values(), key=len)[0]] / runs
    return result
