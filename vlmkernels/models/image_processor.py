"""``FastImageProcessor``: the image processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, its rows made by ``pack_patches``."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessor

from vlmkernels.ops.checks import require
from vlmkernels.ops.pack_patches import pack_patches
from vlmkernels.ops.pack_patches.images import is_opaque, rgb_from_pil


@cache
def _on_white() -> bool:
    """Whether transformers puts transparent images on white, as ``rgb_from_pil`` does; before 5.21 it drops transparency."""
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    return bool(Qwen2VLImageProcessor().process_image(clear, do_convert_rgb=True).min() == 255)


class FastImageProcessor(Qwen2VLImageProcessor):
    """A drop-in for ``Qwen2VLImageProcessor``: same settings, same call, the same bits in ``pixel_values``.

    PIL images are resized as they lie in memory, with their channels last, several at a time; rescaling, normalisation and
    patches are one pass over the pixels. A wrong image is named by its index and size. Images that are not uint8 RGB (floats,
    or grey ones with ``do_convert_rgb=False``) are left to the parent class, and so are transparent ones before transformers
    5.21, which drops their transparency. What ``save_pretrained`` writes names the parent
    class, so that it loads without this package too.

    To use it in a processor: ``processor.image_processor = FastImageProcessor.from_pretrained(path)``.
    """

    def to_dict(self) -> dict:
        return super().to_dict() | {"image_processor_type": Qwen2VLImageProcessor.__name__}

    def _prepare_image_like_inputs(self, images, *args, expected_ndims: int = 3, **kwargs) -> list[torch.Tensor]:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        return [self.process_image(image, *args, name=f"images[{i}]", **kwargs) for i, image in enumerate(images)]

    def process_image(self, image, *args, name: str = "image", **kwargs) -> torch.Tensor:
        """(3, H, W); of a PIL image a view whose channels are last in memory."""
        if isinstance(image, Image.Image) and kwargs.get("do_convert_rgb") and (is_opaque(image) or _on_white()):
            return rgb_from_pil(image, name).permute(2, 0, 1).to(kwargs.get("device"))
        return super().process_image(image, *args, **kwargs)

    def _resize_all(self, images: list[torch.Tensor], **options) -> list[torch.Tensor]:
        def resize(index: int, image: torch.Tensor) -> torch.Tensor:
            size = f"{image.shape[-2]} x {image.shape[-1]}"
            require(image.numel() > 0, f"images[{index}]", "have pixels", size)
            try:
                return self.resize(image, **options)
            except ValueError as error:
                raise ValueError(f"images[{index}] must have sides that can be resized, got {size}: {error}") from error

        if images[0].device.type != "cpu":
            return list(map(resize, range(len(images)), images))
        # On the CPU torchvision resizes an image on one core, and without the interpreter's lock.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(resize, range(len(images)), images))

    def _preprocess(self, images: list[torch.Tensor], *, return_tensors=None, **options) -> BatchFeature:
        if any(image.dtype != torch.uint8 or image.shape[0] != 3 for image in images):
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


def with_fast_images(processor):
    """A processor whose ``Qwen2VLImageProcessor`` is the fast one, the rest shared; any other processor as it is."""
    if type(getattr(processor, "image_processor", None)) is not Qwen2VLImageProcessor:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = FastImageProcessor.from_dict(processor.image_processor.to_dict())
    return processor
