"""The resolution of images as a schedule: limits of their sizes after the processor's resize, by optimizer step."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from PIL import Image

from vlmkernels.data.samples import Sample, SampleError, prompt_ids
from vlmkernels.ops.checks import did_you_mean, require_number

_KEYS = ("step", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class Resolution:
    """Limits of the size of images from a step on.

    Args:
        step: the first optimizer step, counted from 0, before which prompts are encoded with these limits.
        min_pixels, max_pixels: limits of width x height of an image after resizing; None for those of the processor.
    """

    step: int
    min_pixels: int | None = None
    max_pixels: int | None = None

    def size(self, processor: Any) -> dict[str, int]:
        """Return the limits as the ``size`` of the image processor, which names pixels of an image "edges"."""
        given = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        return _limits(processor.image_processor) | {name: value for name, value in given.items() if value is not None}


def _limits(image_processor: Any) -> dict[str, int]:
    """Return the "edges" that the size of an image processor has."""
    size = getattr(image_processor, "size", None) or {}
    values = size if isinstance(size, dict) else vars(size)
    return {name: values[name] for name in ("shortest_edge", "longest_edge") if values.get(name)}


@dataclass(frozen=True)
class ResolutionSchedule:
    """Limits of image sizes that change at some steps and are constant between them. Build it with ``from_list``."""

    entries: tuple[Resolution, ...]

    @classmethod
    def from_list(cls, entries: Sequence[dict[str, Any]]) -> "ResolutionSchedule":
        """Return the schedule of a list of dicts with the keys step, min_pixels and max_pixels.

        Raises:
            ValueError: the value is not such a list, steps do not begin with 0 or do not increase, or limits exclude each
                other.
        """
        name = "image_resolution_schedule"
        if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{name} must be a list of dicts of {', '.join(_KEYS)}, got {entries!r}")
        for index, entry in enumerate(entries):
            where = f"{name}[{index}]"
            if unknown := [key for key in entry if key not in _KEYS]:
                raise ValueError(
                    f"{where} must have keys of {', '.join(_KEYS)}, got {unknown[0]!r}{did_you_mean(unknown[0], _KEYS)}"
                )
            for key, value in entry.items():
                require_number(f"{where}.{key}", value, "be an integer", Integral)
                if value < (0 if key == "step" else 1):
                    raise ValueError(f"{where}.{key} must be >= {0 if key == 'step' else 1}, got {value}")
            if "step" not in entry or len(entry) == 1:
                raise ValueError(f"{where} must have a step, and min_pixels or max_pixels, got {entry!r}")
            if entry.get("min_pixels", 0) > entry.get("max_pixels", math.inf):
                raise ValueError(
                    f"{where}.min_pixels must be at most max_pixels = {entry['max_pixels']}, got {entry['min_pixels']}"
                )
        steps = [entry["step"] for entry in entries]
        if steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"{name} must have steps that begin with 0 and increase, got {steps}")
        return cls(tuple(Resolution(**entry) for entry in entries))

    def at(self, step: int) -> Resolution:
        """Return the limits of the prompts that are encoded at ``step``."""
        return self.entries[bisect_right([entry.step for entry in self.entries], step) - 1]

    @property
    def last(self) -> Resolution:
        """The limits at the end."""
        return self.entries[-1]

    def check(self, processor: Any) -> None:
        """Try the schedule with the model's processor.

        Raises:
            ValueError: the image processor has no limits in pixels, the limits of an entry and of the processor exclude each
                other, or the processor ignores them.
        """
        images = getattr(processor, "image_processor", None)
        if len(_limits(images)) < 2:
            raise ValueError(
                "image_resolution_schedule must be None with an image processor without min_pixels and max_pixels, "
                f"got {type(images or processor).__name__}"
            )
        for entry in self.entries:
            size = entry.size(processor)
            if size["shortest_edge"] > size["longest_edge"]:
                raise ValueError(
                    f"image_resolution_schedule must have min_pixels <= max_pixels at step {entry.step}, with the processor's "
                    f"limits where it has none, got {size['shortest_edge']} and {size['longest_edge']}"
                )
        tried = min(self.entries, key=lambda entry: entry.size(processor)["longest_edge"]).size(processor)
        side = math.ceil(math.sqrt(2 * tried["longest_edge"]))
        inputs = images(images=[Image.new("RGB", (side, side))], size=tried, return_tensors="pt")
        pixels = math.inf
        if "image_grid_thw" in inputs:
            _, height, width = inputs["image_grid_thw"][0].tolist()
            pixels = height * width * images.patch_size**2
        if pixels > tried["longest_edge"]:
            raise ValueError(
                "image_resolution_schedule must be None with an image processor that does not limit width x height of images, "
                f"got {type(images).__name__}"
            )


class LengthCheck:
    """Checks the number of tokens of prompts, of which only the sizes of images are known.

    Args:
        processor: a processor that ``ResolutionSchedule.check`` accepts.
        schedule: the largest of its sizes counts for each image.
        max_prompt_length: maximum number of tokens.
    """

    def __init__(self, processor: Any, schedule: ResolutionSchedule, max_prompt_length: int) -> None:
        self.processor, self.schedule, self.max_prompt_length = processor, schedule, max_prompt_length
        self._images: dict[tuple[int, int], int] = {}

    def __call__(self, sample: Sample, text: str) -> None:
        """Raise SampleError if a rendered prompt is too long at some step.

        Tokens of videos are not counted, and neither are those that HunyuanVL adds for each row of an image.
        """
        length = len(prompt_ids(sample, text, self.processor))
        length += sum(self._image_tokens(image.width, image.height) - 1 for image in sample.images)
        if length > self.max_prompt_length:
            raise SampleError(
                sample,
                f"the prompt must have at most max_prompt_length = {self.max_prompt_length} tokens at the largest size of "
                f"image_resolution_schedule, got {length}",
            )

    def _image_tokens(self, width: int, height: int) -> int:
        images = self.processor.image_processor
        if (width, height) not in self._images:
            sizes = [entry.size(self.processor) for entry in self.schedule.entries]
            limits = [{"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} for size in sizes]
            patches = max(images.get_number_of_image_patches(height, width, limit) for limit in limits)
            self._images[width, height] = patches // images.merge_size**2
        return self._images[width, height]
