"""What images cost in a step of the demo, measured: as trainers encode them, and as this one does."""

import statistics
import time

import torch

from vlmkernels.demo.model import build_model
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.vision import use_vision_ops

ROUNDS = 3


def _seconds(model, processor, images: list, **arguments) -> float:
    """Of processing the images, the tower's forward pass to sample, and its forward and backward pass to learn."""
    start = time.perf_counter()
    rows = processor.image_processor(images, return_tensors="pt", **arguments.get("images_kwargs", {}))
    with torch.no_grad():
        model.get_image_features(**rows)
    torch.cat(model.get_image_features(**rows).pooler_output).sum().backward()
    return time.perf_counter() - start


def image_seconds(processor, images: list, num_generations: int) -> dict[str, float]:
    """Seconds that the images of a step take. before: processor and tower of transformers, an image for every completion.
    after: those that the trainer uses, each image once. The demo's model, whose weights do not matter here."""
    before, after = build_model(processor, 0), build_model(processor, 0)
    fast = with_fast_images(processor)
    arguments = use_vision_ops(after, fast)
    copies = [image for image in images for _ in range(num_generations)]
    rounds = [(_seconds(before, processor, copies), _seconds(after, fast, images, **arguments)) for _ in range(ROUNDS)]
    return dict(zip(("before", "after"), map(statistics.median, zip(*rounds, strict=True)), strict=True))


def image_shares(seconds: dict[str, float], step_seconds: float) -> dict[str, float]:
    """The images' share of a step that takes ``step_seconds`` with images as "after", and of one that differs in them alone."""
    rest = step_seconds - seconds["after"]
    return {when: value / (rest + value) for when, value in seconds.items()}
