"""Split a batch over several calls of ``grpo_loss`` or ``linear_grpo_loss`` whose losses add up to the loss of one call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlmkernels.ops.grpo_loss.config import GRPOLossConfig


class Part(NamedTuple):
    """The arguments of one of the calls."""

    accumulation_steps: float
    config: GRPOLossConfig


def in_parts(
    config: GRPOLossConfig, sequences: Sequence[int], tokens: Sequence[int], accumulation_steps: float = 1
) -> list[Part]:
    """The arguments of the call for each part of a batch, so that the losses add up to the loss of one call for the batch.

    A loss is a mean over completions or over tokens, and an entropy bonus is a mean over tokens. Each call computes the mean
    over its part, so it is weighted by the part's share of the completions or tokens. Pass the ``num_items`` of the batch to
    every call. An entropy quantile is computed per part unless ``entropy_threshold`` is given; the entropy bonus of the
    selected tokens is weighted by all tokens of the part.

    Args:
        config: the objective of the batch.
        sequences: for each part, the number of its completions.
        tokens: for each part, the number of its tokens in the loss mask.
        accumulation_steps: the value for one call with the whole batch.
    """

    def shares(counts: Sequence[int]) -> list[float]:
        return [count / sum(counts) if count else 1.0 for count in counts]  # an empty part has nothing to weight

    token_shares = shares(tokens)
    loss_shares = shares(sequences) if config.aggregation.sequences else token_shares
    parts = []
    for share, entropy_share in zip(loss_shares, token_shares, strict=True):
        scaled = config
        if config.entropy_coef and share != entropy_share:
            scaled = config.replace(entropy_coef=config.entropy_coef * entropy_share / share)
        parts.append(Part(accumulation_steps / share, scaled))
    return parts


def combine_metrics(
    config: GRPOLossConfig, sequences: Sequence[int], metrics: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Combine the metrics of the parts of a batch: sums are added, means are averaged, weighted by their numbers of elements.

    Nothing waits for the device.

    Args:
        config: the objective of the batch.
        sequences: for each part, the number of its completions.
        metrics: for each part, its metrics, computed with one advantage per completion.
    """
    tokens = torch.stack([part["tokens"] for part in metrics])
    per_sequence = config.level == "sequence" or config.loss.surrogate == "vespo"
    clipped = torch.tensor(sequences).to(tokens, non_blocking=True) if per_sequence else tokens
    result = {}
    for name in metrics[0]:
        values = torch.stack([part[name] for part in metrics])
        counts = clipped if name.startswith(("clip_ratio", "cispo", "vespo")) else tokens
        if name.startswith("perception"):
            counts = torch.stack([part["perception/tokens"] for part in metrics])
        if name in ("policy_loss", "tokens", "effective_tokens", "perception/tokens"):
            result[name] = values.sum()
        elif name.endswith(("min", "max")):
            extreme, unmeasured = (torch.amax, -torch.inf) if name.endswith("max") else (torch.amin, torch.inf)
            measured = counts > 0
            # Not values[measured], whose size depends on values: this would wait for the device.
            result[name] = torch.where(measured.any(), extreme(values.where(measured, unmeasured), 0), extreme(values, 0))
        else:
            result[name] = (values * counts).sum() / counts.sum().clamp(min=1)
    return result
