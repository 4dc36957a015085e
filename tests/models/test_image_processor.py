"""FastImageProcessor, compared with the processor that it replaces."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

from transformers import AutoImageProcessor, Qwen2VLImageProcessor  # noqa: E402

from vlmkernels import pack_patches  # noqa: E402
from vlmkernels.models.image_processor import FastImageProcessor, with_fast_images  # noqa: E402

QWEN2 = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}}
QWEN3 = {
    "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32},
    "patch_size": 16,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def photo():
    """(427, 640, 3), writable."""
    return pytest.importorskip("sklearn.datasets").load_sample_images().images[1].copy()


def check(actual, expected):
    """Assert that the outputs are bitwise equal."""
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        pair = (torch.as_tensor(values[name]) for values in (actual, expected))
        assert torch.equal(*(values.nan_to_num(12345.0) if values.is_floating_point() else values for values in pair))


IMAGES = {
    "a photo made smaller": lambda: Image.fromarray(photo()),
    "a photo made larger": lambda: Image.fromarray(photo()[:40, :50]),
    "long": lambda: Image.fromarray(noise(30, 900, 3).numpy()),
    "palette": lambda: Image.fromarray(photo()).quantize(32),
    "RGBA": lambda: Image.fromarray(noise(90, 70, 4).numpy()),
    "gray": lambda: Image.fromarray(photo()).convert("L"),
    "an array": lambda: photo(),
    "a gray array": lambda: photo()[..., :1],
    "an RGBA array": lambda: noise(90, 70, 4).numpy(),
    "a tensor": lambda: noise(3, 123, 77),
    "several": lambda: [Image.fromarray(noise(60 + i, 90, 3, seed=i).numpy()) for i in range(5)],
    "several of one size": lambda: [noise(3, 60, 90, seed=i) for i in range(3)],
    "nested": lambda: [[noise(3, 60, 90)], [noise(3, 70, 50), noise(3, 60, 90)]],
    "a float array": lambda: photo()[:64, :64].astype(np.float32),  # handled by the parent class
}
REFUSED = ("a gray array", "an RGBA array")  # which some transformers versions before 5.21 reject


@pytest.mark.parametrize("settings", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("name", IMAGES)
def test_bitwise_equal(settings, name):
    images = IMAGES[name]()
    try:
        expected = Qwen2VLImageProcessor(**settings)(images, return_tensors="pt")
    except (RuntimeError, ValueError) as error:
        assert name in REFUSED
        with pytest.raises(type(error)):
            FastImageProcessor(**settings)(images, return_tensors="pt")
        return
    check(FastImageProcessor(**settings)(images, return_tensors="pt"), expected)


OPTIONS = {
    "no resize": {"do_resize": False},
    "another size": {"size": {"shortest_edge": 28 * 28, "longest_edge": 6 * 28 * 28}},
    "no normalization": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "other patches": {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 1},
    "bilinear": {"resample": 2},
    "arrays": {"return_tensors": "np"},
    "nothing": {"return_tensors": None},
    "negative factor": {"rescale_factor": -1.0},
    "factor 0, not normalized": {"rescale_factor": 0.0, "do_normalize": False},
    "std 0": {"image_std": [0.5, 0.0, 0.5]},
    "negative std": {"image_std": [0.5, -0.5, 0.5]},
    "std inf": {"image_std": [0.5, float("inf"), 0.5]},
    "mean nan": {"image_mean": [0.5, float("nan"), 0.5]},
    "unused std 0": {"image_std": 0.0, "do_normalize": False},
    "unused factor": {"rescale_factor": -1.0, "do_rescale": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_call(name):
    image = Image.fromarray(photo()[:84, :140])
    options = {"return_tensors": "pt", **OPTIONS[name]}
    expected = Qwen2VLImageProcessor(**QWEN2)(image, **options)
    check(FastImageProcessor(**QWEN2)(image, **options), expected)


def with_mode(mode):
    """Return a PIL image, (56, 84), in one of PIL's modes."""
    if mode in ("RGB, transparent color", "P, transparent color", "L, transparent color"):
        image = with_mode(mode.split(",")[0])
        image.info["transparency"] = (1, 2, 3) if mode.startswith("RGB") else 7
        if mode.startswith("RGB"):
            image.putpixel((5, 6), (1, 2, 3))
        return image
    deep = {"I;16": (np.uint16, 65535), "I": (np.int32, 70_000), "F": (np.float32, 300)}
    if mode in deep:
        dtype, top = deep[mode]
        return Image.fromarray(np.linspace(0, top, 56 * 84).reshape(56, 84).astype(dtype))
    rgba = Image.fromarray(noise(56, 84, 4).numpy())
    return rgba.convert("P").convert("PA") if mode == "PA" else rgba.convert(mode)


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F")
MODES += ("RGB, transparent color", "P, transparent color", "L, transparent color")


@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"do_convert_rgb": False}, {"rescale_factor": -1.0}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, options):
    """What the parent class accepts has the same result, and what it rejects is an error."""
    outcomes = []
    for cls in (Qwen2VLImageProcessor, FastImageProcessor):
        try:
            outcomes.append(cls(**QWEN2)([with_mode(mode), with_mode("RGB")], return_tensors="pt", **options))
        except Exception as error:
            outcomes.append(type(error))
    expected, actual = outcomes
    if isinstance(expected, type):
        assert actual is expected
        assert "do_convert_rgb" in options
    else:
        check(actual, expected)


def test_saved_settings_load_with_and_without_this_package(tmp_path):
    image = Image.fromarray(photo())
    saved = FastImageProcessor(**QWEN3)
    saved.save_pretrained(tmp_path)
    expected = saved(image, return_tensors="pt")
    for other in (FastImageProcessor, Qwen2VLImageProcessor, AutoImageProcessor):
        loaded = other.from_pretrained(tmp_path)
        assert isinstance(loaded, Qwen2VLImageProcessor)
        check(loaded(image, return_tensors="pt"), expected)
    check(FastImageProcessor.from_dict(loaded.to_dict())(image, return_tensors="pt"), expected)


def test_number_of_patches_equals_the_rows():
    processor = FastImageProcessor(**QWEN2)
    rows = processor(noise(3, 123, 77), return_tensors="pt")["pixel_values"]
    assert processor.get_number_of_image_patches(123, 77) == len(rows)


def test_processor_equals_pack_patches():
    """For an image that needs no resizing."""
    processor = FastImageProcessor(**QWEN2)
    image = noise(3, 56, 84)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    packed = pack_patches([image], patch_size=14, mean=processor.image_mean, std=processor.image_std)
    assert torch.equal(packed.pixel_values, expected)


def with_orientation(image, orientation):
    exif = image.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_files_are_decoded_to_the_pixels_of_pil(tmp_path):
    contents = [with_orientation(Image.fromarray(photo()), orientation) for orientation in (1, 6)]
    upright = [ImageOps.exif_transpose(Image.open(io.BytesIO(content))) for content in contents]
    expected = Qwen2VLImageProcessor(**QWEN2)(upright, return_tensors="pt")
    path = tmp_path / "a.jpg"
    path.write_bytes(contents[1])
    for images in (contents, [[contents[0]], [path]], [contents[0], str(path)], [upright[0], {"bytes": None, "path": path}]):
        check(FastImageProcessor(**QWEN2)(images, return_tensors="pt"), expected)
    with pytest.raises(ValueError, match=r"images\[1\] must be a whole image file: .*runcated"):
        FastImageProcessor(**QWEN2)([path, contents[0][:-9]], return_tensors="pt")
    with pytest.raises(ValueError, match=r"images\[2\] must be a whole image file: .*runcated"):
        FastImageProcessor(**QWEN2)([[upright[0], path], [contents[0][:-9]]], return_tensors="pt")


def truncated():
    file = io.BytesIO()
    Image.fromarray(noise(64, 56, 3).numpy()).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


ERRORS = {
    "aspect ratio": (
        lambda: noise(3, 10, 2010),
        ValueError,
        r"images\[1\] must have sides that can be resized, got 10 x 2010: .*aspect ratio.*200",
    ),
    "zero-sized": (lambda: noise(3, 0, 10), ValueError, r"images\[1\] must have pixels, got 0 x 10"),
    "truncated": (truncated, ValueError, r"images\[1\] must be a whole image, got 64 x 56 that does not decode"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_image_and_its_size(name):
    image, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        FastImageProcessor(**QWEN2)([Image.fromarray(photo()), image()], return_tensors="pt")


def test_sides_that_do_not_divide_without_resize():
    with pytest.raises(ValueError, match=r"images\[1\] must have sides that are multiples of 28, got 28 x 30"):
        FastImageProcessor()([noise(3, 28, 28), noise(3, 28, 30)], do_resize=False)


def test_inside_a_processor():
    """The processor with the fast image processor returns the same inputs, and the original processor does not change."""
    processor = tiny.processor()
    fast = with_fast_images(processor)
    assert type(fast.image_processor) is FastImageProcessor
    assert type(processor.image_processor) is Qwen2VLImageProcessor
    arguments = {"text": ["<|vision_start|><|image_pad|><|vision_end|>a"], "images": [tiny.image(1, 56, 28)]}
    ours, theirs = (p(**arguments, return_tensors="pt") for p in (fast, processor))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert with_fast_images(tiny.tokenizer()).__class__ is tiny.tokenizer().__class__
