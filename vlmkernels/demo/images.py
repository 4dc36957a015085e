"""Measure the time that a step of the demo spends on images, with transformers' code and with the trainer's."""

import statistics
import time

import torch
from PIL.Image import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlmkernels.demo.model import build_model
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.vision import use_vision_ops

ROUNDS = 3


def _seconds(model: PreTrainedModel, processor: ProcessorMixin, images: list[Image], **arguments) -> float:
    """Return the seconds of image processing, the tower's forward pass for sampling, and its training forward and backward."""
    start = time.perf_counter()
    rows = processor.image_processor(images, return_tensors="pt", **arguments.get("images_kwargs", {}))
    with torch.no_grad():
        model.get_image_features(**rows)
    torch.cat(model.get_image_features(**rows).pooler_output).sum().backward()
    return time.perf_counter() - start


def image_seconds(processor: ProcessorMixin, images: list[Image], num_generations: int) -> dict[str, float]:
    """Measure the seconds that the images of a step take in the demo's model.

    Args:
        processor: the demo's processor.
        images: one image per prompt.
        num_generations: completions per prompt.

    Returns:
        "before": with the processor and vision tower of transformers, and one image per completion. "after": with the trainer's
        processor and vision ops, and one image per prompt.
    """
    # New models are built because the weights do not affect the time.
    before, after = build_model(processor, 0), build_model(processor, 0)
    fast = with_fast_images(processor)
    arguments = use_vision_ops(after, fast)
    copies = [image for image in images for _ in range(num_generations)]
    rounds = [(_seconds(before, processor, copies), _seconds(after, fast, images, **arguments)) for _ in range(ROUNDS)]
    return dict(zip(("before", "after"), map(statistics.median, zip(*rounds, strict=True)), strict=True))


def image_shares(seconds: dict[str, float], step_seconds: float) -> dict[str, float]:
    """Return the share of a step's time that is spent on images, for "before" and "after".

    Args:
        seconds: the result of ``image_seconds``.
        step_seconds: duration of a step with the images of "after". The rest of the step is assumed to be the same in "before".
    """
    rest = step_seconds - seconds["after"]
    return {when: value / (rest + value) for when, value in seconds.items()}
