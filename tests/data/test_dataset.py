"""Datasets: checks before training, samples that cannot be read, and loading of files."""

import copy
import io
import json
import pickle
from functools import partial

import datasets
import pytest
import transformers
from PIL import Image
from support import tiny, tiny_families
from support.training import config

from vlmkernels.cli import main
from vlmkernels.data.dataset import RowChecks, SampleDataset, check_dataset, column_names, load_dataset, row_name
from vlmkernels.data.samples import encode, read_sample
from vlmkernels.data.sizes import SizeCheck
from vlmkernels.models.families import family_of
from vlmkernels.rewards import Rewards
from vlmkernels.train import GRPOTrainer


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
    with pytest.raises(
        ValueError, match="eval_dataset must have a sample that can be read, got eval_dataset: sample 0: prompt"
    ):
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


@pytest.mark.parametrize("name", [name for name in ("glm4v_moe", "glm46v", "molmo2") if name in tiny_families.BUILDERS])
def test_families_with_one_kind_of_media(name):
    case = tiny_families.case(name)
    family, frames = family_of(case.model.config), [tiny.image(1)] * 4
    text, video = {"prompt": "?"}, {"prompt": f"{case.video}?", "videos": [frames]}
    image = {"prompt": f"{case.image}?", "image": tiny.image(0)}
    check = partial(check_dataset, processor=case.processor, checks=RowChecks(family=family))
    assert check([text, image, image], "train_dataset")[0] == {"image"}
    assert check([text, video, video], "train_dataset")[0] == {"video"}
    message = f"samples must have only images or only videos for {family.name}, whose batches hold one kind, got images in "
    with pytest.raises(ValueError, match=f"{message}train_dataset: sample 2 and videos in train_dataset: sample 1"):
        check([text, video, image, video], "train_dataset")
    bad = {}
    assert check([image | video | {"prompt": case.image + case.video}, text], "train_dataset", bad=bad)[0] == set()
    assert bad == {0: f"{message}train_dataset: sample 0 and videos in train_dataset: sample 0"}
    with pytest.raises(ValueError, match=f"{message}sample 0 and videos in sample 1"):
        encode([read_sample(row, index) for index, row in enumerate((image, video))], case.processor, family)
    two = {"prompt": 2 * case.video, "videos": [frames, frames]}
    if family.max_videos is None:
        assert check([two], "train_dataset")[0] == {"video"}
    else:
        with pytest.raises(ValueError, match="train_dataset: sample 0: videos must be at most 1 for molmo2, got 2"):
            check([two], "train_dataset")


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
    for encoding in ("utf-8", "utf-8-sig"):  # with a byte order mark
        (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding=encoding)
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
    bad.write_bytes('{"prompt": "a"}\n{"prompt": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: must be UTF-8, got b'.*\\xe9\"\}'"):
        load_dataset(bad)
    bad.write_text('{"prompt": "\u00e9"}\r\n', encoding="utf-8-sig")  # as Windows writes it
    assert list(load_dataset(bad)) == [{"prompt": "\u00e9"}]
    (tmp_path / "table.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"dataset must end in .jsonl or .parquet or be a folder, got .*table.csv"):
        load_dataset(tmp_path / "table.csv")


# Rows of a dataset


def test_columns_are_the_union_over_rows():
    """The order of the rows does not decide which columns there are, and rows get None for columns that they lack."""
    rows = [{"prompt": "a", "text": "x"}, {"prompt": "b", "number": 1}]
    assert column_names(rows) == ["prompt", "text", "number"]
    assert column_names(rows[::-1]) == ["prompt", "number", "text"]

    class Rows:
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    stored = datasets.Dataset.from_dict({"prompt": ["a", "b"], "text": ["x", None], "number": [None, 1]})
    for data in (rows, rows[::-1], Rows(), stored):
        seen = []
        _, columns = check_dataset(data, "train_dataset", tiny.tokenizer(), checks=RowChecks(seen.extend))
        assert set(columns) == set(seen) == {"prompt", "text", "number"}
    samples = SampleDataset(rows, "train_dataset", columns=columns)
    assert [samples[index][1].row.get("number", "absent") for index in range(2)] == [None, 1]
    assert samples[0][1].row["text"] == "x"


@pytest.mark.parametrize("first", ["ocr", "count"])
def test_a_mixture_of_tasks_in_any_order(tmp_path, first):
    rows = [{"prompt": ask(f"read {index}"), "text": "a"} for index in range(4)]
    rows += [{"prompt": ask(f"count {index}"), "number": 1} for index in range(4)]
    rows = rows if first == "ocr" else rows[::-1]
    seen = []

    def columns_of(completions, **columns):
        seen.append(sorted(columns.keys() & {"text", "number"}))
        return [0.0] * len(completions)

    rewards = [{"name": "exact_match", "column": "text"}, {"name": "count", "column": "number"}, columns_of]
    args = config(tmp_path, max_steps=2, gradient_accumulation_steps=1)
    GRPOTrainer(tiny.text_model(), rewards, args, rows, processing_class=tiny.tokenizer()).train()
    assert seen == [["number", "text"]] * 2


def misspelt(completions, anwser, **kwargs):
    return [0.0] * len(completions)


def without_rest(completions, answer):
    return [0.0] * len(completions)


def by_position(completions, /, **kwargs):
    return [0.0] * len(completions)


class Fits:
    async def __call__(self, completions, answer, number=0, **kwargs):
        return [0.0] * len(completions)


def test_columns_and_signatures_of_rewards():
    columns = ["prompt", "image", "answer"]
    for reward in (without_rest, Fits(), Fits, partial(Fits(), number=1), "exact_match", "think_answer_format"):
        Rewards(reward).check_columns(columns, "train_dataset")
    for reward, message in (
        (misspelt, r"train_dataset must have a column 'anwser', .* got prompt, image, answer \(did you mean answer\?\)"),
        ({"name": "exact_match", "column": "anser"}, r"must have a column 'anser', .* \(did you mean answer\?\)"),
        (by_position, r"reward by_position must accept its arguments by keyword, got .* with completions by position"),
    ):
        with pytest.raises(ValueError, match=message):
            Rewards(reward).check_columns(columns, "train_dataset")
    with pytest.raises(ValueError, match=r"must have a column 'prompt', got prompts \(did you mean prompts\?\)"):
        check_dataset([{"prompts": "?"}], "train_dataset", tiny.tokenizer())


def test_rows_are_named_with_their_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n\n\n{"prompt": "b"}\n{"prompt": "\\ud83d"}\n')
    rows = load_dataset(path)
    names = [f"train_dataset: {path}, line {line}: sample {index}" for index, line in enumerate((1, 4, 5))]
    for data in (rows, pickle.loads(pickle.dumps(rows)), rows[0:]):
        assert [row_name(data, index, "train_dataset") for index in range(3)] == names
    assert row_name(rows[1:], 0) == f"{path}, line 4: sample 0"
    with pytest.raises(ValueError) as error:
        check_dataset(rows, "train_dataset", tiny.tokenizer())
    assert str(error.value).startswith(f"{names[2]}: prompt must be valid Unicode")
    datasets.Dataset.from_list([{"prompt": ""}]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"train_dataset: .*data.parquet: sample 0: prompt must not be empty"):
        check_dataset(load_dataset(tmp_path / "data.parquet"), "train_dataset", tiny.tokenizer())
    assert row_name([{}], 0) == "sample 0"


def test_images_within_prompts_of_a_dataset_are_not_decoded():
    content = [{"type": "image", "image": truncated_image()}, {"type": "text", "text": "what?"}]
    stored = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": content}]}])
    feature = copy.deepcopy(stored.features["prompt"])
    feature.feature["content"].feature["image"] = datasets.Image()
    stored = stored.cast_column("prompt", feature)
    kinds, _ = check_dataset(stored, "train_dataset", tiny.processor())
    assert kinds == {"image"}
    with pytest.raises(ValueError, match="train_dataset: sample 0: cannot be read: image file is truncated"):
        SampleDataset(stored, "train_dataset")[0]


def test_rows_that_cannot_be_read_are_bad_rows():
    class Rows:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("the disk is gone")
            return {"prompt": "a", "answer": index}

    with pytest.raises(ValueError, match="train_dataset: sample 1: cannot be read: the disk is gone"):
        check_dataset(Rows(), "train_dataset", tiny.tokenizer())
    bad = {}
    assert check_dataset(Rows(), "train_dataset", tiny.tokenizer(), bad=bad) == (set(), ["prompt", "answer"])
    assert bad == {1: "train_dataset: sample 1: cannot be read: the disk is gone"}


# Sizes and tokens that a model cannot take


def try_to_encode(sample, processor, family):
    encode([sample], processor, family)


@pytest.mark.parametrize("name", [name for name in tiny_families.BUILDERS if tiny_families.case(name).image])
def test_extreme_sizes_are_refused_exactly_where_the_processor_refuses_them(name):
    case = tiny_families.case(name)
    check, family = SizeCheck(case.processor), family_of(case.model.config)
    for index, size in enumerate([(28, 28), (3000, 14), (14, 3000), (1, 1), (2, 300), (1000, 1), (900, 30)]):
        sample = read_sample({"prompt": f"{case.image}?", "image": Image.new("RGB", size)}, index)
        refused = []
        for attempt in (check, partial(try_to_encode, processor=case.processor, family=family)):
            try:
                attempt(sample)
            except ValueError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2), refused
        assert all(text.startswith(f"sample {index}: ") for text in refused)


def test_sizes_are_tried_once_and_ordinary_sizes_never(monkeypatch):
    processor, tried = tiny.processor(), []
    monkeypatch.setattr(SizeCheck, "_try", lambda self, *size: tried.append(size))
    rows = [{"prompt": ask(), "images": [Image.new("RGB", size) for size in ((900, 10), (640, 480))]}] * 3
    check_dataset(rows, "train_dataset", processor)
    assert tried == [(10, 900)]


def test_ids_beyond_the_embedding_are_named():
    def check(tokenizer, text="a <new>", num_embeddings=50, **options):
        rows = [{"prompt": "a"}, {"prompt": text}]
        return check_dataset(rows, "train_dataset", tokenizer, checks=RowChecks(num_embeddings=num_embeddings), **options)

    tokenizer = tiny.tokenizer()
    assert len(tokenizer) == tiny.vlm().get_input_embeddings().weight.shape[0] == 50
    check(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    rule = "below the 50 rows of the model's embedding .*, got 50 for '<new>'"
    with pytest.raises(ValueError, match=f"train_dataset: sample 1: prompt must have token ids {rule}"):
        check(tokenizer)
    bad = {}
    check(tokenizer, bad=bad)
    assert bad.keys() == {1}
    check(tokenizer, text="b")  # tokens that no prompt has do no harm
    check(tokenizer, num_embeddings=51)
    padded = tiny.tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"pad_token of processing_class must have an id below the 50 rows .* 50 for '.PAD.'"):
        check(padded, text="b")


# Faults during a run


def test_samples_that_cannot_be_encoded_are_replaced(tmp_path):
    """Only the tokenizer shows that the text of a row has no tokens."""
    rows = [{"prompt": text, "answer": "1"} for text in ("a", "ÄÖ", "b", "c")]
    family = family_of(tiny.text_model().config)
    data = SampleDataset(rows, "train_dataset", on_bad="skip")
    replaced, inputs = data.encode([data[0], data[1]], partial(encode, processor=tiny.tokenizer(), family=family))
    assert [(index, sample.index) for index, sample in replaced] == [(0, 0), (1, 2)]
    assert tiny.tokenizer().batch_decode(inputs.inputs["input_ids"]) == ["a", "b"]
    assert data.bad.keys() == {1}
    args = {"max_steps": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match="train_dataset: sample 1: prompt must have at least one token, got none for 'ÄÖ'"):
        run(tmp_path, rows, **args)
    trainer = run(tmp_path, rows, on_bad_sample="skip", **args)
    replaced = [entry["frac_samples_replaced"] for entry in trainer.state.log_history if "loss" in entry]
    assert replaced == [0.0, 1.0, 0.0, 0.0]


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def run(tmp_path, rows, eval_rows=None, **options):
    trainer = GRPOTrainer(
        tiny.text_model(), length, config(tmp_path, **options), rows, eval_rows, processing_class=tiny.tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["size", "surrogate"])
def test_what_a_processor_refuses_is_skipped_in_training_and_evaluation(tmp_path, kind):
    rows = tiny.rows(8)
    rows[5] = {**rows[5], "image": Image.new("RGB", (3000, 14))} if kind == "size" else {**rows[5], "prompt": ask("\ud83d")}
    args = {"max_steps": 8, "gradient_accumulation_steps": 1}

    def trainer(on_bad):
        options = config(tmp_path, on_bad_sample=on_bad, **args)
        return GRPOTrainer(tiny.vlm(), length, options, rows, copy.copy(rows), processing_class=tiny.processor())

    with pytest.raises(ValueError, match=r"train_dataset: sample 5: (image must have a size|prompt must be valid Unicode)"):
        trainer("raise")
    skipping = trainer("skip")
    skipping.train()
    assert sum(entry.get("frac_samples_replaced", 0) for entry in skipping.state.log_history) == 1.0
    assert "eval_reward" in skipping.evaluate()
    other = skipping.evaluate([rows[5], rows[0]])  # a dataset that was not checked
    assert "eval_reward" in other


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.vlm().save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("fault", ["row", "column", "signature", "evaluation", "command", "eval command"])
def test_rows_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, saved, fault):
    loaded = []
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: loaded.append(1))
    good = [{"prompt": ask("a"), "answer": "1"}] * 4
    bad = [*good, {"prompt": ask("a"), "answer": "1", "image": "nowhere.png"}]
    reward = {"column": misspelt, "signature": by_position}.get(fault, "exact_match")
    args = config(tmp_path)
    if fault in ("command", "eval command"):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, bad)))
        flags = ["--model", saved, "--dataset", str(file), "--reward", "exact_match"]
        with pytest.raises(SystemExit) as exit:
            main(["train", *flags, "--output_dir", str(tmp_path)] if fault == "command" else ["eval", *flags])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert f"{file}, line 5: sample 4: image cannot be read" in error
    else:
        rows = (good, bad) if fault == "evaluation" else (bad if fault == "row" else good, None)
        with pytest.raises(ValueError, match=r"sample 4: image cannot be read|column 'anwser'|must accept its arguments"):
            GRPOTrainer(saved, reward, args, *rows)
    assert not loaded


def test_the_trainer_checks_ids_with_the_configuration(tmp_path, saved):
    processor = tiny.processor()
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    rows = [{"prompt": "a <new>"}] * 4
    for model in (saved, tiny.vlm()):
        with pytest.raises(ValueError, match="train_dataset: sample 0: prompt must have token ids below the 50 rows"):
            GRPOTrainer(model, length, config(tmp_path), rows, processing_class=processor)
