"""Metrics of sampled tokens, compared with values computed one completion at a time."""

import math

import pytest
import torch

from vlmkernels.ops.group_advantages import group_advantages
from vlmkernels.record.summary import NGRAM, length_correlation, repeated_share, token_metrics


def test_repeated_sequences_of_tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (20, 30), generator=generator)  # few tokens, so that sequences repeat
    mask = torch.arange(30) < torch.arange(0, 40, 2).unsqueeze(1)
    shares = []
    for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        seen = [tuple(row[start : start + NGRAM]) for start in range(length - NGRAM + 1)]
        shares.append((len(seen) - len(set(seen))) / max(len(seen), 1))
    assert max(shares) > 0.2
    torch.testing.assert_close(repeated_share(ids, mask), torch.tensor(shares))
    assert repeated_share(ids[:, : NGRAM - 1], mask[:, : NGRAM - 1]).tolist() == [0] * 20


def test_results_of_tools_between_sampled_tokens_are_not_counted():
    ids = torch.tensor([[1, 2, 3, 4, 5, 5, 5, 5, 5, 1, 2, 3, 4]])
    sampled = torch.tensor([[True] * 4 + [False] * 5 + [True] * 4])
    assert repeated_share(ids, sampled).tolist() == [0.5]
    unwanted = torch.zeros(6, dtype=torch.bool)
    unwanted[5] = True
    assert token_metrics(ids, sampled, unwanted)["completions/frac_special_tokens"] == 0
    unwanted[2] = True
    assert token_metrics(ids, sampled, unwanted)["completions/frac_special_tokens"] == 0.25


def test_correlation_of_rewards_and_lengths_within_groups():
    lengths = torch.tensor([1, 2, 3, 11, 12, 13])  # the second prompt has longer answers and smaller rewards
    rewards = torch.tensor([2.0, 3.0, 4.0, 0.0, 1.0, 2.0])
    assert length_correlation(group_advantages(rewards, 3), lengths, 3) == pytest.approx(1)
    assert length_correlation(group_advantages(-rewards, 3), lengths, 3) == pytest.approx(-1)
    mixed = torch.tensor([2.0, 4.0, 3.0, math.nan, 1.0, 1.0])  # (0, 1) and (1, 0) once each; one is not scored
    centered = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    deviations = torch.tensor([-1.0, 0.0, 1.0] * 2)
    expected = (centered @ deviations / centered.norm() / deviations.norm()).item()
    assert length_correlation(group_advantages(mixed, 3), lengths, 3) == pytest.approx(expected)
    assert length_correlation(group_advantages(torch.full((6,), 0.1), 3), lengths, 3) == 0
