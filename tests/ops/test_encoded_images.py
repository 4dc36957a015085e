"""Image files as inputs: every decoder gives PIL's pixels, and the rows are those of the transformers processors; bitwise."""

import io
import pickle
import struct
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vlmkernels import backend as backends
from vlmkernels import pack_patches
from vlmkernels.ops.decode_image import decode_image, map_on_threads, open_encoded, simple_jpeg
from vlmkernels.ops.decode_image.pixels import RGBImage
from vlmkernels.ops.pack_patches import images as image_inputs

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIONS = {"patch_size": 14, "mean": MEAN, "std": STD}
needs_simplejpeg = pytest.mark.skipif(not backends.installed("simplejpeg"), reason="simplejpeg is not installed")
DECODERS = [pytest.param("simplejpeg", marks=needs_simplejpeg), "pillow", "auto"]


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def photo(height=101, width=150):
    """A part of a real photograph. The size does not divide into blocks of a JPEG file."""
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
    return Image.fromarray(photos[0][40 : 40 + height, 60 : 60 + width])


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(image, orientation, kind="JPEG"):
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def by_pil(content):
    """The pixels (H, W, 3) by PIL alone, for images without transparency and of 8 bits."""
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


JPEGS = {
    **{f"subsampling {s}, quality {q}": {"subsampling": s, "quality": q} for s in (0, 1, 2) for q in (30, 95)},
    "progressive": {"progressive": True},
    "progressive 4:2:2": {"progressive": True, "subsampling": 1},
    "restart markers": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True},
    "RGB without a transform": {"keep_rgb": True},
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("case", JPEGS)
def test_jpeg_files_decode_to_the_pixels_of_pil(case, decoder):
    content = encoded(photo(), **JPEGS[case])
    image = decode_image(open_encoded(content, "image"), backend=decoder)
    assert (image.mode, image.size) == ("RGB", (150, 101))
    np.testing.assert_array_equal(np.asarray(image), by_pil(content))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 1), (8, 16), (33, 31)])
def test_small_and_gray_jpeg_files(size, decoder):
    for mode in ("RGB", "L"):
        content = encoded(photo(*size).convert(mode))
        np.testing.assert_array_equal(
            np.asarray(decode_image(open_encoded(content, "image"), backend=decoder)), by_pil(content)
        )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_every_orientation(orientation, decoder):
    content = with_orientation(photo(40, 60), orientation)
    np.testing.assert_array_equal(np.asarray(decode_image(open_encoded(content, "image"), backend=decoder)), by_pil(content))


def with_exif(image, kind, *entries):
    """A file whose EXIF data has entries (tag, type, four bytes) that PIL would not write."""
    entries = b"".join(struct.pack("<HHI4s", tag, type_, 1, value) for tag, type_, value in entries)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(4)
    return encoded(image, kind, exif=b"Exif\0\0" + tiff)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("type_", "value", "turned"),
    [(1, b"6\0\0\0", False), (2, b"6\0\0\0", False), (11, struct.pack("<f", 6.5), False), (11, struct.pack("<f", 6), True)],
    ids=["bytes", "text", "6.5", "6.0"],
)
def test_orientations_of_other_types(type_, value, turned, decoder):
    content = with_exif(photo(40, 60), "JPEG", (0x0112, type_, value))
    image = decode_image(open_encoded(content, "image"), backend=decoder)
    assert image.size == ((40, 60) if turned else (60, 40))
    np.testing.assert_array_equal(np.asarray(image), by_pil(content))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("decoder", ["pillow", "auto"])
@pytest.mark.parametrize(("tag", "type_"), [(0x0100, 2), (0x010F, 11), (0x011A, 2)], ids=["struct", "attribute", "type"])
def test_exif_data_that_pil_cannot_write_again(kind, decoder, tag, type_):
    content = with_exif(photo(40, 60), kind, (0x0112, 3, b"\6\0\0\0"), (tag, type_, b"\1\0\0\0"))
    expected = np.array(Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_270))
    for _ in range(2):
        image = decode_image(open_encoded(content, "image"), backend=decoder)
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("decoder", ["pillow", "auto"])
def test_a_decoded_image_is_not_turned_again(kind, decoder):
    image = decode_image(open_encoded(with_orientation(photo(40, 60), 6, kind), "image"), backend=decoder)
    assert image.size == (40, 60)
    assert image.info == {}
    assert image.getexif().get(0x0112, 1) == 1
    np.testing.assert_array_equal(np.asarray(decode_image(image)), np.asarray(image))


def on_white(image):
    """Computed in fp64."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    color, alpha = rgba[..., :3], rgba[..., 3:] / 255
    return color * alpha + 255 * (1 - alpha)


OTHER_FILES = {
    "CMYK JPEG": lambda: (photo().convert("CMYK"), "JPEG"),
    "RGB PNG": lambda: (photo(), "PNG"),
    "gray PNG": lambda: (photo().convert("L"), "PNG"),
    "bilevel PNG": lambda: (photo().convert("1"), "PNG"),
    "palette PNG": lambda: (photo().quantize(30), "PNG"),
    "WebP": lambda: (photo(), "WEBP"),
    "GIF": lambda: (photo().quantize(30), "GIF"),
    "BMP": lambda: (photo(), "BMP"),
    "TIFF": lambda: (photo(), "TIFF"),
    "PPM": lambda: (photo(), "PPM"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files_are_decoded_by_pil(case):
    content = encoded(*OTHER_FILES[case]())
    image = open_encoded(content, "image")
    assert backends.choose("decode_image", "auto", torch.empty(0), image=image) == "pillow"
    np.testing.assert_array_equal(np.asarray(decode_image(image)), by_pil(content))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_files_lie_on_white(mode, kind):
    image = photo().convert("RGBA")
    image.putalpha(photo().convert("L"))
    image = image.quantize(30) if mode == "P" else image.convert(mode)
    content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    actual = np.asarray(decode_image(open_encoded(content, "image"))).astype(float)
    assert abs(actual - on_white(Image.open(io.BytesIO(content)))).max() <= 1


def test_16_bit_files_are_scaled():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = decode_image(open_encoded(encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"), "image"))
    np.testing.assert_array_equal(np.asarray(image), gray[..., None].repeat(3, -1))


def outcome(content, decoder):
    try:
        return np.asarray(decode_image(open_encoded(content, "image"), backend=decoder))
    except (ValueError, OSError, SyntaxError):
        return None


@needs_simplejpeg
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_every_subsampling(subsampling, decoder):
    simplejpeg = pytest.importorskip("simplejpeg")
    for size in ((101, 150), (5, 7), (1, 1)):
        content = simplejpeg.encode_jpeg(np.ascontiguousarray(photo(*size)), 80, "RGB", subsampling)
        image = decode_image(open_encoded(content, "image"), backend=decoder)
        np.testing.assert_array_equal(np.asarray(image), by_pil(content))


@pytest.mark.parametrize("decoder", DECODERS)
def test_progressive_files_without_their_last_scans(decoder):
    content = encoded(photo(), progressive=True, quality=60)
    starts = [at for at in range(len(content)) if content[at : at + 2] == b"\xff\xda"]
    assert len(starts) == 10
    for start in starts[1:]:
        cut = content[:start] + b"\xff\xd9"
        image = decode_image(open_encoded(cut, "image"), backend=decoder)
        np.testing.assert_array_equal(np.asarray(image), by_pil(cut))


@needs_simplejpeg
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_damaged_jpeg_files_have_the_pixels_or_the_error_of_pil(options):
    rng, content = np.random.default_rng(0), encoded(photo(48, 64), **options)
    results = []
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(2, len(content), 3):
            damaged[place] = rng.integers(256)
        for candidate in (content[: rng.integers(2, len(content))], bytes(damaged)):
            ours, theirs = outcome(candidate, "auto"), outcome(candidate, "pillow")
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_array_equal(ours, theirs)
            results.append(ours is None)
    assert any(results)
    assert not all(results)


@needs_simplejpeg
def test_a_file_whose_decoders_read_different_sizes_is_refused_before_memory_is_allocated(monkeypatch):
    """The limits are checked for the size that PIL reads."""
    content = bytearray(encoded(photo(16, 16)))
    image = open_encoded(bytes(content), "image")
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = b"\xfd\xe8" * 2  # 65000 x 65000
    image.fp = io.BytesIO(content)
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *args, **kwargs: pytest.fail("the pixels were decoded"))
    with pytest.raises(ValueError, match=r"image must have the size that PIL reads, \(16, 16\), .* got \(65000, 65000\)"):
        decode_image(image, backend="simplejpeg")


@needs_simplejpeg
def test_which_images_simplejpeg_supports(monkeypatch):
    content = encoded(photo())
    loaded, drafted, gray = (Image.open(io.BytesIO(content)) for _ in range(3))
    loaded.load()
    drafted.draft("RGB", (40, 40))
    gray.draft("L", gray.size)
    rule = "supports images that PIL has opened, and neither decoded nor prepared by draft"
    for image, message in (
        (loaded, rule),
        (drafted, rule),
        (gray, rule),
        (photo(), "supports JPEG files, got an image in memory"),
        (Image.open(io.BytesIO(encoded(photo(), "PNG"))), "supports JPEG files, got PNG"),
        (Image.open(io.BytesIO(encoded(photo().convert("CMYK")))), "supports gray and RGB, got mode CMYK"),
    ):
        with pytest.raises(NotImplementedError, match=f"no backend serves decode_image: simplejpeg: {message}"):
            decode_image(image, backend="simplejpeg")
    for image in (drafted, gray):
        np.testing.assert_array_equal(np.asarray(decode_image(image)), np.asarray(image.convert("RGB")))
    with pytest.raises(ValueError, match="backend must be one of auto, simplejpeg, pillow; got 'cpp'"):
        decode_image(loaded, backend="cpp")
    with backends.use_backend("pillow"):
        assert type(decode_image(Image.open(io.BytesIO(content)))) is Image.Image


@needs_simplejpeg
def test_a_named_decoder_never_falls_back():
    good, png = encoded(photo(112, 112), quality=95), encoded(photo(28, 28), "PNG")
    with pytest.raises(
        NotImplementedError, match=r"images\[1\]: no backend serves decode_image: simplejpeg: supports JPEG files, got PNG"
    ):
        pack_patches([good, png], **OPTIONS, decoder="simplejpeg")
    damaged = good[:-400] + bytes(200) + good[-200:]  # PIL decodes it
    pack_patches([good, damaged], **OPTIONS)
    with pytest.raises(ValueError, match=r"images\[1\] must be a whole image file: .*orrupt"):
        pack_patches([good, damaged], **OPTIONS, decoder="simplejpeg")


@pytest.mark.parametrize("lack", ["package", "its library", "equal pixels"])
def test_without_a_usable_simplejpeg_pil_decodes(monkeypatch, lack):
    if lack == "package":
        monkeypatch.setattr(simple_jpeg, "installed", lambda name: name != "simplejpeg")
        message = r"simplejpeg: simplejpeg is not installed \(the extra 'jpeg'\)"
    elif not backends.installed("simplejpeg"):
        pytest.skip("simplejpeg is not installed")
    elif lack == "its library":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it raises ImportError
        simple_jpeg._equals_pillow.cache_clear()
        message = "simplejpeg: simplejpeg does not load: .*simplejpeg"
    else:
        right = simple_jpeg._pixels
        monkeypatch.setattr(simple_jpeg, "_pixels", lambda *args: right(*args) ^ 1)
        simple_jpeg._equals_pillow.cache_clear()
        message = "simplejpeg: simplejpeg decodes to other pixels than PIL"
    content = encoded(photo(28, 28))
    np.testing.assert_array_equal(np.asarray(decode_image(open_encoded(content, "image"))), by_pil(content))
    with pytest.raises(NotImplementedError, match=message):
        pack_patches(content, **OPTIONS, decoder="simplejpeg")
    simple_jpeg._equals_pillow.cache_clear()


# ---- an image of decoded pixels ----


def test_an_image_of_pixels_is_a_pil_image():
    pixels = np.asarray(photo()).copy()
    new, plain = lambda: RGBImage(pixels.copy()), photo()
    assert (new().mode, new().size, new().getbands()) == ("RGB", (150, 101), ("R", "G", "B"))
    assert new().tobytes() == plain.tobytes()
    assert new().getpixel((7, 9)) == plain.getpixel((7, 9))
    for change in (
        lambda image: image.convert("L"),
        lambda image: image.crop((3, 4, 50, 60)),
        lambda image: image.resize((20, 30)),
        lambda image: image.copy(),
        lambda image: pickle.loads(pickle.dumps(image)),
        ImageOps.exif_transpose,
    ):
        assert change(new()).tobytes() == change(plain).tobytes()
    assert encoded(new(), "PNG") == encoded(plain, "PNG")
    for other in (new(), plain, new().copy()):
        assert new() == other
        assert other == new()
    for other in (plain.rotate(90), plain.convert("L"), RGBImage(255 - pixels), pixels.tobytes()):
        assert new() != other
        assert other != new()


def test_arrays_share_the_pixels_of_an_image_until_it_changes():
    image = RGBImage(np.asarray(photo()).copy())
    pixels, array = image.pixels, np.asarray(image)
    assert np.shares_memory(array, pixels)
    assert not array.flags.writeable
    del pixels
    image.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(array, np.asarray(photo()))  # its memory is still alive
    assert np.asarray(image)[0, 0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(np.asarray(image)[1:], array[1:])


class CopiedByAnotherThread(RGBImage):
    """An image that another thread copies to PIL's memory after each look at its pixels."""

    @property
    def pixels(self):
        pixels, self.__dict__["kept"] = self.__dict__["kept"], None
        if pixels is not None:
            self.im = Image.fromarray(pixels).im
        return pixels

    @pixels.setter
    def pixels(self, pixels):
        self.__dict__["kept"] = pixels


def test_threads_may_share_an_image():
    pixels = np.asarray(photo())
    for use in (np.asarray, lambda image: np.asarray(image.convert("RGB")), lambda image: np.frombuffer(image.tobytes(), "u1")):
        found = use(CopiedByAnotherThread(pixels.copy()))
        np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)


def test_threads_return_results_in_order_and_raise_the_first_error(threads):
    assert map_on_threads(lambda x: x * x, range(9)) == [x * x for x in range(9)]
    used = {*map_on_threads(lambda x: threading.get_ident(), range(9))}
    assert (threading.get_ident() in used) == (threads == 1)
    with pytest.raises(ZeroDivisionError):
        map_on_threads(lambda x: 1 / (x - 3), range(9))


def test_an_image_in_several_places_is_decoded_once(threads, monkeypatch):
    calls, convert = [], image_inputs.rgb_from_pil
    monkeypatch.setattr(image_inputs, "rgb_from_pil", lambda image, name: calls.append(name) or convert(image, name))
    one, other = encoded(photo(28, 56)), photo(28, 28)
    opened = Image.open(io.BytesIO(one))
    expected = pack_patches([by_pil(one), np.asarray(other), *[by_pil(one)] * 6], **OPTIONS).pixel_values
    assert torch.equal(pack_patches([opened, other, *[opened] * 6], **OPTIONS).pixel_values, expected)
    assert sorted(calls) == ["images[0]", "images[1]"]


# ---- rows ----


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
def test_files_in_every_form_have_the_rows_of_their_pixels(tmp_path, threads, decoder):
    contents = [with_orientation(photo(28, 56), 6), encoded(photo(56, 28), "PNG"), encoded(photo(28, 28), "WEBP")]
    expected = pack_patches([by_pil(content) for content in contents], **OPTIONS)
    (tmp_path / "a.jpg").write_bytes(contents[0])
    (tmp_path / "b.png").write_bytes(contents[1])
    path = tmp_path / "a.jpg"
    for images in (
        contents,
        [bytearray(contents[0]), memoryview(contents[1]), contents[2]],
        [contents[0], memoryview(bytes(b for byte in contents[1] for b in (byte, 0)))[::2], contents[2]],
        [path, str(tmp_path / "b.png"), contents[2]],
        [{"bytes": contents[0], "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}, {"bytes": contents[2]}],
        [torch.from_numpy(by_pil(contents[0])), contents[1], Image.open(io.BytesIO(contents[2]))],
    ):
        packed = pack_patches(images, **OPTIONS, decoder=decoder)
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(packed, expected, strict=True))
    for one in (contents[0], path, str(path), {"bytes": None, "path": path}):
        assert torch.equal(pack_patches(one, **OPTIONS).pixel_values, expected.pixel_values[:8])


SIZES = [(427, 640), (50, 40), (30, 300), (200, 112), (112, 112)]  # made smaller, larger, long, one side, no change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_resized_files_have_the_rows_of_the_processor(threads, dtype):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    limits = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    contents = [encoded(photo(*size)) for size in SIZES]
    processor = transformers.Qwen2VLImageProcessor(size=limits)
    floating = dtype != torch.uint8
    images = [Image.open(io.BytesIO(content)) for content in contents]
    expected = processor(images, do_rescale=floating, do_normalize=floating, return_tensors="pt")

    def resize(height, width):
        return smart_resize(height, width, 28, limits["shortest_edge"], limits["longest_edge"])

    packed = pack_patches(contents, **OPTIONS, resize=resize, dtype=dtype)
    assert torch.equal(packed.pixel_values, expected["pixel_values"].to(dtype))
    assert torch.equal(packed.image_grid_thw, expected["image_grid_thw"])
    tensors = [torch.from_numpy(by_pil(content)).permute(2, 0, 1).contiguous() for content in contents]
    assert torch.equal(pack_patches(tensors, **OPTIONS, resize=resize, dtype=dtype).pixel_values, packed.pixel_values)
    videos = [tensor.expand(2, -1, -1, -1) for tensor in tensors]
    assert torch.equal(pack_patches(videos, **OPTIONS, resize=resize, dtype=dtype).pixel_values, packed.pixel_values)


def errors():
    good = encoded(photo(28, 28))
    rule = r"images\[1\] must be a whole image file: .*"
    yield "cut", [good, good[:-100]], {}, ValueError, rule + "[Tt]runcated"
    yield "cut PNG", [good, encoded(photo(28, 28), "PNG")[:-100]], {}, ValueError, rule
    yield "no image", [good, b"abc"], {}, ValueError, r"images\[1\] must be a PNG, JPEG, .* file that PIL can open: "
    yield "no bytes", [good, b""], {}, ValueError, r"images\[1\] must be a PNG, JPEG, .* file that PIL can open: "
    yield "no file", [good, "no.jpg"], {}, ValueError, r"images\[1\] must be an existing regular file, got no.jpg"
    yield "folder", [good, "/"], {}, ValueError, r"images\[1\] must be an existing regular file, got /"
    yield "empty dict", [good, {"bytes": None}], {}, TypeError, r"images\[1\] must have bytes or a path, got NoneType"
    yield "sides", [good, encoded(photo(28, 42))], {}, ValueError, r"images\[1\] must have sides that are multiples of 28"
    yield "decoder", [good], {"decoder": "cpp"}, ValueError, "^backend must be one of auto, simplejpeg, pillow; got 'cpp'"

    def refuse(height, width):
        raise ValueError("the ratio is too large")

    rule = r"images\[0\] must have sides that can be resized, got 28 x 28: "
    yield "resize", [good, good], {"resize": refuse}, ValueError, rule + "the ratio is too large"
    rule = r"resize must return \(height, width\), two integers > 0, got .* for images\[0\], 28 x 28"
    yield "resize to floats", [good], {"resize": lambda height, width: (28.0, 28.5)}, ValueError, rule
    yield "resize to nothing", [good], {"resize": lambda height, width: (0, 28)}, ValueError, rule
    meta = torch.empty(3, 28, 28, dtype=torch.uint8, device="meta")
    rule = r"images\[0\] must be on the CPU to be resized, got meta"
    yield "resize elsewhere", [meta], {"resize": lambda height, width: (28, 28)}, ValueError, rule


ERRORS = {name: case for name, *case in errors()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_file(threads, case):
    images, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        pack_patches(images, **OPTIONS, **options)


def test_other_errors_of_pil_name_the_file(threads, monkeypatch):
    """Its plugins raise errors of Python for some damaged files."""
    good, png = encoded(photo(28, 28)), encoded(photo(28, 28), "PNG")

    def load(self):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match=r"images\[1\] must be a whole image file: .*, got error: unpack requires"):
        pack_patches([good, png], **OPTIONS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((9500, 9500), "must have at most 89478485 pixels, got 9500 x 9500"),
        ((14000, 14000), "must be .* could be decompression"),
    ],
)
def test_a_decompression_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch, size, message):
    bomb = encoded(Image.new("1", size), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the pixels were decoded"))
    with pytest.raises(ValueError, match=rf"images\[0\] {message}"):
        pack_patches([bomb], **OPTIONS)
