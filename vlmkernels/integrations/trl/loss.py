"""``trl.GRPOTrainer._compute_loss`` by ``linear_grpo_loss``: the loss, and what TRL logs of it."""

import copy
import math

import torch
from trl.trainer.utils import nanmax, nanmin

from vlmkernels.models.head import objective_of
from vlmkernels.ops.grpo_loss import GRPOLossConfig

# The arguments of _get_per_token_logps_and_entropies that come from a batch, beside its tokens.
MEDIA = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


def loss_config(args) -> GRPOLossConfig:
    """The objective of a ``trl.GRPOConfig``; what changes it from step to step, or is added to it, is in ``compute_loss``."""
    args = copy.copy(args)
    args.use_adaptive_entropy, args.router_aux_loss_coef = False, None
    return GRPOLossConfig.from_trl(args)


class _Threshold:
    """The least entropy that counts under top_entropy_quantile, over the tokens of all processes, once it is known."""

    def __init__(self, accelerator, quantile: float) -> None:
        self.accelerator, self.quantile, self.value = accelerator, quantile, -math.inf

    def __call__(self, entropy: torch.Tensor) -> torch.Tensor:
        entropy = self.accelerator.gather(self.accelerator.pad_across_processes(entropy, pad_index=math.nan))
        entropy = entropy if len(entropy) else entropy.new_zeros(1)
        self.value = entropy.nanquantile(1 - self.quantile)
        return self.value


def compute_loss(trainer, scoring, config: GRPOLossConfig, logps_of, model, inputs: dict) -> torch.Tensor:
    """The loss of TRL's micro-batch; metrics go where TRL's own function puts them.

    Args:
        logps_of: TRL's own ``_get_per_token_logps_and_entropies``, which makes the inputs of a model out of a batch's.
    """
    accelerator, train = trainer.accelerator, trainer.model.training
    window = trainer.current_gradient_accumulation_steps if train else 1
    completion_ids, counts = inputs["completion_ids"], inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        counts = counts & inputs["tool_mask"].bool()
    num_items = inputs["num_items_in_batch"].clamp(min=1).float() / accelerator.num_processes
    coef = _entropy_coef(trainer)
    threshold = _Threshold(accelerator, config.top_entropy_quantile)
    rollout_logps = inputs.get("sampling_per_token_logps")
    reads_rollout = config.rollout_correction or config.off_policy_mask_threshold is not None
    rows = {
        "advantages": inputs["advantages"],
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs["ref_per_token_logps"] if config.beta else None,
        "rollout_logps": rollout_logps if reads_rollout else None,
    }
    shared = {
        "num_items": num_items * window / trainer.args.steps_per_generation if train else num_items,
        "accumulation_steps": window,
        "entropy_threshold": threshold if config.top_entropy_quantile < 1 else None,
        "config": config if coef == config.entropy_coef else config.replace(entropy_coef=coef),
    }
    results = []

    def score(micro):
        micro = micro.of(counts)
        in_order = {name: None if x is None else x[micro.order] for name, x in rows.items()}
        result, output = scoring.run(model, micro, objective_of(micro.tokens, **in_order, **shared))
        results.append(result)
        return micro.unpacked(result.logps), micro.unpacked(result.entropy), output

    _, _, aux_loss = logps_of(
        trainer,
        scoring.in_place_of(model, completion_ids.shape[1], inputs.get("num_images"), score),
        torch.cat([inputs["prompt_ids"], completion_ids], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        completion_ids.shape[1],
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in MEDIA},
    )
    (result,) = results
    loss, metrics = result.loss, trainer._metrics["train" if train else "eval"]
    if trainer._entropy_bonus_enabled:
        active = result.entropy[result.entropy >= threshold.value]
        _control_entropy(trainer, metrics, shared["config"], loss.detach(), active, window)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux_loss / window
        metrics["aux_loss"].append(accelerator.gather_for_metrics(aux_loss).mean().item())
    _record(accelerator, metrics, config, result, inputs["advantages"])
    return loss


def _entropy_coef(trainer) -> float:
    """Of this step: an adaptive one is off while the entropy is above its target."""
    off = trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    return 0.0 if off else trainer.entropy_coef


def _control_entropy(trainer, metrics, config, loss, active: torch.Tensor, window: int) -> None:
    """Log what the entropy bonus does, and change its coefficient as the entropy of the window's ``active`` tokens asks."""
    accelerator, args, train = trainer.accelerator, trainer.args, trainer.model.training
    policy_loss = loss + config.entropy_coef * active.sum() / max(len(active), 1) / window
    if not config.aggregation.num_items:
        policy_loss = policy_loss * window
    metrics["policy_loss"].append(accelerator.gather(policy_loss).nanmean().item())
    if not train:
        return
    if trainer.use_adaptive_entropy:
        stats = torch.stack([active.sum(), active.new_tensor(len(active))])
        before = trainer._entropy_window_stats
        trainer._entropy_window_stats = stats if before is None else before + stats
        if accelerator.sync_gradients:
            total, count = accelerator.reduce(trainer._entropy_window_stats, reduction="sum").tolist()
            entropy = total / max(count, 1.0)
            step = args.entropy_coef_delta if entropy <= args.entropy_target else -args.entropy_coef_delta
            trainer.entropy_coef = min(max(trainer.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
            trainer._last_world_entropy, trainer._entropy_window_stats = entropy, None
    if accelerator.sync_gradients:
        metrics["entropy_coef"].append(trainer.entropy_coef)


def _record(accelerator, metrics, config: GRPOLossConfig, result, advantages: torch.Tensor) -> None:
    """TRL's metrics: means over the tokens (of a ratio of the sequence, the sequences) of all processes."""
    tokens = len(result.logps)
    by_sequence = (config.level == "sequence" or config.loss.surrogate == "vespo") and advantages.dim() == 1
    weights = dict.fromkeys(("kl", "entropy"), tokens)
    ratios = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "vespo/phi_seq_mean")
    weights |= dict.fromkeys(ratios, len(advantages) if by_sequence else tokens)
    named = {name: (result.metrics[name], weight) for name, weight in weights.items() if name in result.metrics}
    sums = [torch.stack([value * weight, value.new_tensor(weight)]) for value, weight in named.values()]
    totals = accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
    for name, (total, count) in zip(named, totals, strict=True):
        metrics[name].append(total / max(count, 1.0))
    if config.loss.low:
        ends = torch.stack([result.metrics["clip_ratio/low_min"], result.metrics["clip_ratio/high_max"]])
        ends = ends if tokens or by_sequence else ends.fill_(math.nan)  # nothing was there to be clipped
        low, high = accelerator.gather(ends).view(-1, 2).unbind(1)
        metrics["clip_ratio/low_min"].append(nanmin(low).item())
        metrics["clip_ratio/high_max"].append(nanmax(high).item())
