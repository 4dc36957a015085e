"""The inputs and outputs of the backends of ``grpo_loss``, besides the configuration."""

import math
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require_nowhere
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig


class LossInputs(NamedTuple):
    """The tensors of a call: (B, T), or (N,) with ``cu_seqlens``. All have one floating dtype unless noted.

    The fields are the first arguments of the operator, in the order of its schema.
    """

    logps: torch.Tensor
    advantages: torch.Tensor  # one per sequence, or in the shape of logps
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    loss_mask: torch.Tensor | None  # bool
    cu_seqlens: torch.Tensor | None  # (S + 1,) int32
    rollout_logps: torch.Tensor | None
    masked_logps: torch.Tensor | None  # NaN: the token has no masked images
    entropy: torch.Tensor | None
    entropy_threshold: torch.Tensor | None  # (): the policy term leaves out tokens with a lower entropy
    num_items: torch.Tensor | None  # (), on the CPU if the caller passed a number
    accumulation_steps: float

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All fields except accumulation_steps."""
        return self[:-1]

    @property
    def num_sequences(self) -> int:
        return len(self.logps) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def per_token(self) -> bool:
        """Whether there is one advantage per token, not per sequence."""
        return self.advantages.dim() == 2 or (self.cu_seqlens is not None and len(self.advantages) != self.num_sequences)

    def divides_by_tokens(self, config: GRPOLossConfig) -> bool:
        """Whether the weight of a token is divided by the sum of the loss mask."""
        row = config.aggregation
        return row.tokens or (row.num_items and self.num_items is None)

    def divisor(self, config: GRPOLossConfig) -> tuple[float, torch.Tensor | None, bool]:
        """Return the three factors of the number that divides the weight of a token.

        Returns:
            A number; a () tensor on the device of ``logps``, or None; whether the sum of the loss mask is the third factor.
        """
        row, number = config.aggregation, self.accumulation_steps
        if row.sequences:
            number *= max(self.num_sequences, 1)
        if row.max_length:
            assert config.max_completion_length is not None
            number *= config.max_completion_length
        if not row.num_items or self.num_items is None:
            return number, None, self.divides_by_tokens(config)
        if self.num_items.device.type != "cpu":
            return 1.0, self.num_items, False
        return self.num_items.item() or 1.0, None, False


class Sequences:
    """Sums over the tokens of each sequence, and the reverse: values of sequences for each of their tokens."""

    def __init__(self, inputs: LossInputs) -> None:
        self.size, num, device = inputs.num_sequences, inputs.logps.numel(), inputs.logps.device
        lengths = num // max(self.size, 1) if inputs.cu_seqlens is None else inputs.cu_seqlens.diff()
        # With output_size, repeat_interleave does not wait for the device.
        self.index = torch.arange(self.size, device=device).repeat_interleave(lengths, output_size=num)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """(N,) -> (S,)"""
        return x.new_zeros(self.size).index_add_(0, self.index, x)

    def per_token(self, x: torch.Tensor) -> torch.Tensor:
        """(S,) -> (N,)"""
        return x[self.index]


def token_weights(inputs: LossInputs, config: GRPOLossConfig, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of each token, (N,), 0 outside of the loss mask; and a factor () of all weights: 1 / tokens, or 1."""
    m = torch.ones_like(inputs.logps) if inputs.loss_mask is None else inputs.loss_mask.to(inputs.logps.dtype)
    m = m.flatten()
    number, tensor, by_tokens = inputs.divisor(config)
    length = sequences.per_token(sequences.total(m).clamp(min=1))
    share = (m / length if config.aggregation.per_length else m) / number
    if tensor is not None:
        share = share / torch.where(tensor == 0, 1, tensor)
    return share, 1 / m.sum().clamp(min=1) if by_tokens else m.new_ones(())


# The partial results of a sequence, which the kernels reduce over the batch: the last four columns are minima and maxima, the
# others are sums. GrpoColumn in csrc/common/grpo_loss.h and COLUMN_* in triton.py repeat this list, and a test compares them.
COLUMNS = (
    "loss",  # sum of weight * value
    "tokens",  # where the loss mask is true
    "units",  # what low and high are divided by: tokens, or one per sequence
    "low",
    "high",
    "kl",
    "entropy",
    "kept",  # tokens that the entropy threshold keeps
    "kept_entropy",
    "ratio",
    "rollout",
    "effective",  # tokens whose policy term counts
    "masked_kl",
    "masked_entropy",
    "masked_clipped",  # tokens whose perception KL has reached its bound
    "masked_tokens",  # tokens that have masked images
    "ratio_min",
    "ratio_max",
    "low_min",  # low / units of the sequence
    "high_max",
)

# The elements of ``stats``, an output of the forward pass. The gradients that it writes are not yet multiplied by the two
# scales, which are known only when the whole batch has been read. GrpoStat in csrc/common/grpo_loss.h and STAT_* in triton.py
# repeat this list, and a test compares them. The last four are left out without the terms of PAPO.
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
    "masked_kl",
    "masked_entropy",
    "masked_clipped",
    "masked_tokens",
)


def num_stats(config: GRPOLossConfig) -> int:
    """Return the number of elements of ``stats``."""
    return len(STATS) if config.perception else STATS.index("masked_kl")


# Means over the tokens that have masked images, except the last, which is the number of these tokens.
PERCEPTION_METRICS = {
    "perception/kl": "masked_kl",
    "perception/masked_entropy": "masked_entropy",
    "perception/clip_ratio": "masked_clipped",
    "perception/tokens": "masked_tokens",
}


def metrics(stats: torch.Tensor, inputs: LossInputs, config: GRPOLossConfig) -> dict[str, torch.Tensor]:
    """Return the elements of ``stats`` that have a meaning in this configuration, under TRL's names."""
    value, loss = dict(zip(STATS, stats.unbind(), strict=False)), config.loss
    result = {"policy_loss": value["policy_loss"]}
    if config.beta:
        result["kl"] = value["kl"]
    if inputs.entropy is not None:
        result["entropy"] = value["entropy"]
    if loss.low:
        result[f"{loss.low}_mean"], result[f"{loss.low}_min"] = value["low_mean"], value["low_min"]
        result[f"{loss.high}_mean"], result[f"{loss.high}_max"] = value["high_mean"], value["high_max"]
        result["clip_ratio/region_mean"] = value["region_mean"]
    elif loss.high:
        result[loss.high] = value["high_mean"]
    if inputs.old_logps is not None:
        result["ratio/mean"] = value["ratio_mean"]
        result["ratio/min"], result["ratio/max"] = value["ratio_min"], value["ratio_max"]
    if config.rollout_correction:
        result["sampling/importance_sampling_ratio/mean"] = value["rollout_mean"]
    if config.perception:
        for name, stat in PERCEPTION_METRICS.items():
            result[name] = value[stat]
    result["tokens"], result["effective_tokens"] = value["tokens"], value["effective_tokens"]
    return result


def entropy_quantile(entropy: torch.Tensor, mask: torch.Tensor | None, quantile: float) -> torch.Tensor:
    """Compute ``torch.quantile(entropy[mask], quantile)``, a () tensor, without waiting for the device."""
    values = entropy.detach().flatten()
    if values.numel() == 0:
        return values.new_zeros(())
    count = torch.full((), values.numel(), device=values.device)
    if mask is not None:
        values, count = torch.where(mask.flatten(), values, torch.inf), mask.sum()
    values = values.sort().values
    # In fp64: rounding in a narrower dtype can move a rank near the end of many values past the last one.
    rank = torch.full((), quantile, dtype=torch.float64, device=values.device) * (count - 1).clamp(min=0)
    below = rank.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    return torch.lerp(values[below], values[above], (rank - below).to(values.dtype))


def require_finite(inputs: LossInputs) -> None:
    """Check that all values are finite where the loss mask is true, and the advantages of sequences with a token in the mask.

    NaN in rollout_logps and masked_logps is valid: the token has no log-probability of the engine, or no masked images.
    """
    loss_mask = torch.ones_like(inputs.logps, dtype=torch.bool) if inputs.loss_mask is None else inputs.loss_mask
    for name in ("logps", "old_logps", "ref_logps", "rollout_logps", "masked_logps", "entropy", "advantages"):
        tensor, used = getattr(inputs, name), loss_mask
        if tensor is None:
            continue
        if name == "advantages" and not inputs.per_token:
            used = Sequences(inputs).total(loss_mask.flatten().to(tensor.dtype)) > 0
        bad = tensor.isinf() if name in ("rollout_logps", "masked_logps") else ~tensor.isfinite()
        require_nowhere(bad & used, name, "be finite (check_finite)", tensor)
    if inputs.num_items is not None and not 0 <= inputs.num_items.item() < math.inf:
        raise ValueError(f"num_items must be finite and >= 0 (check_finite), got {inputs.num_items.item()}")
