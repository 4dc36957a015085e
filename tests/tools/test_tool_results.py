"""What tools return becomes text and image parts."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkernels.data.images import ImageLimits
from vlmkernels.tools.results import MAX_CHARACTERS, ToolError, content_parts, error_parts, is_media

LIMITS = ImageLimits(max_pixels=100, max_bytes=1000)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def png(image: Image.Image = IMAGE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def parts(result, max_images=3):
    """The texts, and the pixels as arrays, of a result."""
    found = content_parts(result, LIMITS, max_images)
    assert all(part.keys() == {"type", part["type"]} for part in found)
    assert all(part["image"].mode == "RGB" for part in found if part["type"] == "image")
    return [part["text"] if part["type"] == "text" else np.asarray(part["image"]) for part in found]


@pytest.mark.parametrize(
    "result",
    [
        "a text",
        "",
        None,
        3,
        True,
        {"type": "page", "text": "x"},
        {"image": "x"},
        ["a", "b"],
        [1, [2]],
        [{"title": "a"}],
        (),
        b"\x89PNG",
        np.float32(1.5),
        np.zeros(3, np.uint8),
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 2), np.uint8),
        torch.zeros(2, 2, 3),
    ],
    ids=repr,
)
def test_other_results_are_strings(result):
    """As in TRL, except for what is an image or a content block."""
    assert content_parts(result, LIMITS, 3) == [{"type": "text", "text": str(result)}]
    assert not is_media(result)


URL = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "result",
    [
        IMAGE,
        PIXELS,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        {"type": "image", "image": IMAGE},
        [{"type": "image", "image": png()}],
        [{"type": "image", "image": {"bytes": png()}}],
        [{"type": "image", "url": URL}],
        [{"type": "image_url", "image_url": {"url": URL}}],
        [{"type": "input_image", "image_url": URL}],
        [{"type": "image", "base64": base64.b64encode(png()).decode()}],
        [{"type": "image", "image": PIXELS / 255}],
    ],
    ids=range(12),
)
def test_one_image(result):
    (image,) = parts(result)
    assert np.array_equal(image, PIXELS)
    assert is_media(result)


def test_a_path_in_a_block(tmp_path):
    """A path in a block is opened, and a string is text even if it is the path of an image."""
    path = tmp_path / "image.png"
    path.write_bytes(png())
    image, text = parts([{"type": "image", "path": str(path)}, str(path)])
    assert np.array_equal(image, PIXELS)
    assert text == str(path)


def test_lists_mix_texts_images_and_blocks():
    """Adjacent texts are joined, empty ones removed."""
    found = parts(["a", {"type": "text", "text": "b"}, IMAGE, "", PIXELS, "c", "", "d"])
    assert [item if isinstance(item, str) else "image" for item in found] == ["ab", "image", "image", "cd"]
    assert parts((IMAGE, "c"))[1] == "c"
    assert parts([]) == [""]
    assert parts([{"type": "text", "text": ""}]) == [""]
    assert parts([{"type": "text", "text": "a", "image": None}]) == ["a"]
    assert parts({"type": "text", "text": "a"}) == ["a"]


class Text(str):
    __slots__ = ()

    def __str__(self):
        return self


def test_texts_are_plain_strings():
    """So that they pickle."""
    for result in (Text("a"), [IMAGE, Text("a")], [{"type": "text", "text": Text("a")}]):
        assert type(parts(result)[-1]) is str


def test_pixels_have_the_rules_of_data_sets():
    """Grey and transparent images become RGB, EXIF rotations are applied, and the metadata of a file is dropped."""
    (grey,) = parts(PIXELS[..., :1])
    assert np.array_equal(grey, np.repeat(PIXELS[..., :1], 3, 2))
    (white,) = parts(np.zeros((2, 2, 4), np.uint8))
    assert (white == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    file = io.BytesIO()
    IMAGE.save(file, "PNG", exif=exif)
    (part,) = content_parts(Image.open(file), LIMITS, 1)
    assert np.array_equal(np.asarray(part["image"]), np.rot90(PIXELS, -1))
    assert type(part["image"]) is Image.Image
    assert part["image"].info == {}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Image.new("RGB", (11, 10)), r"result\[0\] is not an image .*at most 100 pixels \(max_image_pixels\), got 11 x 10"),
        (np.zeros((11, 10, 3), np.uint8), "at most 100 pixels"),
        ([{"type": "image", "image": b"1" * 1001}], "at most 1000 bytes"),
        (["text", {"type": "image", "image": b"1"}], r"result\[1\] is not an image that can be used: cannot identify"),
        ([{"type": "image", "image": png()[:-30]}], "not an image that can be used"),
        ([{"type": "image", "image": 3}], "image must be a PIL image, a path, bytes, .*got int"),
        ([{"type": "image", "image": "/nowhere.png"}], "No such file"),
        ([{"type": "image", "image": "/dev/zero"}], "must be a regular file"),
        ([{"type": "image", "url": "https://example.com/a.png"}], "must not be a remote URL"),
        ([{"type": "image"}], r"result\[0\] must have an image, got only its type"),
        ([{"type": "text", "text": 3}], r"result\.?\[0\].text must be a string, got 3"),
        ([IMAGE, 3], r"result\[1\] must be a string or a part with a type, got 3"),
        ([IMAGE, {"title": "x"}], r"result\[1\] must have a type"),
        ([{"type": "video", "video": "x.mp4"}], r"result\[0\] must be text or an image, got type video"),
        ([IMAGE] * 100, "result must have at most 3 images, got 100"),
        ("x" * 10_000_000, f"at most {MAX_CHARACTERS} characters, got 10000000"),
        ([IMAGE, *["x" * MAX_CHARACTERS] * 2], f"at most {MAX_CHARACTERS} characters"),
        ("ab\ud800", r"must be valid Unicode, got '\\ud800' at position 2"),
        ([IMAGE, "\udfff"], "must be valid Unicode"),
        (np.zeros((0, 3, 3), np.uint8), "must not be empty"),
    ],
)
def test_errors(result, message):
    with pytest.raises(ToolError, match=message):
        content_parts(result, LIMITS, 3)


def test_a_bomb_is_not_decoded():
    """A small file of many pixels is refused by its header."""
    file = png(Image.new("1", (8000, 8000)))
    with pytest.raises(ToolError, match="at most 100 pixels"):
        content_parts([{"type": "image", "image": file}], ImageLimits(max_pixels=100), 1)


def test_error_parts():
    assert error_parts("it's") == [{"type": "text", "text": str({"error": "it's"})}]
    assert len(error_parts("x" * 10_000_000)[0]["text"]) < MAX_CHARACTERS + 20
