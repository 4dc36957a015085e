"""``regroup``: sorts the rows of an optimizer step by prompt, so that rows of one prompt are in one micro-batch."""

from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

PROMPT = "prompt_index"  # an entry that this integration adds to TRL's batches: the prompt of each row


def micro_batches_per_step(args: Any) -> int:
    """Return how many micro-batches of a generation batch one optimizer step accumulates."""
    return min(args.gradient_accumulation_steps, args.steps_per_generation)


def check_regroup(args: Any) -> None:
    """Raise ValueError for settings under which ``regroup`` would change the loss.

    These are losses that contain a mean over a micro-batch, and optimizer steps that cover parts of two generation batches.
    """
    if max(args.gradient_accumulation_steps, args.steps_per_generation) % micro_batches_per_step(args) != 0:
        raise ValueError(
            "regroup must be False where gradient_accumulation_steps and steps_per_generation do not divide one another, "
            f"got {args.gradient_accumulation_steps} and {args.steps_per_generation}"
        )
    settings = {name: getattr(args, name, None) for name in ("loss_type", "top_entropy_quantile", "entropy_coef")}
    means = {  # RLOOConfig has none of these settings
        "loss_type='bnpo'": settings["loss_type"] == "bnpo",
        "top_entropy_quantile": (settings["top_entropy_quantile"] or 1.0) < 1,
        "entropy_coef": bool(settings["entropy_coef"]),
        "use_adaptive_entropy": getattr(args, "use_adaptive_entropy", False),
    }
    found = ", ".join(name for name, present in means.items() if present)
    if found:
        raise ValueError(f"regroup must be False with {found}, a mean over a micro-batch, got True")


def regroup(batches: list[dict], window: int) -> list[dict]:
    """Sort the rows of every ``window`` micro-batches of a generation batch by prompt."""
    result = []
    for start in range(0, len(batches), window):
        parts = [split_pixel_values_by_grid(batch) for batch in batches[start : start + window]]
        rows = {name: _join([part[name] for part in parts]) for name in parts[0]}
        order = rows[PROMPT].argsort(stable=True)
        rows = {name: _reorder(value, order) for name, value in rows.items()}
        result += [unsplit_pixel_values_by_grid(batch) for batch in split_tensor_dict(rows, len(parts))]
    return result


def _per_row(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _join(values: list) -> Any:
    if not _per_row(values[0]):
        return values[0]
    return [row for value in values for row in value] if isinstance(values[0], list) else torch.cat(values)


def _reorder(value: Any, order: torch.Tensor) -> Any:
    if not _per_row(value):
        return value
    return [value[row] for row in order.tolist()] if isinstance(value, list) else value[order]
