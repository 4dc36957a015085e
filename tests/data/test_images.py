"""An image in every form gives the same upright RGB pixels, and its header the same size."""

import base64
import io
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.image_utils import load_image

from vlmkernels import use_backend
from vlmkernels.data.dataset import SampleDataset, load_dataset
from vlmkernels.data.images import ImageLimits, open_image, read_header, read_image, read_size
from vlmkernels.data.samples import _content_key, read_sample, read_video
from vlmkernels.models.image_processor import _composites_on_white
from vlmkernels.ops.decode_image import decode_image

torch.set_num_threads(1)
PROMPT = [{"role": "user", "content": "what?"}]


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))


def file_of(image: Image.Image, suffix: str, orientation: int = 1, **options) -> bytes:
    exif = image.getexif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    image.save(content, suffix, exif=exif, **options)
    return content.getvalue()


def with_late_exif(content: bytes) -> bytes:
    """Move the eXIf chunk of a PNG file behind the pixels, where some programs write it."""
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4], "big")
    rest = content[:at] + content[end:]
    return rest[:-12] + content[at:end] + rest[-12:]


FILES = [
    *((suffix, orientation) for suffix in ("jpeg", "png", "webp", "tiff") for orientation in (1, 2, 3, 6, 8)),
    ("late png", 6),
    ("late png", 3),
]


@pytest.mark.parametrize(("suffix", "orientation"), FILES)
def test_every_form_is_upright(tmp_path, suffix, orientation):
    content = file_of(photo(), suffix.removeprefix("late "), orientation)
    content = with_late_exif(content) if suffix.startswith("late") else content
    path = tmp_path / "a.img"
    path.write_bytes(content)
    expected = np.asarray(load_image(str(path)))
    inline = [{"role": "user", "content": [{"type": "image", "image": "a.img"}, {"type": "text", "text": "what?"}]}]
    as_url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.img"}}]}]
    rows = [{"prompt": PROMPT, "image": "a.img"}, {"prompt": inline}, {"prompt": as_url}]
    rows += [{"prompt": PROMPT, "images": [{"bytes": None, "path": "a.img"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = [*load_dataset(tmp_path / "a.jsonl")]
    forms += [
        {"prompt": PROMPT, "image": value}
        for value in (
            path,
            content,
            Image.open(path),
            {"bytes": content, "path": None},
            expected,
            torch.from_numpy(expected.copy()),
        )
    ]
    forms += [{"prompt": PROMPT, "image": f"data:image/x;base64,{base64.b64encode(content).decode()}"}]
    column = Dataset.from_dict({"prompt": [PROMPT], "image": [str(path)]}).cast_column("image", ImageFeature())
    forms += [column[0], column.cast_column("image", ImageFeature(decode=False))[0]]
    for row in forms:
        (image,) = read_sample(row, 0).images
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert read_sample(row, 0, decode=False).images[0].size == image.size
    for decode in (True, False):
        assert read_video([str(path)] * 2, "videos[0]", decode).shape == (2, 3, *expected.shape[:2])
    np.testing.assert_array_equal(read_video([str(path)], "videos[0]")[0].permute(1, 2, 0).numpy(), expected)


def test_paths_in_conversations_of_parquet_files(tmp_path):
    photo().save(tmp_path / "a.png")
    inline = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]}]
    Dataset.from_list([{"prompt": inline, "answer": "1"}] * 2).to_parquet(tmp_path / "a.parquet")
    (image,) = read_sample(load_dataset(tmp_path / "a.parquet")[1], 1).images
    np.testing.assert_array_equal(np.asarray(image), np.asarray(photo()))


def transparent(mode: str) -> Image.Image:
    """Black where it is opaque, and with a black color under what is transparent."""
    image = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 18, 18))
    if mode == "RGB":
        image = Image.new("RGB", (28, 28), "red")
        image.paste("black", (10, 10, 18, 18))
        image.info["transparency"] = (255, 0, 0)
        return image
    if mode in ("P", "PA"):
        paletted = Image.new("P", (28, 28), 1)
        paletted.putpalette([0, 0, 0, 9, 9, 9])
        paletted.paste(0, (10, 10, 18, 18))
        paletted.info["transparency"] = 1
        return paletted if mode == "P" else paletted.convert("RGBA").convert("PA")
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "RGBa"])
def test_what_is_transparent_is_white(mode):
    pixels = np.asarray(decode_image(open_image(transparent(mode))))
    assert pixels[10:18, 10:18].max() == 0
    pixels = pixels.copy()
    pixels[10:18, 10:18] = 255
    assert pixels.min() == 255
    if mode in ("RGBA", "LA", "P") and _composites_on_white():  # transformers >= 5.21, whose processors get the image itself
        theirs = Qwen2VLImageProcessor().process_image(transparent(mode), do_convert_rgb=True)
        np.testing.assert_array_equal(np.asarray(decode_image(transparent(mode))), theirs.permute(1, 2, 0).numpy())


GRAY = np.arange(0, 256, dtype=np.uint8).repeat(4).reshape(32, 32)
DEEP = {
    "I;16": Image.fromarray(GRAY.astype(np.uint16) * 257),
    "I of 16 bits": Image.fromarray(GRAY.astype(np.int32) * 257),
    "I of 8 bits": Image.fromarray(GRAY.astype(np.int32)),
    "F in [0, 1]": Image.fromarray(GRAY.astype(np.float32) / 255),
    "F in [0, 255]": Image.fromarray(GRAY.astype(np.float32)),
    "L": Image.fromarray(GRAY),
    "uint16": GRAY.astype(np.uint16) * 257,
    "float64": GRAY / 255,
    "bf16 tensor": torch.from_numpy(GRAY / 255).float()[None].expand(3, -1, -1),
    "channels first": np.broadcast_to(GRAY, (3, 32, 32)),
    "one channel": GRAY[..., None],
}


@pytest.mark.parametrize("form", DEEP)
def test_deep_images_are_scaled(form):
    pixels = np.asarray(decode_image(open_image(DEEP[form])))
    np.testing.assert_array_equal(pixels, GRAY[..., None].repeat(3, -1))


def test_16_bit_files(tmp_path):
    for suffix in ("png", "tiff"):
        DEEP["I;16"].save(tmp_path / f"a.{suffix}")
        (image,) = read_sample({"prompt": PROMPT, "image": str(tmp_path / f"a.{suffix}")}, 0).images
        np.testing.assert_array_equal(np.asarray(image)[..., 0], GRAY)


def test_other_modes():
    for mode in ("1", "CMYK", "YCbCr", "HSV"):
        image = photo().convert(mode)
        np.testing.assert_array_equal(np.asarray(decode_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Image.fromarray(np.full((4, 4), 256.0, np.float32)), r"image must have pixels in \[0, 1\] or \[0, 255\], got 256.0"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), r"image must have pixels in \[0, 1\] or \[0, 255\], got nan"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), r"image must have pixels in \[0, 65535\], got -1"),
        (np.zeros((5, 4, 5), np.uint8), r"image must be pixels .*, got \(5, 4, 5\) of uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"image must be pixels .*, got \(2, 4, 4, 3\) of uint8"),
        (np.zeros((4, 4, 3), np.complex64), "image must be pixels .* of complex64"),
    ],
)
def test_pixels_that_cannot_be_read_are_named(value, message):
    with pytest.raises(ValueError, match=f"sample 3: images?.* cannot be read: {message}"):
        read_sample({"prompt": PROMPT, "image": value}, 3)


def test_broken_exif_is_no_orientation():
    content = bytearray(file_of(photo(), "jpeg", 6))
    at = content.index(b"Exif\x00\x00") + 6
    content[at : at + 8] = b"XXXXXXXX"
    image = open_image(bytes(content))
    assert read_header(image).size == decode_image(image).size == (56, 28)


def test_headers_are_read_without_decoding(monkeypatch):
    """Also of PNG files without EXIF, where PIL would decode the pixels to look for it behind them."""
    contents = [file_of(photo(), suffix, 6) for suffix in ("jpeg", "webp", "tiff")]
    without = io.BytesIO()
    photo().save(without, "png")
    contents += [without.getvalue(), with_late_exif(file_of(photo(), "png", 6))]
    images = [open_image(content) for content in contents]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the pixels were decoded"))
    assert [read_header(image).size for image in images] == [(28, 56)] * 3 + [(56, 28), (28, 56)]


def test_late_exif_helper_is_a_valid_png():
    content = with_late_exif(file_of(photo(), "png", 6))
    at = content.index(b"eXIf")
    length = struct.unpack(">I", content[at - 4 : at])[0]
    assert struct.unpack(">I", content[at + 4 + length : at + 8 + length])[0] == zlib.crc32(content[at : at + 4 + length])
    assert at > content.index(b"IDAT")


@pytest.mark.parametrize("empty", [None, [], [None], [{"bytes": None, "path": None}], {"bytes": None, "path": None}])
def test_an_empty_column_beside_a_filled_one(empty):
    image = photo()
    assert read_sample({"prompt": PROMPT, "image": image, "images": empty}, 0).images[0].size == image.size
    assert len(read_sample({"prompt": PROMPT, "image": empty, "images": [image]}, 0).images) == 1
    assert read_sample({"prompt": PROMPT, "image": empty, "images": empty, "videos": empty}, 0).images == []


def test_two_filled_columns_are_refused():
    with pytest.raises(ValueError, match="sample 4: image must be None if images holds images, got both, with 1 and 2"):
        read_sample({"prompt": PROMPT, "image": photo(), "images": [photo()] * 2}, 4)
    with pytest.raises(ValueError, match=r"sample 4: images\[1\] cannot be read: image must be .*, got NoneType"):
        read_sample({"prompt": PROMPT, "images": [photo(), None]}, 4)


def jpeg_rows(num=5):
    images = [photo().rotate(90 * k, expand=True) for k in range(num)]
    return [
        {"prompt": PROMPT, "image": {"bytes": file_of(image, "jpeg", 1 + k), "path": None}} for k, image in enumerate(images)
    ]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_read_together_equal_rows_read_alone(num_threads):
    rows = jpeg_rows()
    rows[2]["image"] = {"bytes": rows[2]["image"]["bytes"][:-9], "path": None}
    torch.set_num_threads(num_threads)
    try:
        for on_bad, indices in (("skip", [0, 4, 2, 1, 3]), ("raise", [0, 4, 1, 3])):
            alone, together = (SampleDataset(rows, "train_dataset", on_bad=on_bad) for _ in range(2))
            expected, found = [alone[index] for index in indices], together.__getitems__(indices)
            assert [(index, sample.index) for index, sample in found] == [(index, sample.index) for index, sample in expected]
            for (_, sample), (_, other) in zip(found, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(sample.images[0]), np.asarray(other.images[0]))
            assert together.bad == alone.bad
            assert (2 in together.bad) == (on_bad == "skip")
            again = together.__getitems__([3, 3])
            assert [sample.index for _, sample in again] == [3, 3]
        with pytest.raises(ValueError, match=r"train_dataset: sample 2: image cannot be read: .*runcated"):
            together.__getitems__([0, 2])
    finally:
        torch.set_num_threads(1)


def test_rows_with_the_same_opened_file():
    torch.set_num_threads(2)
    try:
        opened = Image.open(io.BytesIO(file_of(photo(), "png", 6)))
        samples = SampleDataset([{"prompt": PROMPT, "image": opened}] * 8, "train_dataset").__getitems__(range(8))
    finally:
        torch.set_num_threads(1)
    expected = np.asarray(photo().transpose(Image.Transpose.ROTATE_270))
    assert all(np.array_equal(np.asarray(sample.images[0]), expected) for _, sample in samples)
    assert opened.getpixel((0, 0)) == photo().getpixel((0, 0))  # the caller's image is still open


def test_columns_of_datasets_are_decoded_once_and_by_the_rules():
    rows = jpeg_rows()
    several = [{"prompt": PROMPT, "images": [row["image"], row["image"]]} for row in rows]
    for column, feature, values in (("image", ImageFeature(), rows), ("images", List(ImageFeature()), several)):
        mask = ImageFeature()
        dataset = Dataset.from_list([{**row, "mask": row.get("image")} for row in values]).cast_column(column, feature)
        dataset = dataset.cast_column("mask", mask) if column == "image" else dataset
        samples = SampleDataset(dataset, "train_dataset")
        for index, sample in samples.__getitems__(range(3)):
            expected = read_sample(values[index], index).images
            images = sample.row[column] if column == "images" else [sample.row[column]]
            assert all(image is own for image, own in zip(images, sample.images, strict=True))
            for image, other in zip(images, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(image), np.asarray(other))
            if column == "image":
                assert isinstance(sample.row["mask"], Image.Image)
    limited = SampleDataset(dataset, "train_dataset", limits=ImageLimits(max_pixels=1567))
    with pytest.raises(ValueError, match=r"sample 0: images\[0\] cannot be read: image must have at most 1567 pixels"):
        limited[0]
    assert SampleDataset(dataset.with_format("numpy"), "train_dataset").stored.format["type"] == "numpy"


def test_columns_with_a_mode_are_converted_by_datasets():
    dataset = Dataset.from_list(jpeg_rows(1)).cast_column("image", ImageFeature(mode="L"))
    expected = np.asarray(Image.open(io.BytesIO(jpeg_rows(1)[0]["image"]["bytes"])).convert("L"))
    image = np.asarray(SampleDataset(dataset, "train_dataset")[0][1].images[0])
    assert image.shape == (28, 56, 3)
    np.testing.assert_array_equal(image, expected[..., None].repeat(3, -1))


def test_lists_of_images_are_not_written_again(monkeypatch):
    rows = [{"prompt": PROMPT, "images": [row["image"]] * 2} for row in jpeg_rows(3)]
    dataset = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
    monkeypatch.setattr(Dataset, "map", lambda *args, **kwargs: pytest.fail("the dataset was written again"))
    samples = SampleDataset(dataset.select([2, 0]), "train_dataset")
    assert samples.stored.data.nbytes == dataset.data.nbytes
    np.testing.assert_array_equal(np.asarray(samples[0][1].images[1]), np.asarray(read_sample(rows[2], 2).images[1]))
    assert isinstance(dataset[0]["images"][0], Image.Image)  # the caller's dataset still decodes


class OneReader(io.BytesIO):
    """A file that two threads must not read at once."""

    is_read = False

    def read(self, size=-1):
        assert not self.is_read
        self.is_read = True
        time.sleep(0.002)
        self.is_read = False
        return super().read(size)


@pytest.mark.parametrize("read", [read_size, read_image])
def test_threads_read_an_image_one_after_another(read):
    opened = Image.open(OneReader(with_late_exif(file_of(photo(), "png", 6))))
    with ThreadPoolExecutor(4) as threads:
        assert [image.size for image in threads.map(read, [opened, {"bytes": opened}] * 4)] == [(28, 56)] * 8
    assert opened.getpixel((0, 0)) == photo().getpixel((0, 0))  # still open


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist(orientation):
    for suffix in ("jpeg", "png", "late png"):
        content = file_of(photo(), suffix.removeprefix("late "), orientation)
        content = with_late_exif(content) if suffix.startswith("late") else content
        assert read_size(content).size == read_image(content).size == (56, 28)


def test_a_selected_decoder_that_cannot_decode_an_image_names_its_row():
    pytest.importorskip("simplejpeg")
    rows = [*jpeg_rows(1), {"prompt": PROMPT, "image": file_of(photo(), "png")}]
    samples = SampleDataset(rows, "train_dataset", on_bad="skip")
    message = "train_dataset: sample 1: no backend serves decode_image: simplejpeg: "
    with use_backend("simplejpeg"), pytest.raises(NotImplementedError, match=message):
        samples.__getitems__([0, 1])
    assert samples.bad == {}


def test_equal_pixels_have_equal_keys():
    """Whether a sample's image is an array of decoded pixels or an image of PIL."""
    image = decode_image(open_image(file_of(photo(), "jpeg")))
    plain = Image.fromarray(np.array(image))
    keys = [_content_key(x) for x in (image, plain, image.copy(), plain.convert("L"), plain.transpose(0))]
    assert keys[0] == keys[1] == keys[2]
    assert len({*keys}) == 3
