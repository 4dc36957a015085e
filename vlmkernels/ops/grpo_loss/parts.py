"""A batch in several calls of ``grpo_loss`` or ``linear_grpo_loss``, whose losses and gradients add up to those of one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlmkernels.ops.grpo_loss.config import GRPOLossConfig


class Part(NamedTuple):
    """What one of the calls is given."""

    accumulation_steps: float
    config: GRPOLossConfig


def in_parts(
    config: GRPOLossConfig, sequences: Sequence[int], tokens: Sequence[int], accumulation_steps: float = 1
) -> list[Part]:
    """How to call for each part of a batch, all of which count as one call with ``accumulation_steps`` would.

    A loss is a mean over completions or over tokens, an entropy bonus always over tokens, and each call takes it over its own:
    so it is weighted by what the part has of them. ``num_items``, where it is given, is the batch's in every call. A quantile
    of the entropy is each part's own, unless ``entropy_threshold`` says otherwise, and the bonus of the tokens that it chooses
    is weighted by all tokens.

    Args:
        sequences, tokens: of each part, its completions and those of their tokens that count.
    """

    def shares(counts: Sequence[int]) -> list[float]:
        return [count / sum(counts) if count else 1.0 for count in counts]  # 1: of nothing

    of_entropy = shares(tokens)
    of_loss = shares(sequences) if config.aggregation.sequences else of_entropy
    parts = []
    for share, entropy_share in zip(of_loss, of_entropy, strict=True):
        scaled = config
        if config.entropy_coef and share != entropy_share:
            scaled = config.replace(entropy_coef=config.entropy_coef * entropy_share / share)
        parts.append(Part(accumulation_steps / share, scaled))
    return parts


def combine_metrics(
    config: GRPOLossConfig, sequences: Sequence[int], metrics: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The metrics of the whole: what adds up is added up, means are weighted by what they count.

    Args:
        sequences: of each part, its completions.
        metrics: of each part, with one advantage per completion.
    """
    tokens = torch.stack([part["tokens"] for part in metrics])
    per_sequence = config.level == "sequence" or config.loss.surrogate == "vespo"
    clipped = tokens.new_tensor(sequences) if per_sequence else tokens
    result = {}
    for name in metrics[0]:
        values = torch.stack([part[name] for part in metrics])
        counts = clipped if name.startswith(("clip_ratio", "cispo", "vespo")) else tokens
        if name in ("policy_loss", "tokens", "effective_tokens"):
            result[name] = values.sum()
        elif name.endswith(("min", "max")):
            measured = values[counts > 0]
            result[name] = (measured if len(measured) else values).aminmax()[name.endswith("max")]
        else:
            result[name] = (values * counts).sum() / counts.sum()
    return result
