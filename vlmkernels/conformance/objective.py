"""The right values of advantages and losses in fp64, their rounding errors, and changes of a batch that must not matter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vlmkernels.conformance.batches import AdvantageBatch, LossBatch
from vlmkernels.ops.group_advantages import group_advantages
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO
from vlmkernels.ops.grpo_loss.inputs import LossInputs, Sequences, token_weights

PER_TOKEN = ("logps", "old_logps", "ref_logps", "rollout_logps", "entropy")


class Advantages(NamedTuple):
    """Advantages in fp64, (N,), and by what they were divided."""

    values: torch.Tensor
    divisor: torch.Tensor  # infinite where all rewards are equal


def expected_advantages(batch: AdvantageBatch, eps: float, ddof: int) -> Advantages:
    """Return the advantages of a trainer that adds ``eps`` to the standard deviation with ``ddof`` degrees of freedom."""

    def run(group_sizes: Sequence[int], baseline: str) -> Any:
        rewards = batch.rewards.double()
        arguments = {"weights": batch.weights, "scale": "none", "baseline": baseline, "backend": "reference"}
        return group_advantages(rewards, group_sizes=group_sizes, **arguments)

    centered = run(batch.group_sizes, batch.baseline).advantages
    if batch.scale == "none":
        return Advantages(centered, torch.ones_like(centered))
    sizes = batch.group_sizes if batch.scale == "group" else (len(batch.rewards),)
    moments = run(sizes, "mean")
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    scored = (~moments.rewards.isnan()).double()
    count = torch.zeros(len(sizes), dtype=torch.double).index_add_(0, index, scored)[index]
    std = moments.std * ((count - 1).clamp(min=0) / (count - ddof).clamp(min=1)).sqrt()
    divisor = torch.where(std == 0, torch.inf, std + eps)
    return Advantages(centered / divisor, divisor)


class LossValue(NamedTuple):
    """A loss and its gradient by ``logps``."""

    loss: torch.Tensor
    gradient: torch.Tensor
    outside: torch.Tensor = torch.zeros(())  # the largest gradient outside of the loss mask; NaN if one is NaN

    def __repr__(self) -> str:
        rows = [[float(f"{x:.7g}") for x in row] for row in self.gradient.tolist()]
        return f"{self.loss.item():.7g}, gradient {rows}, outside of the mask {self.outside.item():.7g}"


def _double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().double()


def expected_loss(batch: LossBatch, config: GRPOLossConfig) -> LossValue:
    """Return the loss of a whole batch and its gradient, in fp64."""
    logps = batch.logps.detach().double().requires_grad_()
    uses_rollout = config.rollout_correction is not None or config.off_policy_mask_threshold is not None
    out = grpo_loss(
        logps,
        batch.advantages.double(),
        old_logps=_double(batch.old_logps),
        ref_logps=_double(batch.ref_logps),
        loss_mask=batch.loss_mask,
        rollout_logps=_double(batch.rollout_logps) if uses_rollout else None,
        entropy=_double(batch.entropy),
        num_items=batch.tokens / batch.num_processes,
        accumulation_steps=batch.accumulation_steps,
        config=config,
        backend="reference",
    )
    (gradient,) = torch.autograd.grad(out.loss, logps)
    return LossValue(out.loss.detach(), gradient)


Change = Callable[[LossBatch], Sequence[LossBatch]]


def loss_and_gradient(
    adapter: Any, batch: LossBatch, config: GRPOLossConfig, change: Change = lambda batch: [batch]
) -> LossValue:
    """Return the loss of an adapter and its gradient by ``batch.logps``.

    The loss is that of the batches that ``change`` makes, as a trainer adds and averages them. The gradient passes through
    ``change``, so that it has the shape of the original batch; ``outside`` is that of the batches that the adapter got.
    """
    batch = replace(batch, logps=batch.logps.detach().clone().requires_grad_())
    batches = change(batch)
    loss = torch.stack([adapter.loss(each, config) for each in batches]).sum() / batches[0].num_processes
    inputs = [batch.logps, *(each.logps for each in batches)]
    gradient, *gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    outside = [x[~each.loss_mask].abs() for x, each in zip(gradients, batches, strict=True)]
    return LossValue(loss.detach(), gradient, torch.cat([*outside, loss.new_zeros(1)]).max())


def finite_differences(adapter: Any, batch: LossBatch, config: GRPOLossConfig, step: float = 2.0**-17) -> torch.Tensor:
    """Return the gradient of an adapter's loss by ``batch.logps`` from central differences, (B, T)."""
    out = torch.zeros_like(batch.logps)
    for row, column in batch.loss_mask.nonzero().tolist():
        for sign in (1, -1):
            logps = batch.logps.detach().clone()
            logps[row, column] += sign * step
            loss = adapter.loss(replace(batch, logps=logps.requires_grad_()), config).detach()
            out[row, column] += sign * loss / (2 * step)
    return out


# How much larger than |ratio A| the numbers are from which a surrogate is computed: 4 / tau in sapo; the exponent in vespo.
_AMPLIFICATION = {"ppo_clip": 1, "cispo": 1, "sapo": 4, "vespo": 16}


def magnitudes(batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
    """Return bounds of the numbers that add up to the loss, one for each token, (B, T); 0 outside of the mask.

    The rounding error of the loss is a few eps times their sum. The log-probabilities enter as factors, because they are
    rounded as well.
    """
    mask = batch.loss_mask

    def read(x: torch.Tensor | None) -> torch.Tensor:
        return torch.where(mask, logps if x is None else x.detach().double(), 0)

    logps = torch.where(mask, batch.logps.detach().double(), 0)
    log_ratio = logps - read(batch.old_logps)
    if config.level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    policy = batch.advantages.double().abs()[:, None] * (1 + ratio) * (1 + logps.abs())
    policy = policy * _AMPLIFICATION[config.loss.surrogate]
    if config.rollout_correction:
        policy = policy * max(config.rollout_clip_max or 1.0, 1.0)
    log_reference = read(batch.ref_logps) - logps
    kl = config.beta * (1 + logps.abs()) * (log_reference.clamp(max=MAX_LOG_RATIO).exp() + log_reference.square() + 1)
    if config.use_bias_correction_kl:
        kl = kl * (1 + ratio)
    entropy = abs(config.entropy_coef) * (0 if batch.entropy is None else read(batch.entropy).amax())
    return _share(batch, config) * (policy + kl + entropy)


def _share(batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
    """Return the weight of each token in the aggregation."""
    unused = dict.fromkeys(LossInputs._fields)
    given = {
        "logps": batch.logps.detach().double(),
        "advantages": batch.advantages.double(),
        "loss_mask": batch.loss_mask,
        "num_items": torch.tensor(batch.tokens / batch.num_processes),
        "accumulation_steps": float(batch.accumulation_steps),
    }
    inputs = LossInputs(**unused | given)
    share, factor = token_weights(inputs, config, Sequences(inputs))
    return (share * factor).view_as(batch.logps)


def tolerances(batch: LossBatch, config: GRPOLossConfig, units: float = 4.0) -> LossValue:
    """Return the largest rounding errors of the loss and of its gradient: ``units`` eps times the sum of the magnitudes.

    The gradient of a token is a mean over the tokens of its sequence if the ratio is per sequence.
    """
    terms = units * torch.finfo(batch.logps.dtype).eps * magnitudes(batch, config)
    gradient = terms.amax(1, keepdim=True) * batch.loss_mask if config.level == "sequence" else terms
    return LossValue(terms.sum(), gradient)


def map_tensors(
    batch: LossBatch, function: Callable[[torch.Tensor], torch.Tensor], names: Sequence[str] = PER_TOKEN
) -> LossBatch:
    """Apply a function to the tensors that are given, of those with these names."""
    return replace(batch, **{name: function(getattr(batch, name)) for name in names if getattr(batch, name) is not None})


def select_rows(batch: LossBatch, rows: Sequence[int]) -> list[LossBatch]:
    """Return the completions ``rows`` in this order."""
    return [map_tensors(batch, lambda x: x[list(rows)], (*PER_TOKEN, "advantages", "loss_mask"))]


def micro_batches(batch: LossBatch, accumulation_steps: int, num_processes: int) -> list[LossBatch]:
    """Cut a batch into the micro-batches of several processes, with as many completions each."""
    size = len(batch.logps) // (accumulation_steps * num_processes)
    whole = replace(
        batch, num_items=int(batch.loss_mask.sum()), accumulation_steps=accumulation_steps, num_processes=num_processes
    )
    starts = range(0, len(batch.logps), size)
    return [part for start in starts for part in select_rows(whole, range(start, start + size))]


def add_padding(batch: LossBatch, columns: int) -> list[LossBatch]:
    """Append columns that are not in the loss. Their values are those of the first column."""
    batch = map_tensors(batch, lambda x: torch.cat([x, x.detach()[:, :1].expand(-1, columns)], 1))
    return [replace(batch, loss_mask=torch.nn.functional.pad(batch.loss_mask, (0, columns)))]


def set_masked(batch: LossBatch, logps: float, others: float) -> list[LossBatch]:
    """Replace the values outside of the loss mask."""
    mask = batch.loss_mask
    batch = map_tensors(batch, lambda x: torch.where(mask, x, others), PER_TOKEN[1:])
    return [map_tensors(batch, lambda x: torch.where(mask, x, logps), PER_TOKEN[:1])]


def close_holes(batch: LossBatch) -> list[LossBatch]:
    """Move the tokens in the loss to the start of each completion, in order."""
    order = (~batch.loss_mask).int().argsort(dim=1, stable=True)
    return [map_tensors(batch, lambda x: x.gather(1, order), (*PER_TOKEN, "loss_mask"))]


def first_step(batch: LossBatch) -> list[LossBatch]:
    """Leave out ``old_logps``, as a trainer may in the first step after sampling."""
    return [replace(batch, old_logps=None)]


def repeat_tokens(batch: LossBatch, times: int) -> LossBatch:
    """Repeat the tokens of each completion."""
    return map_tensors(batch, lambda x: x.repeat(1, times), (*PER_TOKEN, "loss_mask"))
