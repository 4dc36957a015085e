"""Point values, confidence intervals and paired comparisons of metrics.

A metric is a function of sums. Each completion contributes a vector of statistics, for example (correct, 1) for an accuracy,
(edit distance, length) for an error rate or (true positive, false positive) for a precision, and the metric is computed from
their totals. A bootstrap replicate is then a vector of weights, and all replicates of a metric are one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

REPLICATES = 1000
CHUNK = 2**24  # maximum number of weights in one matrix product


class Statistic(Protocol):
    """Measurements on N samples with G completions each.

    ``shape`` is (N, G). G is 1 for a metric that combines all completions of a sample, for example pass@k.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def value(self, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return R values of the metric, (R,), for weights of samples (R, N) and of completions (R, G); NaN for 0 / 0."""


@dataclass(frozen=True)
class Sums:
    """A metric of sums.

    Args:
        statistics: (N, G, K) fp64.
        finish: maps totals (R, K) to the metric, (R,).
    """

    statistics: np.ndarray
    finish: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        return self.statistics.shape[:2]

    def value(self, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.finish(np.einsum("rgk,rg->rk", np.tensordot(samples, self.statistics, 1), seeds))


def mean_of(scores: np.ndarray) -> Sums:
    """Return the mean of scores (N, G), without those that are NaN (not scored)."""
    scored = ~np.isnan(scores)
    return Sums(np.stack([np.where(scored, scores, 0.0), scored], -1), lambda total: total[:, 0] / total[:, 1])


class Estimate(NamedTuple):
    """A metric with its confidence interval and the number of samples that it was measured on."""

    value: float
    low: float
    high: float
    num_samples: int


class Difference(NamedTuple):
    """The difference of a metric between two runs on the same samples, with its two-sided p-value and the test's name."""

    value: float
    low: float
    high: float
    p_value: float
    test: str


def point_value(statistic: Statistic) -> float:
    """Return the metric without an interval."""
    num_samples, num_seeds = statistic.shape
    return float(statistic.value(np.ones((1, num_samples)), np.ones((1, num_seeds)))[0])


@lru_cache(maxsize=2)
def _weights(num_samples: int, options: "Bootstrap", start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each sample, (rows, num_samples), and each run, (rows, runs), is drawn in ``rows`` replicates.

    The result is cached, because all metrics of a group use the same draws.
    """
    rng = np.random.default_rng([options.seed, start])
    samples, runs = (rng.multinomial(n, np.full(n, 1 / n), rows).astype(np.float64) for n in (num_samples, options.runs))
    return samples, runs


def _replicates(statistic: Statistic, options: "Bootstrap") -> np.ndarray:
    """Return the metric of R bootstrap replicates. The draws depend only on the number of samples, which pairs two runs."""
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
    """Expand weights of runs (R, runs) to weights of completions (R, G). They are 1 if the metric combines completions."""
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
    """How confidence intervals are computed.

    Samples are drawn with replacement, each with all its completions, so that an interval covers both the choice of samples and
    the randomness of sampling. If completions come from several runs (training seeds), runs are drawn too, independently of
    samples. If runs differ by chance only, that interval is conservative (Owen, The pigeonhole bootstrap, 2007).

    Args:
        confidence: level of the intervals.
        replicates: number of bootstrap replicates.
        seed: seed of the draws.
        runs: number of runs that the completions of a sample come from, in equal parts.
    """

    confidence: float = 0.95
    replicates: int = REPLICATES
    seed: int = 0
    runs: int = 1


def estimate(statistic: Statistic, options: Bootstrap = Bootstrap()) -> Estimate:
    """Return the metric with its percentile bootstrap interval."""
    low, high = _interval(_replicates(statistic, options), options.confidence)
    return Estimate(point_value(statistic), low, high, statistic.shape[0])


def _outcomes(statistic: Statistic) -> np.ndarray | None:
    """Return which samples are correct, (N,) of 0 and 1, or None if the metric is not the share of correct samples."""
    if not isinstance(statistic, Sums) or statistic.statistics.shape[1:] != (1, 2):
        return None
    hits, ones = statistic.statistics[:, 0].T
    return hits if (ones == 1).all() and np.isin(hits, (0, 1)).all() else None


def compare(ours: Statistic, theirs: Statistic, options: Bootstrap = Bootstrap()) -> Difference:
    """Return ``ours - theirs`` on the same samples.

    The interval comes from the paired bootstrap. The p-value comes from McNemar's exact test if each sample is either correct
    or wrong. Otherwise it comes from the paired bootstrap: twice the smaller share of replicates on one side of 0.
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
    share = min((values <= 0).sum(), (values >= 0).sum()) + 1  # + 1, so that no p-value is 0
    return Difference(value, low, high, min(1.0, 2 * share / (len(values) + 1)), "paired bootstrap")


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Return the unbiased estimate of the probability that one of k completions is correct, ``1 - C(n - c, k) / C(n, k)``.

    Args:
        correct: (N, n) of 0 and 1; a row has c ones.
        k: at most n.

    Returns:
        (N,).

    Source: https://arxiv.org/abs/2107.03374, equation 1.
    """
    n = correct.shape[1]
    wrong = n - correct.sum(1, keepdims=True)
    # C(n - c, k) / C(n, k) is a product of k factors, one of which is 0 if fewer than k are wrong.
    return 1 - np.clip((wrong - np.arange(k)) / (n - np.arange(k)), 0, None).prod(1)


def majority_at_k(answers: list[list], correct: np.ndarray, k: int) -> np.ndarray:
    """Return whether the most frequent of k answers is correct, averaged over the ``n // k`` parts of k completions.

    Args:
        answers: N lists of n answers. None has no vote. The first of equally frequent answers wins.
        correct: (N, n) of 0 and 1; NaN for a sample whose answers are not graded.
        k: at most n.

    Returns:
        (N,); NaN for a sample whose answers are not graded.
    """
    result = np.where(np.isnan(correct).any(1), np.nan, 0.0)
    parts = correct.shape[1] // k
    for row, (given, is_correct) in enumerate(zip(answers, correct, strict=True)):
        for start in range(0, parts * k, k):
            votes: dict = {}
            for index in range(start, start + k):
                if given[index] is not None:
                    votes.setdefault(given[index], []).append(index)
            if votes:
                result[row] += is_correct[max(votes.values(), key=len)[0]] / parts
    return result
