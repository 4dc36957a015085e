"""Replacements for the scoring functions and policy losses of verl 0.9, with the same parameters and results.

In the training process::

    from vlmkernels.integrations.verl import patch_verl
    patch_verl()  # then set use_fused_kernels=True and, for example, policy_loss.loss_mode=vlmkernels_vanilla

verl trains in Ray workers. They patch themselves if their environment has
``VERL_USE_EXTERNAL_MODULES=vlmkernels.integrations.verl_workers``.

Apart from speed and memory, they differ from verl as follows:

- Hidden sizes need not be multiples of 128, and every device is supported.
- The entropy of ``FusedLinearForPPO`` is fp32. verl rounds it to the dtype of the hidden states.
- Logits of any size and sign are supported: the softmax subtracts their maximum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from vlmkernels.integrations.patch import Library, Patch
from vlmkernels.ops.arguments import as_mask
from vlmkernels.ops.checks import require_one_of
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.ops.linear_logps import VocabParallel, linear_logps
from vlmkernels.ops.linear_logps.parallel import Mean
from vlmkernels.ops.linear_logps.sweep import row_bytes

__all__ = ["POLICY_LOSSES", "FusedLinearForPPO", "linear_cross_entropy", "patch_verl"]


class FusedLinearForPPO(torch.nn.Module):
    """Compute log-probabilities and entropies from hidden states.

    Replaces ``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    Args:
        chunk_size: sets the memory for logits to what verl needs for this many tokens. For each of them verl stores four rows
            (logits, softmax, log-softmax and gradient), so this module processes four times as many tokens at once.
        impl_backend: "torch" or "liger"; has no effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        require_one_of("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities and entropies of tokens.

        Args:
            hidden_states: (N, H) or (B, T, H).
            vocab_weights: (V, H), the weight of the head.
            input_ids: (N,) or (B, T), the tokens, of any integer dtype.
            temperature: divides the logits.

        Returns:
            ``(log_probs, entropy)``, each in the shape of ``input_ids``, fp32. Gradients go to hidden_states and vocab_weights.
        """
        chunk_bytes = 4 * self.chunk_size * row_bytes(hidden_states, len(vocab_weights))
        return linear_logps(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature=temperature, return_entropy=True,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probabilities and entropies from hidden states.

    Replaces ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``.

    Args:
        hidden: (..., H), N tokens.
        weight: (V, H), the weight of the head; with ``dist_process_group``, this rank's shard. All shards have the same size.
        labels: (...) int64, the tokens.
        temperature: divides the logits.
        reduction: "none", "sum" or "mean", of the log-probabilities.
        dist_process_group: the ranks over which the vocabulary is sharded, in order. As in verl, the whole gradient of
            ``hidden`` is the sum over these ranks.

    Returns:
        ``(log_probs, entropy)``, fp32: the log-probabilities (N,), or () with a reduction, and the entropies (N,). Gradients go
        to hidden and weight.
    """
    require_one_of("reduction", reduction.lower(), _REDUCTIONS)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    shard = None
    if dist_process_group is not None:
        ranks = dist.get_world_size(dist_process_group)
        start = dist.get_rank(dist_process_group) * len(weight)
        shard = VocabParallel(dist_process_group, start, ranks * len(weight))
        hidden = Mean.apply(hidden, ranks)
    logps, entropy = linear_logps(
        hidden, weight, labels.reshape(-1), temperature=temperature, return_entropy=True, vocab_parallel=shard
    )
    reduce = _REDUCTIONS[reduction.lower()]
    return logps if reduce is None else reduce(logps), entropy


_REDUCTIONS = {"none": None, "sum": torch.sum, "mean": torch.mean}

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def _policy_loss(
    kind: str,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute verl's policy loss ``kind`` (vanilla, gspo or sapo) with ``grpo_loss``. Tensors are (B, T)."""
    if config is None:
        raise ValueError("config must be given (verl's actor configuration), got None")
    require_one_of("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    loss_mask = as_mask("response_mask", response_mask, log_prob.device)
    sequence_mean = kind == "sapo" or loss_agg_mode == "seq-mean-token-mean"
    objective = _objective(kind, config, sequence_mean)
    log_ratio = torch.where(loss_mask, log_prob - old_log_prob, 0).detach()
    drift = log_ratio if kind == "gspo" else log_ratio.clamp(-20, 20)
    if kind == "gspo":
        # GSPO's ratio of the sequence; its gradient uses the advantage of each token: arXiv:2507.18071, section 4.3.
        length = loss_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).clamp(max=10)
        old_log_prob = log_prob.detach() - log_ratio
    # The loss is homogeneous in the advantage, so a weight >= 0 can multiply the advantage.
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    mode = "seq-mean-token-mean" if sequence_mean else loss_agg_mode
    divisor = _divisor(mode, loss_mask, **config.get("global_batch_info", {}))
    loss = grpo_loss(log_prob, weighted, old_logps=old_log_prob, loss_mask=loss_mask, num_items=divisor, config=objective).loss
    if sequence_mean:
        loss = loss * (len(loss_mask) / divisor)
    return loss, _policy_metrics(kind, objective, log_ratio, drift, advantages, loss_mask)


def _objective(kind: str, config: Any, sequence_mean: bool) -> GRPOLossConfig:
    """Return the ``GRPOLossConfig`` of verl's actor configuration."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    cap = config.get("clip_ratio_c", 3.0) if kind == "vanilla" else None
    if cap is not None and cap < 1 + high:
        raise ValueError(f"clip_ratio_c must be >= 1 + clip_ratio_high = {1 + high}, got {cap}")
    return GRPOLossConfig(
        loss_type="sapo" if kind == "sapo" else "grpo" if sequence_mean else "dapo",
        epsilon_low=low,
        epsilon_high=high,
        delta=cap,
        sapo_temperature_pos=config.get("tau_pos", 1.0),
        sapo_temperature_neg=config.get("tau_neg", 1.05),
    )


def _divisor(
    mode: str,
    loss_mask: torch.Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> torch.Tensor | float:
    """Return the divisor of verl's ``agg_loss`` on this rank, for a sum over tokens or over the means of sequences."""
    by_tokens = mode == "token-mean"
    total = batch_num_tokens if by_tokens else global_batch_size
    if mode == "token-sum":
        total = 1
    elif total is None:
        if dp_size != 1:
            name = "batch_num_tokens" if by_tokens else "global_batch_size"
            raise ValueError(f"{name} must be given with dp_size = {dp_size}, got None")
        total = loss_mask.sum() if by_tokens else loss_mask.any(1).sum()
    if mode == "seq-mean-token-sum-norm":
        total = total * (loss_mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    return total / dp_size


def _policy_metrics(
    kind: str,
    objective: GRPOLossConfig,
    log_ratio: torch.Tensor,
    drift: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
) -> dict[str, float]:
    """Return verl's metrics: the share of clipped tokens, the KL estimate, and the share capped by clip_ratio_c."""

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask, values, 0).sum() / loss_mask.sum().clamp(min=1)

    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    ratio, zero = log_ratio.clamp(max=20).exp(), torch.zeros((), device=loss_mask.device)
    clipped = (ratio > high) & (advantages > 0) | (ratio < low) & (advantages < 0)
    values = {
        "actor/pg_clipfrac": zero if kind == "sapo" else mean(clipped.float()),
        "actor/ppo_kl": mean(-drift),
        "actor/pg_clipfrac_lower": zero,
    }
    if kind == "vanilla":
        values["actor/pg_clipfrac_lower"] = mean(((ratio > objective.delta) & (advantages < 0)).float())
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True))  # waits for the device once


# Values of ``actor.policy_loss.loss_mode``. Arguments, settings and metrics are the same as in verl.trainer.ppo.core_algos. One
# kernel computes the loss and its gradient, which are finite for any log-probabilities.
POLICY_LOSSES = {f"vlmkernels_{kind}": partial(_policy_loss, kind) for kind in ("vanilla", "gspo", "sapo")}

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "verl.utils.experimental.torch_functional:FusedLinearForPPO": FusedLinearForPPO,
    "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy": linear_cross_entropy,
}


def patch_verl() -> Patch:
    """Replace verl's ``FusedLinearForPPO`` and ``linear_cross_entropy`` and register ``POLICY_LOSSES``.

    Returns:
        The patch. It lasts until its ``undo()`` or the end of a ``with`` block.

    Raises:
        ModuleNotFoundError: verl is not installed.
        NotImplementedError: the installed version is not supported.
        RuntimeError: verl is patched already.
    """
    library = Library("patch_verl", "verl", ("0.9.",))
    library.check_version()
    registry = library.find_registry("verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY")
    return Patch("patch_verl", functions=library.find_functions(_REPLACEMENTS), entries=[(registry, POLICY_LOSSES)])
