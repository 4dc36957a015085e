"""The benchmark shapes-and-digits: the same everywhere, and right."""

import json
from itertools import product

import numpy as np
import pytest

from vlmkernels import cli
from vlmkernels.demo import main
from vlmkernels.demo import suite as demo
from vlmkernels.demo.model import build_tokenizer
from vlmkernels.evaluate import shapes_and_digits as suite
from vlmkernels.rewards.answers import parse_box

PART = 60


def parts(row):
    words = row["prompt"][0]["content"][0]["text"].rstrip("?.").split()
    return words, np.asarray(row["image"]).astype(int), row["answer"]


def shapes_in(pixels):
    """(colour, name, box) of every shape, found by flood filling cells' coloured pixels and comparing with each drawn shape."""
    found = []
    for column, row in product(range(suite.GRID), repeat=2):
        cell = pixels[row * suite.CELL : (row + 1) * suite.CELL, column * suite.CELL : (column + 1) * suite.CELL]
        for colour, value in suite.COLOURS.items():
            y, x = np.nonzero((cell == value).all(-1))
            if not len(y):
                continue
            size = max(np.ptp(y), np.ptp(x)) + 1
            patch = (cell == value).all(-1)[y.min() : y.min() + size, x.min() : x.min() + size]
            (name,) = [
                n for n in suite.SHAPES if suite._mask(n, size).shape == patch.shape and (suite._mask(n, size) == patch).all()
            ]
            left, top = column * suite.CELL + x.min(), row * suite.CELL + y.min()
            found.append((colour, name, (left, top, left + size, top + size)))
    return found


def cell_of(box):
    """The number of its cell, in reading order."""
    return box[1] // suite.CELL * suite.GRID + box[0] // suite.CELL


@pytest.mark.parametrize("split", suite.SPLITS)
def test_a_part_is_what_it_was(split):
    assert suite.checksum(suite.Split(split, PART)) == suite.CHECKSUMS[split][1]


def test_the_test_split_is_what_it_was():
    assert suite.checksum(suite.Split("test")) == suite.CHECKSUMS["test"][0]


def test_checksum_sees_every_pixel_and_word():
    rows = [suite.sample("test", index) for index in range(2)]
    before = suite.checksum(rows)
    rows[1]["image"].putpixel((83, 83), (0, 0, 0))
    assert suite.checksum(rows) != before
    rows = [suite.sample("test", index) for index in range(2)]
    rows[0]["answer"] += " "
    assert suite.checksum(rows) != before


def test_a_sample_depends_on_its_index_alone():
    one, other = suite.sample("dev", 17), suite.Split("dev", 20)[17]
    assert suite.checksum([one]) == suite.checksum([other])
    assert suite.checksum([one]) != suite.checksum([suite.sample("test", 17)])


def test_answers_are_right():
    """Each answer, found again from the pixels and the words of the question."""
    seen = dict.fromkeys(suite.CATEGORIES, 0)
    for index, row in enumerate(suite.Split("test", 360)):
        words, pixels, answer = parts(row)
        asked = suite.asked("test", index)
        shapes = shapes_in(pixels)
        category = row["category"]
        seen[category] += 1
        if category == "counting":
            what = words[2]
            names = {"crosses": "cross"}.get(what, what.removesuffix("s"))
            cells = [cell_of(box) for colour, name, box in shapes if what == colour or names == name]
            assert int(answer) == len(cells)
            assert asked == [int(cell in cells) for cell in range(9)]
        elif category == "colour":
            assert [(colour, cell_of(box)) for colour, name, box in shapes if name == words[-1]] == [(answer, asked.index(1))]
        elif category == "spatial":
            a, b = ([box for _, name, box in shapes if name == word] for word in (words[3], words[6]))
            (a,), (b,) = a, b
            axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[answer]
            a, b = (divmod(cell_of(box), suite.GRID)[::-1] for box in (a, b))
            assert np.sign(a[axis] - b[axis]) == sign
            assert a[1 - axis] == b[1 - axis]
            assert [asked.index(place) for place in (1, 2)] == [row * suite.GRID + column for column, row in (a, b)]
        elif category == "grounding":
            assert [box for colour, name, box in shapes if (colour, name) == tuple(words[2:4])] == [parse_box(answer)]
            assert cell_of(parse_box(answer)) == asked.index(1)
        elif category == "negation":
            there = any((colour, name) == tuple(words[3:5]) for colour, name, _ in shapes)
            assert answer == ("yes" if there != (words[2] == "no") else "no")
            assert max(asked) == there
        elif category == "ocr":
            assert answer.isdigit()
            assert 1 <= len(answer) <= 3
            dark = (pixels.max(-1) < 100).reshape(3, suite.CELL, 3, suite.CELL).any((1, 3)).flatten()
            assert [place for place in asked if place] == [*range(1, len(answer) + 1)]
            assert [place > 0 for place in asked] == dark.tolist()
    assert set(seen.values()) == {60}


def test_answers_are_balanced():
    answers = {category: [] for category in suite.CATEGORIES}
    for row in suite.Split("test"):
        answers[row["category"]].append(row["answer"])
    for category, most in {
        "counting": 0.3,
        "colour": 0.35,
        "spatial": 0.35,
        "negation": 0.6,
        "ocr": 0.1,
        "grounding": 0.05,
    }.items():
        given = answers[category]
        assert max(given.count(answer) for answer in set(given)) <= most * len(given)


def test_no_scan_is_in_two_splits():
    scans = suite.scans()
    pixels = {split: {scan.tobytes() for scan in scans[split].pixels} for split in scans}
    assert not pixels["train"] & pixels["dev"]
    assert not pixels["train"] & pixels["test"]
    assert not pixels["dev"] & pixels["test"]


def test_the_demo_learns_with_a_reward_per_category(tmp_path, monkeypatch, capsys):
    """Two steps of it, which cannot succeed."""
    monkeypatch.setattr(demo, "SEEING_STEPS", 1)
    monkeypatch.setattr(demo, "ANSWER_STEPS", 1)
    monkeypatch.setattr(demo, "ANSWER_ROWS", 12)
    monkeypatch.setitem(demo.GRPO, "per_device_train_batch_size", 12 * 2)
    monkeypatch.setitem(demo.GRPO, "num_generations", 2)
    monkeypatch.setitem(suite.SPLITS, "train", 1200)
    monkeypatch.setitem(suite.SPLITS, "test", 12)
    assert main(["--suite", "--steps", "2", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED GRPO must raise the accuracy over all categories" in printed
    assert all(f"\n{category} " in printed for category in suite.CATEGORIES)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result["metrics"]) == set(result["before"]) == {"all", *suite.CATEGORIES}
    assert {"value", "low", "high", "hidden", "cost"} < set(result["metrics"]["grounding"]["miou"])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {f"rewards/{category}/mean" for category in suite.CATEGORIES} < set(log[0])
    assert "Compared with before GRPO" in (tmp_path / "eval.html").read_text()

    # What was saved is what `vlmkernels eval` reads, and it finds the same.
    flags = [
        "--dataset",
        suite.NAME,
        "--max_completion_length",
        str(demo.ANSWER_TOKENS),
        "--output",
        str(tmp_path / "again.json"),
    ]
    assert cli.main(["eval", "--model", str(tmp_path / "model"), *flags]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["metrics"]["all"]["accuracy"]["value"] == result["metrics"]["all"]["accuracy"]["value"]
    assert again["completions"]["mean_length"] == pytest.approx(result["metrics"]["all"]["mean_length"]["value"])


def test_every_word_is_a_token_and_every_answer_fits():
    rows = suite.Split("train", 600)
    tokenizer = build_tokenizer(demo.words(rows))
    for row in rows:
        for word in row["prompt"][0]["content"][0]["text"].rstrip("?.").split():
            assert len(tokenizer.tokenize(f" {word}")) <= 2  # a first word has no space before it
        assert (
            len(tokenizer.tokenize(row["answer"]))
            == (1 if row["answer"].isalpha() else len(row["answer"]))
            < demo.ANSWER_TOKENS
        )


def test_errors():
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'tests'"):
        suite.Split("tests")
    with pytest.raises(ValueError, match="count must be 1 to 600, got 601"):
        suite.Split("dev", 601)
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        suite.Split("dev", 5)[5]


def test_rows_are_json_but_for_the_image():
    row = suite.sample("train", 3)
    assert json.loads(json.dumps({k: v for k, v in row.items() if k != "image"}))["category"] == "grounding"
