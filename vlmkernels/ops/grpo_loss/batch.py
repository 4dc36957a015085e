"""What the backends of ``grpo_loss`` take and return, beside the configuration."""

import math
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require, require_nowhere
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig


class Batch(NamedTuple):
    """The tensors of a call: (B, T), or (N,) with ``cu_seqlens``; all of one floating dtype, but for what is noted."""

    logps: torch.Tensor
    advantages: torch.Tensor  # one per sequence, or like logps
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    mask: torch.Tensor | None  # bool
    cu_seqlens: torch.Tensor | None  # (S + 1,) int32
    rollout_logps: torch.Tensor | None
    entropy: torch.Tensor | None
    entropy_threshold: torch.Tensor | None  # (): tokens below it are not in the policy term
    num_items: torch.Tensor | None  # (), on the CPU where the caller gave a number
    accumulation_steps: float

    @property
    def num_sequences(self) -> int:
        return len(self.logps) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def per_token(self) -> bool:
        """Whether there is an advantage per token."""
        return self.advantages.dim() == 2 or (self.cu_seqlens is not None and len(self.advantages) != self.num_sequences)

    def divides_by_tokens(self, config: GRPOLossConfig) -> bool:
        """Whether the weight of a token is divided by the sum of the mask."""
        row = config.aggregation
        return row.tokens or (row.num_items and self.num_items is None)

    def divisor(self, config: GRPOLossConfig) -> tuple[float, torch.Tensor | None, bool]:
        """What the weight of a token is divided by: a number, times a () tensor on the device of ``logps``, times, where
        the flag is set, the sum of the mask."""
        row, number = config.aggregation, self.accumulation_steps
        if row.sequences:
            number *= max(self.num_sequences, 1)
        if row.max_length:
            number *= config.max_completion_length
        if not row.num_items or self.num_items is None:
            return number, None, self.divides_by_tokens(config)
        if self.num_items.device.type != "cpu":
            return 1.0, self.num_items, False
        return self.num_items.item() or 1.0, None, False


class Sequences:
    """Sums over the tokens of each sequence, and back."""

    def __init__(self, batch: Batch) -> None:
        self.size, num, device = batch.num_sequences, batch.logps.numel(), batch.logps.device
        lengths = num // max(self.size, 1) if batch.cu_seqlens is None else batch.cu_seqlens.diff()
        # With the size of the result given nothing waits for the device.
        self.index = torch.arange(self.size, device=device).repeat_interleave(lengths, output_size=num)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """(N,) -> (S,)"""
        return x.new_zeros(self.size).index_add_(0, self.index, x)

    def per_token(self, x: torch.Tensor) -> torch.Tensor:
        """(S,) -> (N,)"""
        return x[self.index]


def token_weights(batch: Batch, config: GRPOLossConfig, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each token, (N,), 0 outside of the mask; and a factor of them all that the batch decides, ()."""
    m = torch.ones_like(batch.logps) if batch.mask is None else batch.mask.to(batch.logps.dtype)
    m = m.flatten()
    number, tensor, by_tokens = batch.divisor(config)
    length = sequences.per_token(sequences.total(m).clamp(min=1))
    share = (m / length if config.aggregation.per_length else m) / number
    if tensor is not None:
        share = share / torch.where(tensor == 0, 1, tensor)
    return share, 1 / m.sum().clamp(min=1) if by_tokens else m.new_ones(())


# The columns of ``stats``, which the forward pass fills. The gradients it writes are still to be multiplied by the scales:
# what is known only once the whole batch is read.
STATS = (
    "policy_scale",
    "entropy_scale",
    "policy_loss",
    "kl",
    "entropy",
    "low_mean",
    "low_min",
    "high_mean",
    "high_max",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "tokens",
    "effective_tokens",
    "rollout_mean",
    "region_mean",
)  # fmt: skip


def metrics(stats: torch.Tensor, batch: Batch, config: GRPOLossConfig) -> dict[str, torch.Tensor]:
    """The columns of ``stats`` that mean something here, under TRL's names."""
    value, loss = dict(zip(STATS, stats.unbind(), strict=True)), config.loss
    result = {"policy_loss": value["policy_loss"]}
    if config.beta:
        result["kl"] = value["kl"]
    if batch.entropy is not None:
        result["entropy"] = value["entropy"]
    if loss.low:
        result[f"{loss.low}_mean"], result[f"{loss.low}_min"] = value["low_mean"], value["low_min"]
        result[f"{loss.high}_mean"], result[f"{loss.high}_max"] = value["high_mean"], value["high_max"]
        result["clip_ratio/region_mean"] = value["region_mean"]
    elif loss.high:
        result[loss.high] = value["high_mean"]
    if batch.old_logps is not None:
        result["ratio/mean"] = value["ratio_mean"]
        result["ratio/min"], result["ratio/max"] = value["ratio_min"], value["ratio_max"]
    if config.rollout_correction:
        result["sampling/importance_sampling_ratio/mean"] = value["rollout_mean"]
    result["tokens"], result["effective_tokens"] = value["tokens"], value["effective_tokens"]
    return result


def entropy_quantile(entropy: torch.Tensor, mask: torch.Tensor | None, quantile: float) -> torch.Tensor:
    """``torch.quantile(entropy[mask], quantile)`` without waiting for the device; () on it."""
    values = entropy.detach().flatten()
    if values.numel() == 0:
        return values.new_zeros(())
    count = torch.tensor(values.numel(), device=values.device)
    if mask is not None:
        values, count = torch.where(mask.flatten(), values, torch.inf), mask.sum()
    values = values.sort().values
    # In fp64: in a lesser dtype the rank of the last of many is one beyond it.
    rank = torch.full((), quantile, dtype=torch.float64, device=values.device) * (count - 1).clamp(min=0)
    below = rank.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    return torch.lerp(values[below], values[above], (rank - below).to(values.dtype))


def require_finite(batch: Batch) -> None:
    """Every value that counts is finite, a sequence's advantage where one of its tokens does; NaN in rollout_logps stands for a
    token without one."""
    mask = torch.ones_like(batch.logps, dtype=torch.bool) if batch.mask is None else batch.mask
    for name in ("logps", "old_logps", "ref_logps", "rollout_logps", "entropy", "advantages"):
        tensor, counts = getattr(batch, name), mask
        if tensor is None:
            continue
        if name == "advantages" and not batch.per_token:
            counts = Sequences(batch).total(mask.flatten().to(tensor.dtype)) > 0
        bad = tensor.isinf() if name == "rollout_logps" else ~tensor.isfinite()
        require_nowhere(bad & counts, name, "be finite (check_finite)", tensor)
    if batch.num_items is not None:
        num_items = batch.num_items.item()
        require(0 <= num_items < math.inf, "num_items", "be finite and >= 0 (check_finite)", num_items)
