"""Rows to model inputs, and invalid rows."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny, tiny_families

from vlmkernels.data.images import open_image
from vlmkernels.data.samples import encode, read_sample, render
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)

QWEN_VL = family_of(tiny.vlm().config)


def as_bytes(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def ask(text="what?", images=0):
    parts = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def text_of(row):
    return render(read_sample(row, 0), tiny.processor())


def test_images_in_every_form_give_the_same_pixels(tmp_path):
    image = tiny.image(3)
    image.save(tmp_path / "a.png")
    forms = [image, str(tmp_path / "a.png"), tmp_path / "a.png", as_bytes(image), {"bytes": as_bytes(image), "path": None}]
    forms.append({"bytes": None, "path": str(tmp_path / "a.png")})
    for form in forms:
        assert open_image(form).convert("RGB").tobytes() == image.tobytes()
    gray = read_sample({"prompt": ask(), "image": image.convert("L")}, 0).images[0]
    assert gray.mode == "RGB"


def test_images_fill_the_image_parts_of_the_prompt():
    image = tiny.image(0)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    plain = [{"role": "user", "content": "what?"}]
    assert text_of({"prompt": plain, "image": image}) == turn.format(block + "what?")  # inserted before the text
    assert text_of({"prompt": plain, "images": [image, image]}) == turn.format(2 * block + "what?")
    assert text_of({"prompt": plain, "image": None}) == turn.format("what?")
    last = [{"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}]
    assert text_of({"prompt": last, "image": image}) == turn.format("what?" + block)  # stays in its place
    inside = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    assert text_of({"prompt": inside}) == turn.format(block + "?")
    assert text_of({"prompt": f"{block}what?", "image": image}) == f"{block}what?"
    system = [{"role": "system", "content": "be brief"}, *plain]
    assert block + "what?" in text_of({"prompt": system, "image": image})


def test_videos_in_every_form_give_the_same_frames(tmp_path):
    frames = [tiny.image(k, 56, 28) for k in range(3)]
    for k, frame in enumerate(frames):
        frame.save(tmp_path / f"{k}.png")
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])  # (3, 28, 56, 3)
    forms = [frames, [tmp_path / f"{k}.png" for k in range(3)], [{"bytes": as_bytes(frame), "path": None} for frame in frames]]
    forms += [
        list(pixels.numpy()),
        list(pixels.movedim(-1, 1)),
        pixels,
        pixels.numpy(),
        [frames[0], pixels[1], pixels[2].numpy()],
    ]
    for form in forms:
        sample = read_sample({"prompt": ask(), "videos": [form]}, 0)
        assert torch.equal(sample.videos[0], pixels.movedim(-1, 1))
        assert read_sample({"prompt": ask(), "videos": [form]}, 0, decode=False).videos[0].shape == (3, 3, 28, 56)
    assert (sample.fps, read_sample({"prompt": ask(), "videos": [frames], "fps": 4}, 0).fps) == (2.0, 4.0)


def test_videos_fill_the_video_parts_of_the_prompt():
    frames, picture = [tiny.image(0), tiny.image(1)], tiny.image(2)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": ask(), "image": picture, "videos": [frames]}
    assert text_of(row) == turn.format(image + video + "what?")
    parts = [{"type": "video"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "video"}]
    row = {"prompt": [{"role": "user", "content": parts}], "image": picture, "videos": [frames, frames]}
    assert text_of(row) == turn.format(video + "or" + image + video)
    inside = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]}]
    assert text_of({"prompt": inside}) == turn.format(video + "?")


WITH_VIDEOS = [name for name in tiny_families.BUILDERS if tiny_families.case(name).video]


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_of_every_family(name):
    """encode returns what the processor returns for the same pixels."""
    case, rows = tiny_families.case(name), []
    for index, sample in enumerate(case.samples):
        noise = np.random.default_rng(index)
        pixels = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (*sample.images, *sample.videos)]
        split = len(sample.images)
        text = case.image * split + case.video * len(sample.videos) + "why" * index + "?"
        rows.append({"prompt": text, "images": [Image.fromarray(x) for x in pixels[:split]], "videos": pixels[split:]})
    batch = encode([read_sample(row, i) for i, row in enumerate(rows)], case.processor, family_of(case.model.config))
    expected = case.inputs()
    assert batch.inputs.keys() == expected.keys() - set(batch.family.unused)
    assert all(torch.equal(x, expected[n]) for n, x in batch.inputs.items())
    assert batch.rows["video"].tolist() == [len(sample.videos) for sample in case.samples]


def test_encode_pads_left_and_keeps_each_image_once():
    rows = tiny.rows(3, "mixed")
    prompts = encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.processor(), QWEN_VL)
    assert prompts.num_images.tolist() == [0, 1, 2]
    assert prompts.inputs["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2], [1, 2, 4]]
    assert prompts.inputs["attention_mask"][0, 0] == 0
    assert prompts.inputs["attention_mask"][:, -1].all()
    texts = tiny.tokenizer().batch_decode(prompts.inputs["input_ids"])
    assert [text.count("<|image_pad|>") for text in texts] == [0, 1, 3]  # the last image has two tokens
    alone = encode([read_sample(rows[2], 2)], tiny.processor(), QWEN_VL)
    torch.testing.assert_close(prompts.select(torch.tensor([2])).inputs["pixel_values"], alone.inputs["pixel_values"])


def test_encode_text_model():
    rows = tiny.rows(2, "none")
    prompts = encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.tokenizer(), TEXT)
    assert tiny.tokenizer().decode(prompts.inputs["input_ids"][1]).endswith("what is 1?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 7}, "sample 1: prompt must be a string or a list of messages, got 7"),
        ({"prompt": ask(), "image": "nowhere.png"}, r"sample 1: image cannot be read: .*nowhere.png"),
        ({"prompt": ask(), "image": b"not an image"}, "sample 1: image cannot be read: cannot identify image file"),
        ({"prompt": ask(), "image": Image.new("RGB", (0, 4))}, "sample 1: image .* must not be empty, got 0 x 4 pixels"),
        ({"prompt": ask(), "images": [tiny.image(0), 3]}, r"sample 1: images\[1\] .* must be a PIL image, .* got int"),
        (
            {"prompt": ask(images=2), "image": tiny.image(0)},
            "sample 1: image must hold one image per image part of the prompt, 2, got 1",
        ),
        (
            {"prompt": ask(images=1), "images": []},
            "sample 1: images must hold one image per image part of the prompt, 1, got 0",
        ),
        (
            {"prompt": "<|image_pad|><|image_pad|>what?", "image": tiny.image(0)},
            r"sample 1: prompt must hold one <\|image_pad\|> per image, 1, got 2 in '<\|image_pad\|>",
        ),
        (
            {"prompt": ask("is <|image_pad|> a token?"), "image": tiny.image(0)},
            r"sample 1: prompt must hold one <\|image_pad\|> per image, 1, got 2",
        ),
        ({"prompt": ask(), "videos": [[]]}, r"sample 1: videos\[0\] must hold at least one frame, got 0"),
        (
            {"prompt": ask(), "videos": [tiny.image(0), tiny.image(1)]},
            r"sample 1: videos\[0\] must be a list of frames, an array or a tensor, got Image",
        ),
        (
            {"prompt": ask(), "videos": [[tiny.image(0), tiny.image(1, 56, 28)]]},
            r"sample 1: videos\[0\]\[1\] must have the size of the first frame, 28 x 28, got 28 x 56",
        ),
        (
            {"prompt": ask(), "videos": [[tiny.image(0), "nowhere.png"]]},
            r"sample 1: videos\[0\]\[1\] cannot be read: .*nowhere.png",
        ),
        (
            {"prompt": ask(), "videos": [np.zeros((28, 28, 3), np.uint8)]},
            r"sample 1: videos\[0\] must be frames .* \(28, 28, 3\)",
        ),
        (
            {"prompt": ask(), "videos": [[np.zeros((28, 28, 3))]]},
            r"sample 1: videos\[0\]\[0\] must have dtype uint8, got float64",
        ),
        ({"prompt": ask(), "videos": [torch.zeros(2, 4, 28, 28).byte()]}, r"sample 1: videos\[0\] must be \(H, W, 3\) or"),
        (
            {"prompt": "<|video_pad|><|video_pad|>", "videos": [[tiny.image(0)]]},
            r"sample 1: prompt must hold one <\|video_pad\|> per video, 1, got 2",
        ),
        ({"prompt": ask(), "videos": [[tiny.image(0)]], "fps": 0}, "sample 1: fps must be finite and > 0, got 0"),
        ({"answer": "1"}, "train_dataset: sample 1 must have 'prompt', got answer"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:60],
)
def test_bad_rows_are_named_before_training(tmp_path, row, message):
    rows = [{"prompt": ask(), "image": tiny.image(0)}, row]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    with pytest.raises((ValueError, TypeError), match=message):
        GRPOTrainer(tiny.vlm(), lambda **_: [0.0, 0.0], args, rows, processing_class=tiny.processor())


def test_an_image_with_missing_pixels_is_named_when_it_is_read():
    whole = as_bytes(tiny.image(1, 280, 280))
    row = {"prompt": ask(), "image": whole[: len(whole) // 2]}
    with pytest.raises(ValueError, match="sample 4: image cannot be read: image file is truncated"):
        read_sample(row, 4)
