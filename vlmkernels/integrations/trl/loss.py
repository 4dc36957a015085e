"""``compute_loss``: replaces ``trl.GRPOTrainer._compute_loss`` by ``linear_grpo_loss``, with the same metrics."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from trl.trainer.utils import nanmax, nanmin

from vlmkernels.integrations.trl.masks import mask_seed
from vlmkernels.integrations.trl.scoring import MicroBatch, Scorer
from vlmkernels.models.head import packed_grpo_loss, top_entropy_threshold, with_masked_images
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.linear_grpo_loss import LinearGRPOLossOutput

# The arguments of _get_per_token_logps_and_entropies that come from a batch, besides its tokens.
MEDIA = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


def loss_config(args: Any) -> GRPOLossConfig:
    """Return the objective of a ``trl.GRPOConfig``, without the parts that ``compute_loss`` adds or changes per step."""
    args = copy.copy(args)
    args.use_adaptive_entropy, args.router_aux_loss_coef = False, None
    return GRPOLossConfig.from_trl(args)


def compute_loss(
    trainer: Any,
    scorer: Scorer,
    config: GRPOLossConfig,
    get_logps: Callable[..., tuple],
    model: torch.nn.Module,
    inputs: dict[str, Any],
) -> torch.Tensor:
    """Compute the loss of a micro-batch of TRL and log TRL's metrics.

    Args:
        trainer: the ``trl.GRPOTrainer``.
        scorer: its scorer.
        config: the objective, from ``loss_config``.
        get_logps: TRL's own ``_get_per_token_logps_and_entropies``, which builds the model inputs from a micro-batch.
        model: the model to train, wrapped or not.
        inputs: the micro-batch.
    """
    train = trainer.model.training
    window = trainer.current_gradient_accumulation_steps if train else 1
    coef = _entropy_coef(trainer)
    config = config if coef == config.entropy_coef else config.replace(entropy_coef=coef)
    threshold = torch.tensor(-math.inf)

    def global_threshold(entropy: torch.Tensor) -> torch.Tensor:
        nonlocal threshold
        threshold = top_entropy_threshold(trainer.accelerator, config.top_entropy_quantile, entropy)
        return threshold

    num_items = inputs["num_items_in_batch"].clamp(min=1).float() / trainer.accelerator.num_processes
    objective = partial(
        packed_grpo_loss,
        num_items=num_items * window / trainer.args.steps_per_generation if train else num_items,
        accumulation_steps=window,
        entropy_threshold=global_threshold if config.top_entropy_quantile < 1 else None,
        config=config,
    )
    rows = _row_arguments(config, inputs)
    seed = mask_seed(trainer) if config.perception else None
    result, aux_loss = _score(trainer, scorer, objective, rows, get_logps, model, inputs, seed)
    loss, metrics = result.loss, trainer._metrics["train" if train else "eval"]
    if trainer._entropy_bonus_enabled:
        active = result.entropy[result.entropy >= threshold.to(result.entropy.device)]
        _control_entropy(trainer, metrics, config, loss.detach(), active, window)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux_loss / window
        metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux_loss).mean().item())
    _log_metrics(trainer.accelerator, metrics, config, result, inputs["advantages"])
    return loss


def _score(
    trainer: Any,
    scorer: Scorer,
    objective: Callable[..., Callable[..., LinearGRPOLossOutput]],
    rows: dict[str, torch.Tensor | None],
    get_logps: Callable[..., tuple],
    model: torch.nn.Module,
    inputs: dict[str, Any],
    seed: int | None,
) -> tuple[LinearGRPOLossOutput, torch.Tensor | None]:
    """Run the model through TRL's method and return the loss of the micro-batch and the auxiliary loss of the model.

    Args:
        objective: ``packed_grpo_loss``, which still needs the loss mask and ``rows``.
        rows: from ``_row_arguments``.
        trainer, scorer, get_logps, model, inputs: see ``compute_loss``.
        seed: the seed of the masks of images, or None.
    """
    completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
    loss_mask = completion_mask.bool()
    if "tool_mask" in inputs:
        loss_mask = loss_mask & inputs["tool_mask"].bool()
    results = []

    def score(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Any]:
        micro = micro.select(loss_mask)
        ordered = {name: None if x is None else x[micro.order] for name, x in rows.items()}
        loss = objective(micro.mask, **ordered)
        if micro.masked is not None:
            loss = partial(with_masked_images, loss, micro.mask, micro.masked)
        result, output = scorer.run(model, micro, loss)
        results.append(result)
        return micro.unpack(result.logps), micro.unpack(result.entropy), output

    width = completion_ids.shape[1]
    _, _, aux_loss = get_logps(
        trainer,
        scorer.model_stub(model, width, inputs.get("num_images"), score, seed),
        torch.cat([inputs["prompt_ids"], completion_ids], 1),
        torch.cat([inputs["prompt_mask"], completion_mask], 1),
        width,
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in MEDIA},
    )
    (result,) = results
    return result, aux_loss


def _row_arguments(config: GRPOLossConfig, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Return the arguments of ``packed_grpo_loss`` that have a row per completion, in TRL's order."""
    reads_rollout = config.rollout_correction or config.off_policy_mask_threshold is not None
    return {
        "advantages": inputs["advantages"],
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs["ref_per_token_logps"] if config.beta else None,
        "rollout_logps": inputs.get("sampling_per_token_logps") if reads_rollout else None,
    }


def _entropy_coef(trainer: Any) -> float:
    """Return the entropy coefficient of this step. An adaptive coefficient is 0 while the entropy is above its target."""
    off = trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    return 0.0 if off else trainer.entropy_coef


def _control_entropy(
    trainer: Any,
    metrics: defaultdict[str, list],
    config: GRPOLossConfig,
    loss: torch.Tensor,
    active: torch.Tensor,
    window: int,
) -> None:
    """Log the loss without the entropy bonus, and adapt the entropy coefficient at the end of an accumulation window.

    Args:
        active: the entropies of the tokens that the bonus covers.
    """
    accelerator, args = trainer.accelerator, trainer.args
    policy_loss = loss + config.entropy_coef * active.sum() / max(len(active), 1) / window
    if not config.aggregation.num_items:
        policy_loss = policy_loss * window
    metrics["policy_loss"].append(accelerator.gather(policy_loss).nanmean().item())
    if not trainer.model.training:
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
            trainer._last_world_entropy = entropy
            trainer._entropy_window_stats = None
    if accelerator.sync_gradients:
        metrics["entropy_coef"].append(trainer.entropy_coef)


def _log_metrics(
    accelerator: Accelerator,
    metrics: defaultdict[str, list],
    config: GRPOLossConfig,
    result: LinearGRPOLossOutput,
    advantages: torch.Tensor,
) -> None:
    """Log TRL's metrics: means over the tokens of all ranks, or over the sequences for ratios per sequence."""
    tokens = len(result.logps)
    by_sequence = (config.level == "sequence" or config.loss.surrogate == "vespo") and advantages.dim() == 1
    weights = dict.fromkeys(("kl", "entropy"), tokens)
    ratios = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "vespo/phi_seq_mean")
    weights |= dict.fromkeys(ratios, len(advantages) if by_sequence else tokens)
    if config.perception:
        seen = float(result.metrics["perception/tokens"])
        weights |= dict.fromkeys(("perception/kl", "perception/masked_entropy", "perception/clip_ratio"), seen)
    named = {name: (result.metrics[name], weight) for name, weight in weights.items() if name in result.metrics}
    sums = [torch.stack([value * weight, value.new_tensor(weight)]) for value, weight in named.values()]
    totals = accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
    for name, (total, count) in zip(named, totals, strict=True):
        metrics[name].append(total / max(count, 1.0))
    if config.loss.low:
        ends = torch.stack([result.metrics["clip_ratio/low_min"], result.metrics["clip_ratio/high_max"]])
        ends = ends if tokens or by_sequence else ends.fill_(math.nan)  # no tokens to clip
        low, high = accelerator.gather(ends).view(-1, 2).unbind(1)
        metrics["clip_ratio/low_min"].append(nanmin(low).item())
        metrics["clip_ratio/high_max"].append(nanmax(high).item())
