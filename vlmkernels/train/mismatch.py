"""How far the trainer's log-probabilities are from those that completions were drawn with: metrics, and what corrects the loss.

The formulas are in docs/mismatch.md.
"""

import math
from functools import partial

import torch
from accelerate import Accelerator

from vlmkernels.ops.checks import require
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO
from vlmkernels.rollout.generate import Rollout

_sum, _greatest, _least, _log_sum = (
    partial(function, dim=0) for function in (torch.sum, torch.amax, torch.amin, torch.logsumexp)
)
# What is measured of some completions, and what makes one measurement of several.
COLUMNS = {
    "tokens": _sum,  # that count
    "scored": _sum,  # of those, with a log-probability of the engine's
    "difference": _sum,
    "greatest_difference": _greatest,
    "units": _sum,  # what the correction has a ratio for: tokens with a log-probability, or sequences
    "ratio": _sum,
    "outside": _sum,
    "sequences": _sum,
    "log_weight": _log_sum,  # so that the weights of long completions neither overflow nor vanish
    "log_squared_weight": _log_sum,
    "kept": _sum,  # of tokens that the engine tells it of
    "kept_of": _sum,
    "least_kept": _least,
}


class Mismatch:
    """Takes the engine's log-probabilities to the loss, and measures them against the trainer's.

    Args:
        config: of the loss.
        policy: one of ``ROLLOUT_POLICIES``, which the correction takes completions to be drawn from: "truncated", what
            sampling left of the vocabulary, with logps - log_kept_mass; "full", all of it, with logps.
    """

    def __init__(self, config: GRPOLossConfig, policy: str) -> None:
        self.config, self.policy = config, policy
        self._measured: list[torch.Tensor] = []

    def _drawn_with(self, rollout: Rollout, samples: torch.Tensor) -> torch.Tensor:
        """(B, C), the log-probabilities that the completions count as drawn with."""
        logps = rollout.logps[samples]
        if self.policy == "full" or self.config.rollout_correction is None:
            return logps
        rule = "be 'full' with an engine that does not tell log_kept_mass"
        require(rollout.log_kept_mass is not None, "rollout_policy", rule, repr(self.policy))
        return logps - rollout.log_kept_mass[samples]

    def rollout_logps(self, rollout: Rollout, samples: torch.Tensor) -> torch.Tensor | None:
        """``grpo_loss``'s argument for some completions, (B, C); None where the objective does not use it.

        Raises:
            ValueError: the correction needs what the engine does not tell.
        """
        correction = self.config.rollout_correction
        rule = "be None with an engine that does not tell log-probabilities"
        require(correction is None or rollout.logps is not None, "rollout_correction", rule, repr(correction))
        used = correction is not None or self.config.off_policy_mask_threshold is not None
        return self._drawn_with(rollout, samples) if used and rollout.logps is not None else None

    def add(self, rollout: Rollout, samples: torch.Tensor, counts: torch.Tensor, old_logps: torch.Tensor) -> None:
        """Measure some completions, without waiting for the device.

        Args:
            counts: (B, C) bool, their tokens that count.
            old_logps: (B, C), under the trainer's policy before the first step on them.
        """
        if rollout.logps is None:
            return
        scored = counts & ~rollout.logps[samples].isnan()
        difference = torch.where(scored, old_logps - rollout.logps[samples], 0).abs()
        log_ratios = old_logps - self._drawn_with(rollout, samples)
        told = counts & ~log_ratios.isnan()
        log_ratios = torch.where(told, log_ratios, 0)
        sequences, log_weights = counts.any(1), log_ratios.sum(1)
        if self.config.rollout_sequence_ratio == "mean":
            log_weights = log_weights / counts.sum(1).clamp(min=1)
        by_sequence = (self.config.rollout_correction or "token").startswith("sequence")
        log_ratios, units = (log_weights, sequences) if by_sequence else (log_ratios, told)
        bounds = self.config.scalars
        outside = (log_ratios < bounds.rollout_log_min) | (log_ratios > bounds.rollout_log_max)
        ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        log_weights = log_weights.masked_fill(~sequences, -torch.inf)
        log_kept = old_logps.new_full((), torch.nan) if rollout.log_kept_mass is None else rollout.log_kept_mass[samples]
        kept_of = counts & ~log_kept.isnan()
        values = {
            "tokens": counts.sum(),
            "scored": scored.sum(),
            "difference": difference.sum(),
            "greatest_difference": difference.max(),
            "units": units.sum(),
            "ratio": (ratios * units).sum(),
            "outside": (outside & units).sum(),
            "sequences": sequences.sum(),
            "log_weight": log_weights.logsumexp(0),
            "log_squared_weight": (2 * log_weights).logsumexp(0),
            "kept": torch.where(kept_of, log_kept.exp(), 0).sum(),
            "kept_of": kept_of.sum(),
            "least_kept": torch.where(kept_of, log_kept, torch.inf).min().exp(),
        }
        self._measured.append(torch.stack([values[name].to(difference.dtype) for name in COLUMNS]))

    def flush(self, accelerator: Accelerator) -> dict[str, float | None]:
        """The metrics of what was added since the last call, by all processes; None where nothing was measured."""
        if not self._measured:
            return {}
        measured = combined(torch.stack(self._measured))  # of as many parts as this process had
        self._measured.clear()
        total = combined(accelerator.gather(measured.unsqueeze(0)).cpu().double())
        return metrics(dict(zip(COLUMNS, total.tolist(), strict=True)), self.config)


def combined(measured: torch.Tensor) -> torch.Tensor:
    """(n, columns) -> (columns,)"""
    return torch.stack([function(column) for function, column in zip(COLUMNS.values(), measured.T, strict=True)])


def metrics(total: dict[str, float], config: GRPOLossConfig) -> dict[str, float | None]:
    """Of ``COLUMNS``, the metrics under TRL's names, where it has them."""

    def share(name: str, of: str) -> float | None:
        return total[name] / total[of] if total[of] else None

    scored, sequences = total["scored"] > 0, total["sequences"]
    effective = min(math.exp(2 * total["log_weight"] - total["log_squared_weight"]) / sequences, 1.0) if sequences else None
    named = {
        "sampling_logp_difference/mean": share("difference", "scored"),
        "sampling_logp_difference/max": total["greatest_difference"] if scored else None,
        "scored_ratio": share("scored", "tokens"),
        "effective_sample_size": effective if scored else None,
        "importance_sampling_ratio/raw_mean": share("ratio", "units") if scored else None,
    }
    if config.rollout_correction:
        named["importance_sampling_ratio/clipped"] = share("outside", "units")
    if total["kept_of"]:
        named |= {"kept_mass/mean": share("kept", "kept_of"), "kept_mass/min": total["least_kept"]}
    return {f"sampling/{name}": value for name, value in named.items()}
