"""Images and videos that a processor refuses because of their size, found without their pixels."""

from typing import Any

import torch
from PIL import Image

from vlmkernels.data.samples import Sample, SampleError

# Processors refuse only extreme sizes: Qwen's and GLM's ratios above 200, Pixtral's sides that become 0 pixels.
_MAX_RATIO = 32
_MIN_SIDE = 4
_MIN_FRAMES = 2


class SizeCheck:
    """Tries extreme sizes of images and videos with the processor, each size once, on black pixels.

    Args:
        processor: the model's processor, or its tokenizer for a text model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._errors: dict[tuple[int, ...], str | None] = {}

    def __call__(self, sample: Sample) -> None:
        """Raise SampleError if the processor refuses the size of an image or a video of the sample."""
        for position, image in enumerate(sample.images):
            if error := self._error((image.height, image.width)):
                name = "image" if len(sample.images) == 1 else f"images[{position}]"
                size = f"{image.width} x {image.height} pixels"
                raise SampleError(sample, f"{name} must have a size that the processor accepts, got {size} ({error})")
        for position, video in enumerate(sample.videos):
            frames, _, height, width = video.shape
            if error := self._error((frames, height, width)):
                size = f"{frames} frames of {width} x {height} pixels"
                name = f"videos[{position}]"
                raise SampleError(sample, f"{name} must have a size that the processor accepts, got {size} ({error})")

    def _error(self, size: tuple[int, ...]) -> str | None:
        """Return why the processor refuses an image (height, width) or a video (frames, height, width), or None."""
        short, long = sorted(size[-2:])
        if long <= _MAX_RATIO * short and short >= _MIN_SIDE and (len(size) == 2 or size[0] >= _MIN_FRAMES):
            return None
        if size not in self._errors:
            try:
                self._try(*size)
                self._errors[size] = None
            except Exception as error:  # processors raise many types of errors
                self._errors[size] = str(error.__cause__ or error)
        return self._errors[size]

    def _try(self, *size: int) -> None:
        if len(size) == 2:
            self.processor.image_processor(images=[Image.new("RGB", size[::-1])], return_tensors="pt")
            return
        frames, height, width = size
        video = torch.zeros(min(frames, 4), 3, height, width, dtype=torch.uint8)
        metadata = {"total_num_frames": len(video), "fps": 2.0, "frames_indices": list(range(len(video)))}
        arguments = {"video_metadata": [metadata], "do_sample_frames": False}
        self.processor.video_processor(videos=[video], return_tensors="pt", **arguments)
