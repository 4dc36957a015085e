"""The perception terms of masked images in TRL's trainers: which trainers support them, and the seeds of the masks."""

from typing import Any

import trl

from vlmkernels.integrations.trl.scoring import Options
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.models.loading import base_model


def check_masks(trainer: Any, options: Options, *, overrides_loss: bool) -> None:
    """Check that a constructed trainer supports the perception terms of the options.

    Args:
        overrides_loss: whether the trainer overrides a part of the loss, and so keeps TRL's loss.

    Raises:
        ValueError: it is an RLOO trainer, keeps TRL's loss, has tools, or its model or dataset has no images.
        NotImplementedError: the model is of no known family.
    """
    name, value = next((name, value) for name, value in options.perception_weights.items() if value)
    columns = getattr(trainer.train_dataset, "column_names", None)
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    reasons = {
        "for an RLOOTrainer": not isinstance(trainer, trl.GRPOTrainer),
        f"for {type(trainer).__name__}, which overrides a part of TRL's loss": overrides_loss,
        "with tools": bool(getattr(trainer, "tools", None)),
        f"for a {type(model).__name__}, which has no images": family_of(model.config) is TEXT,
        "for a train_dataset without image or images": columns is not None and not {"image", "images"} & {*columns},
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name} must be 0 {reason}, got {value}")


def mask_seed(trainer: Any) -> int:
    """Return the seed of the masks of the next micro-batch. It depends on no random state."""
    place = trainer._step * trainer.accelerator.num_processes + trainer.accelerator.process_index
    return (trainer.args.seed * 1_000_003 + place) % 2**63
