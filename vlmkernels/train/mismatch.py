"""The difference between the log-probabilities of the trainer and of the rollout engine: metrics and input of the correction.

The formulas are in docs/mismatch.md.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator

from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO
from vlmkernels.rollout.base import Rollout

_sum, _max, _min, _logsumexp = (partial(f, dim=0) for f in (torch.sum, torch.amax, torch.amin, torch.logsumexp))
# The values that are measured over some completions, and the function that combines the values of several measurements.
COLUMNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tokens": _sum,  # in the loss
    "scored": _sum,  # tokens in the loss with a log-probability of the engine
    "compared": _sum,  # those of them with one over the whole vocabulary
    "difference": _sum,
    "max_difference": _max,
    "units": _sum,  # correction ratios: one per token with a log-probability, or one per sequence
    "ratio": _sum,
    "outside": _sum,  # ratios outside their bounds
    "sequences": _sum,
    "log_weight": _logsumexp,  # in log space, because weights of long completions overflow or underflow
    "log_squared_weight": _logsumexp,
    "kept": _sum,  # kept probability mass
    "kept_tokens": _sum,  # tokens with a kept mass
    "min_kept": _min,
}


class Mismatch:
    """Provides the engine's log-probabilities to the loss and compares them with the trainer's.

    Args:
        config: the configuration of the loss.
        policy: the distribution that the rollout correction assumes completions were sampled from. "truncated": what top_p,
            top_k, min_p and banned tokens left, ``sampling_logps`` or ``logps - log_kept_mass``. "full": the whole
            vocabulary, ``logps``.
    """

    def __init__(self, config: GRPOLossConfig, policy: str) -> None:
        self.config, self.policy = config, policy
        self._measurements: list[torch.Tensor] = []

    def _sampling_logps(self, rollout: Rollout, samples: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities (B, C) that the correction assumes the tokens were sampled with.

        Without a correction, those of the whole vocabulary if the engine returns them.
        """
        logps, correction = rollout.logps, self.config.rollout_correction
        if logps is not None and (self.policy == "full" or correction is None):
            return logps[samples]
        if rollout.sampling_logps is not None and (self.policy != "full" or correction is None):
            return rollout.sampling_logps[samples]
        if logps is None:
            raise ValueError(
                "rollout_policy must be 'truncated' with an engine that does not return log-probabilities of the whole "
                f"vocabulary, got {self.policy!r}"
            )
        if rollout.log_kept_mass is None:
            raise ValueError(
                "rollout_policy must be 'full' with an engine that does not return the kept probability mass, "
                f"got {self.policy!r}"
            )
        return logps[samples] - rollout.log_kept_mass[samples]

    @staticmethod
    def _is_scored(rollout: Rollout) -> bool:
        return rollout.logps is not None or rollout.sampling_logps is not None

    def rollout_logps(self, rollout: Rollout, samples: torch.Tensor) -> torch.Tensor | None:
        """Return the argument ``rollout_logps`` (B, C) of ``grpo_loss``, or None if the loss does not use it.

        Args:
            samples: (B,), indices of completions.

        Raises:
            ValueError: the correction needs values that the engine does not return.
        """
        correction = self.config.rollout_correction
        if correction is not None and not self._is_scored(rollout):
            raise ValueError(
                f"rollout_correction must be None with an engine that returns no log-probabilities, got {correction!r}"
            )
        is_used = correction is not None or self.config.off_policy_mask_threshold is not None
        return self._sampling_logps(rollout, samples) if is_used and self._is_scored(rollout) else None

    def add(self, rollout: Rollout, samples: torch.Tensor, loss_mask: torch.Tensor, old_logps: torch.Tensor) -> None:
        """Measure some completions. Does not synchronize the device.

        Args:
            samples: (B,), indices of completions.
            loss_mask: (B, C) bool, the tokens that count in the loss.
            old_logps: (B, C), log-probabilities under the trainer's policy before the first optimizer step on the batch.
        """
        if not self._is_scored(rollout):
            return
        logps = old_logps.new_full((), torch.nan) if rollout.logps is None else rollout.logps[samples]
        sampling_logps = self._sampling_logps(rollout, samples)
        compared = loss_mask & ~logps.isnan()
        difference = torch.where(compared, old_logps - logps, 0).abs()
        log_ratios = old_logps - sampling_logps
        has_ratio = loss_mask & ~log_ratios.isnan()
        log_ratios = torch.where(has_ratio, log_ratios, 0)
        sequences, log_weights = loss_mask.any(1), log_ratios.sum(1)
        if self.config.rollout_sequence_ratio == "mean":
            log_weights = log_weights / loss_mask.sum(1).clamp(min=1)
        is_per_sequence = (self.config.rollout_correction or "token").startswith("sequence")
        log_ratios, units = (log_weights, sequences) if is_per_sequence else (log_ratios, has_ratio)
        bounds = self.config.scalars
        outside = (log_ratios < bounds.rollout_log_min) | (log_ratios > bounds.rollout_log_max)
        ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        log_weights = log_weights.masked_fill(~sequences, -torch.inf)
        log_kept = old_logps.new_full((), torch.nan) if rollout.log_kept_mass is None else rollout.log_kept_mass[samples]
        has_kept = loss_mask & ~log_kept.isnan()
        values = {
            "tokens": loss_mask.sum(),
            "scored": (loss_mask & ~(sampling_logps if rollout.logps is None else logps).isnan()).sum(),
            "compared": compared.sum(),
            "difference": difference.sum(),
            "max_difference": difference.max(),
            "units": units.sum(),
            "ratio": (ratios * units).sum(),
            "outside": (outside & units).sum(),
            "sequences": sequences.sum(),
            "log_weight": log_weights.logsumexp(0),
            "log_squared_weight": (2 * log_weights).logsumexp(0),
            "kept": torch.where(has_kept, log_kept.exp(), 0).sum(),
            "kept_tokens": has_kept.sum(),
            "min_kept": torch.where(has_kept, log_kept, torch.inf).min().exp(),
        }
        self._measurements.append(torch.stack([values[name].to(difference.dtype) for name in COLUMNS]))

    def flush(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Return the metrics over all processes since the last call; None for a metric without measurements."""
        if not self._measurements:
            return {}
        # Processes may have measured different numbers of splits.
        measurement = combine(torch.stack(self._measurements))
        self._measurements.clear()
        total = combine(accelerator.gather(measurement.unsqueeze(0)).cpu().double())
        return metrics(dict(zip(COLUMNS, total.tolist(), strict=True)), self.config)


def combine(measurements: torch.Tensor) -> torch.Tensor:
    """Combine measurements (n, columns) into one (columns,)."""
    return torch.stack([function(column) for function, column in zip(COLUMNS.values(), measurements.T, strict=True)])


def metrics(total: dict[str, float], config: GRPOLossConfig) -> dict[str, float | None]:
    """Compute the metrics of a measurement, under TRL's names where TRL has the metric."""

    def mean(name: str, count: str) -> float | None:
        return total[name] / total[count] if total[count] else None

    is_scored, sequences = total["scored"] > 0, total["sequences"]
    sample_size = None
    if is_scored and sequences:
        sample_size = min(math.exp(2 * total["log_weight"] - total["log_squared_weight"]) / sequences, 1.0)
    result = {
        "sampling_logp_difference/mean": mean("difference", "compared"),
        "sampling_logp_difference/max": total["max_difference"] if total["compared"] else None,
        "scored_ratio": mean("scored", "tokens"),
        "effective_sample_size": sample_size,
        "importance_sampling_ratio/raw_mean": mean("ratio", "units") if is_scored else None,
    }
    if config.rollout_correction:
        result["importance_sampling_ratio/clipped"] = mean("outside", "units")
    if total["kept_tokens"]:
        result |= {"kept_mass/mean": mean("kept", "kept_tokens"), "kept_mass/min": total["min_kept"]}
    return {f"sampling/{name}": value for name, value in result.items()}
