"""Intervals, comparisons, pass@k and maj@k against scipy and first principles."""

import itertools

import numpy as np
import pytest

from vlmkernels.evaluate.statistics import Bootstrap, Sums, compare, estimate, majority_at_k, mean_of, pass_at_k, point_value

RNG = np.random.default_rng(0)


def test_interval_equals_scipy():
    from scipy.stats import bootstrap

    scores = RNG.random(40)
    theirs = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    ours = estimate(mean_of(scores[:, None]), Bootstrap(replicates=20_000))
    assert ours.value == pytest.approx(scores.mean())
    assert ours[1:3] == pytest.approx(tuple(theirs), abs=0.004)
    assert ours.num_samples == 40


def test_interval_of_a_ratio_of_sums_resamples_both():
    statistics = np.stack([RNG.integers(0, 5, 30), RNG.integers(5, 9, 30)], 1).astype(float)
    ours = estimate(Sums(statistics[:, None], lambda t: t[:, 0] / t[:, 1]), Bootstrap(replicates=4000))
    drawn = RNG.integers(30, size=(4000, 30))
    theirs = np.quantile(statistics[drawn, 0].sum(1) / statistics[drawn, 1].sum(1), [0.025, 0.975])
    assert ours[1:3] == pytest.approx(tuple(theirs), abs=0.01)


def test_unscored_completions_are_left_out():
    scores = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    assert point_value(mean_of(scores)) == pytest.approx(2 / 3)
    assert np.isnan(estimate(mean_of(np.full((3, 1), np.nan))).low)


def test_different_runs_widen_the_interval():
    scores = np.array([[0.0, 1.0]]) + np.zeros((50, 1))  # two seeds that disagree on everything
    alone = estimate(mean_of(scores))
    crossed = estimate(mean_of(scores), Bootstrap(runs=2))
    assert alone[:3] == (0.5, 0.5, 0.5)
    assert crossed[:3] == (0.5, 0.0, 1.0)


def test_mcnemar_and_paired_bootstrap():
    from scipy.stats import binomtest

    ours = np.array([1] * 12 + [0] * 3 + [1] * 20 + [0] * 5, float)[:, None]
    theirs = np.array([0] * 12 + [1] * 3 + [1] * 20 + [0] * 5, float)[:, None]
    result = compare(mean_of(ours), mean_of(theirs))
    assert result.test == "McNemar"
    assert result.p_value == pytest.approx(binomtest(12, 15).pvalue)
    assert result.value == pytest.approx(9 / 40)
    assert result.low < 9 / 40 < result.high
    same = compare(mean_of(ours), mean_of(ours))
    assert (same.value, same.p_value) == (0.0, 1.0)

    iou = RNG.random((60, 1))
    better = compare(mean_of(iou + 0.1 + 0.05 * RNG.standard_normal((60, 1))), mean_of(iou))
    assert better.test == "paired bootstrap"
    assert better.p_value < 0.01
    assert better.low > 0
    alike = compare(mean_of(iou + 0.3 * RNG.standard_normal((60, 1))), mean_of(iou))
    assert alike.low < 0 < alike.high
    assert alike.p_value > 0.05


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, k):
    correct = np.array([[float(i < c) for i in range(n)] for c in range(n + 1)])
    subsets = list(itertools.combinations(range(n), k))
    expected = [np.mean([row[list(subset)].any() for subset in subsets]) for row in correct]
    np.testing.assert_allclose(pass_at_k(correct, k), expected, atol=1e-12)


def test_majority():
    answers = [["a", "b", "b", None], ["a", "b", "c", "d"], [None, None, None, "x"], [None] * 4]
    correct = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], float)
    np.testing.assert_array_equal(majority_at_k(answers, correct, 4), [1, 1, 1, 0])  # the first of a tie; None has no vote
    np.testing.assert_array_equal(majority_at_k(answers, correct, 2), [0.5, 0.5, 0.5, 0])
    ungraded = np.full_like(correct, np.nan)
    np.testing.assert_array_equal(majority_at_k(answers, ungraded, 2), [np.nan] * 4)
