"""``FastImageProcessor``: the image processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on ``pack_patches``."""

import copy
import math
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessor

from vlmkernels.ops.decode_image import is_encoded, map_distinct
from vlmkernels.ops.decode_image.pixels import is_opaque
from vlmkernels.ops.pack_patches import pack_patches
from vlmkernels.ops.pack_patches.images import decode_file, rgb_from_pil

Processor = TypeVar("Processor")


@cache
def _composites_on_white() -> bool:
    """Return whether transformers composites transparent images on white, as ``rgb_from_pil`` does.

    transformers < 5.21 drops the alpha channel instead.
    """
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    return bool(Qwen2VLImageProcessor().process_image(clear, do_convert_rgb=True).min() == 255)


def _is_usual(options: dict[str, Any]) -> bool:
    """Return whether ``pack_patches`` supports the settings of a call."""
    if options["do_rescale"] and not 0 < options["rescale_factor"] < math.inf:
        return False
    if not options["do_normalize"]:
        return True
    mean, std = (torch.as_tensor(options[name], dtype=torch.float32) for name in ("image_mean", "image_std"))
    return bool(mean.isfinite().all() and std.isfinite().all() and std.all())


def _is_file(image: Any) -> bool:
    """Return whether an image is a file. Other strings are URLs or base64."""
    return os.path.isfile(image) if isinstance(image, str) else is_encoded(image)


def _flat(images: Any) -> Iterator[Any]:
    """Yield the images of nested lists."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _filled(images: Any, values: Iterator[Any]) -> Any:
    """Replace each image of nested lists by the next value."""
    if isinstance(images, (list, tuple)):
        return [_filled(image, values) for image in images]
    return next(values)


class FastImageProcessor(Qwen2VLImageProcessor):
    """A faster ``Qwen2VLImageProcessor`` with the same settings, the same call and bitwise equal ``pixel_values``::

        processor.image_processor = FastImageProcessor.from_pretrained(path)

    Images may also be files: their content as bytes, paths, or dicts ``{"bytes": ..., "path": ...}``, which are decoded to
    upright RGB (see ``vlmkernels.ops.decode_image``). The parent class supports only paths of these, decodes them with
    torchvision or torchcodec, and drops the alpha channel instead of compositing it on white.

    Images are decoded, converted and resized in parallel, on torch's number of threads and in their own memory layout (channels
    last), and one pass over the pixels rescales, normalizes and packs them. Errors name the index and the size of the image.
    The parent class handles images that are not uint8 RGB (floats, or gray images with ``do_convert_rgb=False``), PIL images
    with more than 8 bits per channel, settings that ``pack_patches`` refuses (``rescale_factor`` <= 0, a standard deviation of
    0) and, with transformers < 5.21, transparent images.

    ``save_pretrained`` writes the name of the parent class, so the saved files load without this package.
    """

    def to_dict(self) -> dict:
        """Return the settings under the name of the parent class."""
        return super().to_dict() | {"image_processor_type": Qwen2VLImageProcessor.__name__}

    def fetch_images(self, images: Any) -> Any:
        """Decode the images that are files; the parent class downloads URLs."""
        flat = list(_flat(images))
        files = [index for index, image in enumerate(flat) if _is_file(image)]
        decoded = map_distinct(lambda k: decode_file(flat[files[k]], f"images[{files[k]}]"), [flat[index] for index in files])
        for index, image in zip(files, decoded, strict=True):
            flat[index] = image
        return super().fetch_images(_filled(images, iter(flat)))

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[torch.Tensor]:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)

        def convert(index: int) -> torch.Tensor:
            return self.process_image(images[index], *args, name=f"images[{index}]", **kwargs)

        return map_distinct(convert, images)

    def process_image(self, image: Any, *args: Any, name: str = "image", **kwargs: Any) -> torch.Tensor:
        """Convert an image to (3, H, W). For a PIL image the result is a view with the channels last in memory."""
        # Modes I, I;16 and F have more than 8 bits per channel.
        is_usual = isinstance(image, Image.Image) and kwargs.get("do_convert_rgb") and not image.mode.startswith(("I", "F"))
        if is_usual and (is_opaque(image) or _composites_on_white()):
            return rgb_from_pil(image, name).permute(2, 0, 1).to(kwargs.get("device"))
        return super().process_image(image, *args, **kwargs)

    def _resize_all(self, images: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        def resize(index: int, image: torch.Tensor) -> torch.Tensor:
            size = f"{image.shape[-2]} x {image.shape[-1]}"
            if image.numel() == 0:
                raise ValueError(f"images[{index}] must have pixels, got {size}")
            try:
                return self.resize(image, **options)
            except ValueError as error:
                raise ValueError(f"images[{index}] must have sides that can be resized, got {size}: {error}") from error

        if images[0].device.type != "cpu":
            return list(map(resize, range(len(images)), images))
        # On the CPU torchvision resizes an image on one core and releases the interpreter's lock.
        return map_distinct(lambda k: resize(k, images[k]), images)

    def _preprocess(self, images: list[torch.Tensor], *, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        if any(image.dtype != torch.uint8 or image.shape[0] != 3 for image in images) or not _is_usual(options):
            return super()._preprocess(images, return_tensors=return_tensors, **options)
        sizes = {name: options[name] for name in ("patch_size", "merge_size", "temporal_patch_size")}
        if images and options["do_resize"]:
            factor = sizes["patch_size"] * sizes["merge_size"]
            images = self._resize_all(images, size=options["size"], resample=options["resample"], factor=factor)
        mean = std = None
        if options["do_normalize"]:
            mean, std = (torch.tensor(options[name]).expand(3).tolist() for name in ("image_mean", "image_std"))
        packed = pack_patches(
            images,
            **sizes,
            mean=mean,
            std=std,
            rescale=options["rescale_factor"] if options["do_rescale"] else 1.0,
            dtype=torch.float32 if options["do_normalize"] or options["do_rescale"] else torch.uint8,
        )
        rows = {"pixel_values": packed.pixel_values, "image_grid_thw": packed.image_grid_thw}
        return BatchFeature(data=rows, tensor_type=return_tensors)


def with_fast_images(processor: Processor) -> Processor:
    """Return a copy of ``processor`` with a ``FastImageProcessor`` of the same settings, which shares everything else.

    Processors without a ``Qwen2VLImageProcessor`` are returned as they are. ``processor`` itself does not change.
    """
    if type(getattr(processor, "image_processor", None)) is not Qwen2VLImageProcessor:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = FastImageProcessor.from_dict(processor.image_processor.to_dict())
    return processor
