"""Checks before the first step that a model can be saved, so that the first checkpoint does not fail."""

import tempfile
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from vlmkernels.models.loading import base_model
from vlmkernels.train.config import GRPOConfig

logger = logging.get_logger(__name__)

# The settings of a generation_config that choose tokens. The trainer samples by its own arguments.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams",
            "early_stopping", "length_penalty", "num_return_sequences")  # fmt: skip


def check_saving(model: PreTrainedModel, processor: Any, args: GRPOConfig) -> None:
    """Remove sampling settings of the model that cannot be saved, and save its configurations and the processor on trial.

    Raises:
        ValueError: one of them cannot be saved, checkpoints are to be written and ``on_save_error`` is "raise".
    """
    plain = base_model(model)
    generation = getattr(plain, "generation_config", None)
    if generation is not None:
        _drop_invalid_sampling(generation)
    if not args.should_save:
        return
    parts = {"model.config": plain.config, "model.generation_config": generation, "processing_class": processor}
    for name, part in parts.items():
        if hasattr(part, "save_pretrained") and (error := _saving_error(part)) is not None:
            text = f"{name} must be one that save_pretrained can write, got {error}"
            if args.save_strategy != "no" and args.on_save_error == "raise":
                raise ValueError(f"{text} (on_save_error='skip' trains without checkpoints)")
            logger.warning("%s", text)


def _saving_error(part: Any) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            part.save_pretrained(folder)
        except Exception as error:  # code of other packages and of the user raises anything
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _drop_invalid_sampling(generation: GenerationConfig) -> None:
    """Reset the sampling settings of a configuration that is invalid as a whole, with a warning."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        given = {name: getattr(generation, name, None) for name in SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            setattr(generation, name, None)
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        reason = " ".join(str(error).split())
        logger.warning("generation_config of the model cannot be saved; it is saved without %s: %s", shown, reason)
