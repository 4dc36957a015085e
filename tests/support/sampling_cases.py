"""Sampling computed plainly, with the logits processors of transformers, to compare ``sample_logps`` with."""

import math
from typing import NamedTuple

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from support.budget import assert_within_budget

# How far from a boundary between two tokens the sums of a backend may place it, as a share of the whole.
ROUNDING = 2e-6


class Plain(NamedTuple):
    """``probabilities`` (N, V) that the tokens are sampled with, and ``log_p`` (N, V) of the full softmax."""

    probabilities: torch.Tensor
    log_p: torch.Tensor

    def results(self, ids):
        """logps, log_kept_mass and entropy of the tokens."""
        logps, q = (x.gather(1, ids.unsqueeze(1)).squeeze(1) for x in (self.log_p, self.probabilities))
        entropy = -(self.log_p.exp() * self.log_p.masked_fill(self.log_p.isneginf(), 0)).sum(1)
        return {"logps": logps, "log_kept_mass": logps - q.log(), "entropy": entropy}


def plain(
    logits,
    *,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    min_p=None,
    repetition_penalty=1.0,
    seen=None,
    banned=None,
    banned_rows=None,
):
    """The distribution of ``sample_logps`` as transformers computes it, in the dtype of ``logits``."""
    scores = logits
    if repetition_penalty != 1:
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty), scores)
    if banned is not None:
        scores = scores.masked_fill(banned if banned_rows is None else banned[banned_rows], -torch.inf)
    scores = scores / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = first_of_equal(scores, TopPLogitsWarper(top_p)(None, scores))
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return Plain(scores.softmax(1), (logits / temperature).log_softmax(1))


def first_of_equal(scores, filtered):
    """``filtered`` with as many of the least kept scores, but those of the smallest ids: transformers' sort is not stable."""
    least = filtered.masked_fill(filtered.isneginf(), torch.inf).amin(1, keepdim=True)
    equal = scores == least
    number = (equal & ~filtered.isneginf()).sum(1, keepdim=True)
    return scores.masked_fill((scores < least) | (equal & (equal.cumsum(1) > number)), -torch.inf)


def assert_inverts_the_cdf(ids, probabilities, uniform):
    """Assert that each token has a probability, and that ``uniform`` is in its part of [0, 1), up to rounding."""
    probability = probabilities.gather(1, ids.unsqueeze(1)).squeeze(1)
    assert probability.gt(0).all()
    end = probabilities.double().cumsum(1).gather(1, ids.unsqueeze(1)).squeeze(1)
    assert (uniform <= end + ROUNDING).all(), (uniform - end).max()
    assert (uniform >= end - probability - ROUNDING).all(), (end - probability - uniform).max()


def assert_samples(result, logits, uniform, **options):
    """Assert that ``result`` is what ``uniform`` samples from ``logits``, with the values of these tokens within budget."""
    exact = plain(logits.double(), **options)
    assert_inverts_the_cdf(result.ids, exact.probabilities, uniform)
    values, eager = exact.results(result.ids), plain(logits.float(), **options).results(result.ids)
    for name, value in values.items():
        scale = max(math.log(logits.shape[1]), value.abs().max().item())
        assert_within_budget(name, getattr(result, name), eager[name], value, scale=scale)
