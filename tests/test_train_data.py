"""From rows to model inputs, and what is said about rows that cannot become any."""

import io
import json

import datasets
import pytest
import tiny
import torch
from PIL import Image

from vlmkernels.models.families import TEXT, family_of
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.data import check_dataset, encode, load_dataset, open_image, read_sample, render

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
    grey = read_sample({"prompt": ask(), "image": image.convert("L")}, 0).images[0]
    assert grey.mode == "RGB"


def test_images_go_to_the_prompt_s_image_parts():
    image = tiny.image(0)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    plain = [{"role": "user", "content": "what?"}]
    assert text_of({"prompt": plain, "image": image}) == turn.format(block + "what?")  # put before the text
    assert text_of({"prompt": plain, "images": [image, image]}) == turn.format(2 * block + "what?")
    assert text_of({"prompt": plain, "image": None}) == turn.format("what?")
    last = [{"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}]
    assert text_of({"prompt": last, "image": image}) == turn.format("what?" + block)  # left where it is
    inside = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    assert text_of({"prompt": inside}) == turn.format(block + "?")
    assert text_of({"prompt": f"{block}what?", "image": image}) == f"{block}what?"
    system = [{"role": "system", "content": "be brief"}, *plain]
    assert block + "what?" in text_of({"prompt": system, "image": image})


def test_encode_pads_left_and_keeps_each_image_once():
    rows = tiny.rows(3, "mixed")
    prompts = encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.processor(), QWEN_VL)
    assert prompts.num_images.tolist() == [0, 1, 2]
    assert prompts.inputs["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2], [1, 2, 4]]
    assert prompts.inputs["attention_mask"][0, 0] == 0
    assert prompts.inputs["attention_mask"][:, -1].all()
    texts = tiny.tokenizer().batch_decode(prompts.inputs["input_ids"])
    assert [text.count("<|image_pad|>") for text in texts] == [0, 1, 3]  # the second image of the last is two tokens wide
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
        ({"answer": "1"}, "train_dataset: sample 1 must have 'prompt', got answer"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:60],
)
def test_bad_rows_are_named_before_a_step_is_taken(tmp_path, row, message):
    rows = [{"prompt": ask(), "image": tiny.image(0)}, row]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    with pytest.raises((ValueError, TypeError), match=message):
        GRPOTrainer(tiny.vlm(), lambda **_: [0.0, 0.0], args, rows, processing_class=tiny.processor())


def test_an_image_with_missing_pixels_is_named_when_it_is_read():
    whole = as_bytes(tiny.image(1, 280, 280))
    row = {"prompt": ask(), "image": whole[: len(whole) // 2]}
    with pytest.raises(ValueError, match="sample 4: image cannot be read: image file is truncated"):
        read_sample(row, 4)


def test_bad_datasets():
    check = lambda dataset: check_dataset(dataset, "eval_dataset", tiny.processor())  # noqa: E731
    with pytest.raises(ValueError, match="eval_dataset must have a column 'prompt', got question, image"):
        check([{"question": "?", "image": None}])
    with pytest.raises(ValueError, match="eval_dataset must hold at least one sample, got 0"):
        check([])
    with pytest.raises(TypeError, match="eval_dataset must be a sequence of rows with a length, got generator"):
        check(row for row in tiny.rows(2))
    with pytest.raises(ValueError, match="sample 0: images must be absent for a text model, got 1"):
        check_dataset(tiny.rows(2, "one"), "train_dataset", tiny.tokenizer())


def test_huggingface_dataset_with_images():
    data = datasets.Dataset.from_list(tiny.rows(3, "one")).cast_column("image", datasets.Image())
    check_dataset(data, "train_dataset", tiny.processor())
    assert read_sample(data[2], 2).images[0].tobytes() == tiny.rows(3, "one")[2]["image"].tobytes()
    several = datasets.Dataset.from_list(tiny.rows(3, "mixed")).cast_column("images", datasets.List(datasets.Image()))
    check_dataset(several, "train_dataset", tiny.processor())
    assert [len(read_sample(several[i], i).images) for i in range(3)] == [0, 1, 2]
    broken = datasets.Dataset.from_dict({"prompt": ["<|image_pad|>"], "image": [{"bytes": b"no", "path": None}]})
    with pytest.raises(ValueError, match="sample 0: image cannot be read: cannot identify"):
        check_dataset(broken.cast_column("image", datasets.Image()), "train_dataset", tiny.processor())


def test_jsonl_and_parquet_and_folders(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        tiny.image(index).save(tmp_path / "pictures" / f"{index}.png")
    rows = [{"prompt": ask(), "image": f"pictures/{i}.png", "answer": str(i)} for i in range(2)]
    rows[1]["images"] = [rows[1].pop("image")]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    loaded = load_dataset(tmp_path / "data.jsonl")
    assert [read_sample(row, i).images[0].tobytes() for i, row in enumerate(loaded)] == [
        tiny.image(i).tobytes() for i in range(2)
    ]

    paths = datasets.Dataset.from_list([{"prompt": "<|image_pad|>?", "image": f"pictures/{i}.png"} for i in range(2)])
    paths.to_parquet(tmp_path / "paths.parquet")
    assert read_sample(load_dataset(tmp_path / "paths.parquet")[1], 1).images[0].tobytes() == tiny.image(1).tobytes()

    inside = datasets.Dataset.from_list(tiny.rows(2, "one")).cast_column("image", datasets.Image())
    inside.to_parquet(tmp_path / "inside.parquet")
    assert read_sample(load_dataset(tmp_path / "inside.parquet")[0], 0).images[0].tobytes() == tiny.image(0).tobytes()

    datasets.DatasetDict({"train": inside, "test": inside.select([1])}).save_to_disk(tmp_path / "folder")
    assert len(load_dataset(tmp_path / "folder", "test")) == 1
    with pytest.raises(ValueError, match="split must be one of train, test, got 'dev'"):
        load_dataset(tmp_path / "folder", "dev")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset must be an existing file or folder, got .*nothing.jsonl"):
        load_dataset(tmp_path / "nothing.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: must be JSON, got '\{\"prompt\": '"):
        load_dataset(bad)
    bad.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: must be a JSON object, got '\[1\]'"):
        load_dataset(bad)
    (tmp_path / "table.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"dataset must end in .jsonl or .parquet or be a folder, got .*table.csv"):
        load_dataset(tmp_path / "table.csv")
