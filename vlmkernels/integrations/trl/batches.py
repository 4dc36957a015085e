"""TRL's micro-batches made anew of the rows of an accumulation window, so that those of one prompt meet in one."""

import torch
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from vlmkernels.ops.checks import require

PROMPT = "prompt_index"  # of each row, an entry of TRL's batches


def window_of(args) -> int:
    """Micro-batches of a generation batch that one optimiser step adds up."""
    return min(args.gradient_accumulation_steps, args.steps_per_generation)


def check_regroup(args) -> None:
    """``regroup`` changes no loss and no gradient: not what is a mean over a micro-batch, nor over steps that differ."""
    whole = max(args.gradient_accumulation_steps, args.steps_per_generation) % window_of(args) == 0
    rule = "be False where gradient_accumulation_steps and steps_per_generation do not divide one another"
    require(whole, "regroup", rule, f"{args.gradient_accumulation_steps} and {args.steps_per_generation}")
    # Of RLOOConfig there are none of them.
    given = {name: getattr(args, name, None) for name in ("loss_type", "top_entropy_quantile", "entropy_coef")}
    means = {
        "loss_type='bnpo'": given["loss_type"] == "bnpo",
        "top_entropy_quantile": (given["top_entropy_quantile"] or 1.0) < 1,
        "entropy_coef": bool(given["entropy_coef"]),
        "use_adaptive_entropy": getattr(args, "use_adaptive_entropy", False),
    }
    found = ", ".join(name for name, present in means.items() if present)
    require(not found, "regroup", f"be False with {found}, a mean over a micro-batch", True)


def regrouped(batches: list[dict], window: int) -> list[dict]:
    """The micro-batches of a generation batch with the rows of each ``window`` of them sorted by prompt."""
    result = []
    for start in range(0, len(batches), window):
        parts = [split_pixel_values_by_grid(batch) for batch in batches[start : start + window]]
        rows = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        order = rows[PROMPT].argsort(stable=True)
        rows = {name: _ordered(value, order) for name, value in rows.items()}
        result += [unsplit_pixel_values_by_grid(batch) for batch in split_tensor_dict(rows, len(parts))]
    return result


def _per_row(value) -> bool:
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _joined(values: list):
    if not _per_row(values[0]):
        return values[0]
    return [row for value in values for row in value] if isinstance(values[0], list) else torch.cat(values)


def _ordered(value, order: torch.Tensor):
    if not _per_row(value):
        return value
    return [value[row] for row in order.tolist()] if isinstance(value, list) else value[order]
