"""What verl 0.9 scores and learns with, on this package's kernels: the same parameters and results.

In the process that trains::

    from vlmkernels.integrations.verl import patch_verl
    patch_verl()  # then use_fused_kernels=True, as ever; and, for example, policy_loss.loss_mode=vlmkernels_vanilla

verl trains in Ray's workers, which do that themselves where their environment has
``VERL_USE_EXTERNAL_MODULES=vlmkernels.integrations.verl_workers``.

Beside speed and memory there are these differences, all on purpose: hidden sizes need not be multiples of 128, and any device
will do; the entropy of ``FusedLinearForPPO`` is fp32, not rounded to the dtype of the hidden states; logits of any size and
sign are summed relative to their own maximum.
"""

from functools import partial

import torch
import torch.distributed as dist

from vlmkernels.integrations.patch import Patch
from vlmkernels.ops.checks import require, require_one_of
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.ops.linear_logps import VocabParallel, linear_logps
from vlmkernels.ops.linear_logps.parallel import Mean
from vlmkernels.ops.linear_logps.sweep import row_bytes

__all__ = ["POLICY_LOSSES", "FusedLinearForPPO", "linear_cross_entropy", "patch_verl"]


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropies from hidden states; ``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    ``impl_backend`` changes nothing. Logits take the memory that verl needs for ``chunk_size`` tokens: it holds them, their
    softmax, their log-softmax and their gradient, where we hold one matrix.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        require_one_of("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size = chunk_size

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        """
        Args:
            hidden_states: (N, H) or (B, T, H).
            vocab_weights: (V, H), the head.
            input_ids: (N,) or (B, T), the tokens predicted, of any integer dtype.
            temperature: divides the logits.

        Returns:
            ``(log_probs, entropy)``, each like ``input_ids``, fp32. Gradients go to hidden_states and vocab_weights.
        """
        chunk_bytes = 4 * self.chunk_size * row_bytes(hidden_states, len(vocab_weights))
        return linear_logps(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature=temperature, return_entropy=True,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip


REDUCTIONS = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}


def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """Log-probabilities and entropies from hidden states; ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``.

    Args:
        hidden: (..., H), N tokens.
        weight: (V, H), the head; with ``dist_process_group`` this process's part of it, of one size on all of them.
        labels: (...) int64, the tokens predicted.
        temperature: divides the logits.
        reduction: of the log-probabilities: none, sum or mean.
        dist_process_group: over which the vocabulary is spread, in the order of the ranks. The gradients by ``hidden`` of its
            processes then sum up to the whole, as verl's do.

    Returns:
        ``(log_probs, entropy)``, fp32: (N,), or () of a reduction; and (N,). Gradients go to hidden and weight.
    """
    require_one_of("reduction", reduction.lower(), REDUCTIONS)
    hidden, shard = hidden.reshape(-1, hidden.shape[-1]), None
    if dist_process_group is not None:
        processes = dist.get_world_size(dist_process_group)
        start = dist.get_rank(dist_process_group) * len(weight)
        shard = VocabParallel(dist_process_group, start, processes * len(weight))
        hidden = Mean.apply(hidden, processes)
    logps, entropy = linear_logps(
        hidden, weight, labels.reshape(-1), temperature=temperature, return_entropy=True, vocab_parallel=shard
    )
    return REDUCTIONS[reduction.lower()](logps), entropy


def _divisor(mode, mask, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """What verl's ``agg_loss`` divides by on this process: the sum over tokens, or over sequences of their means."""
    by_tokens = mode == "token-mean"
    total = batch_num_tokens if by_tokens else global_batch_size
    if mode == "token-sum":
        total = 1
    elif total is None:
        name = "batch_num_tokens" if by_tokens else "global_batch_size"
        require(dp_size == 1, name, f"be given with dp_size = {dp_size}", None)
        total = mask.sum() if by_tokens else mask.any(1).sum()
    if mode == "seq-mean-token-sum-norm":
        total = total * (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    return total / dp_size


AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def _policy_loss(
    kind, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """A policy loss of verl, ``kind`` vanilla, gspo or sapo, by ``grpo_loss``; see ``POLICY_LOSSES``."""
    require(config is not None, "config", "be given: verl's configuration of the actor", None)
    require_one_of("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    mask = response_mask != 0
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    cap = config.get("clip_ratio_c", 3.0) if kind == "vanilla" else None
    require(cap is None or cap >= 1 + high, "clip_ratio_c", f"be >= 1 + clip_ratio_high = {1 + high}", cap)
    averaged = kind == "sapo" or loss_agg_mode == "seq-mean-token-mean"
    objective = GRPOLossConfig(
        loss_type="sapo" if kind == "sapo" else "grpo" if averaged else "dapo",
        epsilon_low=low,
        epsilon_high=high,
        delta=cap,
        sapo_temperature_pos=config.get("tau_pos", 1.0),
        sapo_temperature_neg=config.get("tau_neg", 1.05),
    )
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0).detach()
    drift = log_ratio if kind == "gspo" else log_ratio.clamp(-20, 20)
    if kind == "gspo":
        # The sequence's ratio, whose gradient goes to each token by its own advantage: arXiv:2507.18071, section 4.3.
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).clamp(max=10)
        old_log_prob = log_prob.detach() - log_ratio
    # The loss is homogeneous in the advantage: a weight >= 0 of one is a factor of the other.
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    mode = "seq-mean-token-mean" if averaged else loss_agg_mode
    divisor = _divisor(mode, mask, **config.get("global_batch_info", {}))
    loss = grpo_loss(log_prob, weighted, old_logps=old_log_prob, mask=mask, num_items=divisor, config=objective).loss
    if averaged:
        loss = loss * (len(mask) / divisor)

    mean = lambda x: torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)  # noqa: E731
    ratio, nothing = log_ratio.clamp(max=20).exp(), torch.zeros((), device=mask.device)
    clipped = (ratio > 1 + high) & (advantages > 0) | (ratio < 1 - low) & (advantages < 0)
    values = [
        nothing if kind == "sapo" else mean(clipped.float()),
        mean(-drift),
        mean(((ratio > cap) & (advantages < 0)).float()) if kind == "vanilla" else nothing,
    ]
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return loss, dict(zip(names, torch.stack(values).tolist(), strict=True))


# For ``actor.policy_loss.loss_mode``: verl's losses of that name, one kernel for the loss and its gradient, finite whatever the
# log-probabilities. Arguments, settings and metrics are those of ``verl.trainer.ppo.core_algos``.
POLICY_LOSSES = {f"vlmkernels_{kind}": partial(_policy_loss, kind) for kind in ("vanilla", "gspo", "sapo")}


_REPLACEMENTS = {
    "verl.utils.experimental.torch_functional:FusedLinearForPPO": FusedLinearForPPO,
    "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy": linear_cross_entropy,
}


def patch_verl() -> Patch:
    """Give verl our ``FusedLinearForPPO`` and ``linear_cross_entropy`` and register ``POLICY_LOSSES``, until ``undo()`` of the
    result or the end of a ``with`` block.

    Raises: see ``vlmkernels.integrations.patch.Patch``.
    """
    registry = {"verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY": POLICY_LOSSES}
    return Patch("patch_verl", "verl", ("0.9.",), _REPLACEMENTS, registry)
