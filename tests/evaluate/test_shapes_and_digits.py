"""The benchmark shapes-and-digits and its scanned digits: checksums, right answers, separate splits."""

import json
from itertools import product

import numpy as np
import pytest

from vlmkernels.evaluate import shapes_and_digits as suite
from vlmkernels.evaluate.digits import DIGIT_PIXELS, compose, load_scans
from vlmkernels.rewards.answers import parse_box

PART = 60


def parts(row):
    words = row["prompt"][0]["content"][0]["text"].rstrip("?.").split()
    return words, np.asarray(row["image"]).astype(int), row["answer"]


def shapes_in(pixels):
    """Find (colour, name, box) of every shape by comparing the colored pixels of each cell with the drawn shapes."""
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
    """Return the number of the box's cell in reading order."""
    return box[1] // suite.CELL * suite.GRID + box[0] // suite.CELL


@pytest.mark.parametrize("split", suite.SPLITS)
def test_checksum_of_the_first_rows(split):
    assert suite.checksum(suite.ShapesAndDigits(split, PART)) == suite.CHECKSUMS[split][1]


def test_checksum_of_the_test_split():
    assert suite.checksum(suite.ShapesAndDigits("test")) == suite.CHECKSUMS["test"][0]


def test_checksum_sees_every_pixel_and_word():
    rows = [suite.sample("test", index) for index in range(2)]
    before = suite.checksum(rows)
    rows[1]["image"].putpixel((83, 83), (0, 0, 0))
    assert suite.checksum(rows) != before
    rows = [suite.sample("test", index) for index in range(2)]
    rows[0]["answer"] += " "
    assert suite.checksum(rows) != before


def test_a_sample_depends_on_its_index_alone():
    one, other = suite.sample("dev", 17), suite.ShapesAndDigits("dev", 20)[17]
    assert suite.checksum([one]) == suite.checksum([other])
    assert suite.checksum([one]) != suite.checksum([suite.sample("test", 17)])


def test_answers_are_right():
    """Each answer is derived again from the pixels and the words of the question."""
    seen = dict.fromkeys(suite.CATEGORIES, 0)
    for index, row in enumerate(suite.ShapesAndDigits("test", 360)):
        words, pixels, answer = parts(row)
        labels = suite.cell_labels("test", index)
        shapes = shapes_in(pixels)
        category = row["category"]
        seen[category] += 1
        if category == "counting":
            what = words[2]
            names = {"crosses": "cross"}.get(what, what.removesuffix("s"))
            cells = [cell_of(box) for colour, name, box in shapes if what == colour or names == name]
            assert int(answer) == len(cells)
            assert labels == [int(cell in cells) for cell in range(9)]
        elif category == "colour":
            assert [(colour, cell_of(box)) for colour, name, box in shapes if name == words[-1]] == [(answer, labels.index(1))]
        elif category == "spatial":
            a, b = ([box for _, name, box in shapes if name == word] for word in (words[3], words[6]))
            (a,), (b,) = a, b
            axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[answer]
            a, b = (divmod(cell_of(box), suite.GRID)[::-1] for box in (a, b))
            assert np.sign(a[axis] - b[axis]) == sign
            assert a[1 - axis] == b[1 - axis]
            assert [labels.index(place) for place in (1, 2)] == [row * suite.GRID + column for column, row in (a, b)]
        elif category == "grounding":
            assert [box for colour, name, box in shapes if (colour, name) == tuple(words[2:4])] == [parse_box(answer)]
            assert cell_of(parse_box(answer)) == labels.index(1)
        elif category == "negation":
            there = any((colour, name) == tuple(words[3:5]) for colour, name, _ in shapes)
            assert answer == ("yes" if there != (words[2] == "no") else "no")
            assert max(labels) == there
        elif category == "ocr":
            assert answer.isdigit()
            assert 1 <= len(answer) <= 3
            dark = (pixels.max(-1) < 100).reshape(3, suite.CELL, 3, suite.CELL).any((1, 3)).flatten()
            assert [place for place in labels if place] == [*range(1, len(answer) + 1)]
            assert [place > 0 for place in labels] == dark.tolist()
    assert set(seen.values()) == {60}


def test_answers_are_balanced():
    answers = {category: [] for category in suite.CATEGORIES}
    for row in suite.ShapesAndDigits("test"):
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


def test_train_and_test_scans_are_disjoint():
    train, test = ({pixels.tobytes() for pixels in scans.pixels} for scans in load_scans())
    assert not train & test
    assert len(train) + len(test) == 1797  # all scans differ, and none is lost


def test_every_length_is_equally_frequent():
    rows = compose(load_scans()[1], 9, np.random.default_rng(0))
    assert [len(row["answer"]) for row in rows] == [1, 2, 3] * 3
    assert [row["image"].size for row in rows] == [(n * DIGIT_PIXELS, DIGIT_PIXELS) for n in (1, 2, 3)] * 3


def test_no_scan_is_in_two_splits():
    scans = suite.scans()
    pixels = {split: {scan.tobytes() for scan in scans[split].pixels} for split in scans}
    assert not pixels["train"] & pixels["dev"]
    assert not pixels["train"] & pixels["test"]
    assert not pixels["dev"] & pixels["test"]


def test_errors():
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'tests'"):
        suite.ShapesAndDigits("tests")
    with pytest.raises(ValueError, match="count must be 1 to 600, got 601"):
        suite.ShapesAndDigits("dev", 601)
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        suite.ShapesAndDigits("dev", 5)[5]


def test_rows_without_the_image_are_json():
    row = suite.sample("train", 3)
    assert json.loads(json.dumps({k: v for k, v in row.items() if k != "image"}))["category"] == "grounding"
