"""Datasets: checks before training, samples that cannot be read, and loading of files."""

import io
import json

import datasets
import pytest
from PIL import Image
from support import tiny, tiny_families

from vlmkernels.data.dataset import SampleDataset, check_dataset, load_dataset
from vlmkernels.data.samples import read_sample


def ask(text="what?"):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def truncated_image() -> bytes:
    data = io.BytesIO()
    tiny.image(1, 280, 280).save(data, "PNG")
    return data.getvalue()[:200]


def test_bad_samples_are_replaced_by_the_next():
    rows = [{"prompt": "a"}, {"prompt": ask(), "image": truncated_image()}, {"prompt": 7}, {"prompt": "b"}]
    data = SampleDataset(rows, "eval_dataset", on_bad="skip", bad={2: "known"})
    assert [(index, sample.index) for index, sample in (data[i] for i in range(4))] == [(0, 0), (1, 3), (2, 3), (3, 3)]
    assert data.bad.keys() == {1, 2}
    with pytest.raises(ValueError, match="sample 1: image cannot be read: image file is truncated"):
        SampleDataset(rows, "eval_dataset")[1]
    unusable = SampleDataset(rows[2:3], "eval_dataset", on_bad="skip")
    with pytest.raises(ValueError, match="eval_dataset must have a sample that can be read, got sample 0: prompt"):
        unusable[0]


def test_bad_datasets():
    def check(dataset):
        return check_dataset(dataset, "eval_dataset", tiny.processor())

    with pytest.raises(ValueError, match="eval_dataset must have a column 'prompt', got question, image"):
        check([{"question": "?", "image": None}])
    with pytest.raises(ValueError, match="eval_dataset must hold at least one sample, got 0"):
        check([])
    with pytest.raises(TypeError, match="eval_dataset must be a sequence of rows with a length, got generator"):
        check(row for row in tiny.rows(2))
    with pytest.raises(ValueError, match="sample 0: images must be absent for a text model, got 1"):
        check_dataset(tiny.rows(2, "one"), "train_dataset", tiny.tokenizer())
    without = tiny_families.case("llava").processor
    with pytest.raises(ValueError, match="sample 1: videos must be absent for a processor without videos, got 1"):
        check_dataset([{"prompt": "?"}, {"prompt": "?", "videos": [[tiny.image(0)]]}], "train_dataset", without)


def test_huggingface_dataset_with_images():
    data = datasets.Dataset.from_list(tiny.rows(3, "one")).cast_column("image", datasets.Image())
    check_dataset(data, "train_dataset", tiny.processor())
    assert read_sample(data[2], 2).images[0].tobytes() == tiny.rows(3, "one")[2]["image"].tobytes()
    several = datasets.Dataset.from_list(tiny.rows(3, "mixed")).cast_column("images", datasets.List(datasets.Image()))
    check_dataset(several, "train_dataset", tiny.processor())
    assert [len(read_sample(several[i], i).images) for i in range(3)] == [0, 1, 2]
    frames = [row["videos"] for row in tiny.rows(3, "videos")[1:]]
    videos = datasets.Dataset.from_dict({"prompt": ["<|video_pad|>?"] * 2, "videos": frames})
    assert [read_sample(videos[i], i).videos[0].shape[0] for i in range(2)] == [3, 4]  # stored as bytes
    videos = videos.cast_column("videos", datasets.List(datasets.List(datasets.Image())))
    assert isinstance(videos[0]["videos"][0][0], Image.Image)
    check_dataset(videos, "train_dataset", tiny.processor())
    assert [read_sample(videos[i], i).videos[0].shape[0] for i in range(2)] == [3, 4]
    broken = datasets.Dataset.from_dict({"prompt": ["<|image_pad|>"], "image": [{"bytes": b"no", "path": None}]})
    with pytest.raises(ValueError, match="sample 0: image cannot be read: cannot identify"):
        check_dataset(broken.cast_column("image", datasets.Image()), "train_dataset", tiny.processor())


def test_a_line_of_jsonl_ends_only_at_a_newline(tmp_path):
    """JSON may contain other characters that are line breaks in Unicode."""
    row = {"prompt": "one\u2028two\x85three"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_dataset(tmp_path / "data.jsonl") == [row]


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

    video = {"prompt": "<|video_pad|>", "videos": [["pictures/0.png", "pictures/1.png"]]}
    (tmp_path / "videos.jsonl").write_text(json.dumps(video))
    assert len(read_sample(load_dataset(tmp_path / "videos.jsonl")[0], 0).videos[0]) == 2

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
