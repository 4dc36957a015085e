"""The benchmark ``shapes-and-digits``: six generated tasks on images of 84 x 84 pixels, identical on every machine.

A scene is a 3 x 3 grid of cells with at most one colored shape or one scanned digit each. Sample ``index`` of a split depends
only on the version, the split and the index, so any part can be generated on its own. Shapes are rasterized here, by comparing
numbers that floats represent exactly. Digits are the scans of ``vlmkernels.evaluate.digits``; no scan is in two splits. The
``checksum`` of a split must equal its entry in ``CHECKSUMS``; a change of a pixel or a word needs a new ``VERSION``.

| category | task | question | answer |
| --- | --- | --- | --- |
| counting | counting | How many red shapes? How many circles? | 0 to 4 |
| colour | exact | What colour is the circle? | red, green, blue or yellow |
| spatial | exact | Where is the circle from the square? | left, right, above or below |
| grounding | grounding | Box the red circle. | its box in pixels, [x1,y1,x2,y2] |
| ocr | ocr | Read the number. | one to three digits |
| negation | yes_no | Is there a red circle? Is there no red circle? | yes or no |
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vlmkernels.evaluate.digits import DIGIT_PIXELS, Scans, load_scans
from vlmkernels.ops.checks import require_one_of

NAME, VERSION = "shapes-and-digits", 2
CELL, GRID = DIGIT_PIXELS, 3
SIDE = CELL * GRID
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 97, 214), "yellow": (240, 190, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
STEP = 7  # pixels; sizes and positions of shapes are multiples of it
SIZES = (2 * STEP, 3 * STEP)  # height and width of a shape
SPLITS = {"train": 24000, "dev": 600, "test": 1200}  # number of samples; the six categories alternate
# SHA-256 of each split, and of its first 60 rows.
CHECKSUMS = {
    "train": (
        "fce73a52cd04dbbe1938ae52a07ff1885c930b8407a8bbb345295b6112a1112d",
        "52eb442e07bee02915fdbf4820b56739e1987467d6ee4698a91a5fc004e91747",
    ),
    "dev": (
        "9282dda0cb776e1b6d940791485f75f8289f5ae88e96b744f7ff3a34f681bda2",
        "8fa009b596d4a989b8725bcc088655d4bd252fc3b9261e00877d6c79c948cced",
    ),
    "test": (
        "df69586ceee521ef87bc55a5cbccf39e14072166721743ec3ccddaf6d8846928",
        "4cf1fbccc833372b56c906af77bce8b25dd48957ae48096011bd119fd2baf6d3",
    ),
}

T = TypeVar("T")

# The background is shaded from one corner, so that its colour reveals the position even to a vision tower with relative
# positions only.
PAPER = np.full((SIDE, SIDE, 3), 255, np.uint8)
PAPER[..., 0] -= np.arange(SIDE, dtype=np.uint8) // 2
PAPER[..., 2] -= np.arange(SIDE, dtype=np.uint8)[:, None] // 2


class Shape(NamedTuple):
    """A shape and its box (x1, y1, x2, y2) in pixels; x2 and y2 are exclusive."""

    colour: str
    name: str
    box: tuple[int, int, int, int]


class Draw:
    """Random choices that depend on a key. They use only ``random.random``, whose sequence Python guarantees not to change."""

    def __init__(self, *key: object):
        self.random = random.Random("/".join(map(str, key))).random

    def choice(self, items: Sequence[T]) -> T:
        """Return a random item."""
        return items[int(self.random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = int(self.random() * (last + 1))
            items[last], items[other] = items[other], items[last]
        return items

    def shape(self, colour: str, name: str, cell: tuple[int, int]) -> Shape:
        """Return a shape of random size at a random position within its cell (column, row)."""
        size = self.choice(SIZES)
        x, y = (CELL * index + self.choice(range(0, CELL - size + 1, STEP)) for index in cell)
        return Shape(colour, name, (x, y, x + size, y + size))


CELLS = tuple(product(range(GRID), range(GRID)))  # (column, row)
KINDS = tuple(product(COLOURS, SHAPES))


@cache
def _mask(name: str, size: int) -> np.ndarray:
    """Return (size, size) bool, the pixels whose centers a shape covers."""
    y, x = np.mgrid[0.5:size, 0.5:size]
    if name == "circle":
        return (x - size / 2) ** 2 + (y - size / 2) ** 2 <= (size / 2) ** 2
    if name == "triangle":
        return 2 * np.abs(x - size / 2) <= y + 0.5
    if name == "cross":
        return (3 * np.abs(x - size / 2) <= size / 2) | (3 * np.abs(y - size / 2) <= size / 2)
    return np.ones((size, size), bool)


def paint(shapes: Sequence[Shape], digits: Sequence[tuple[np.ndarray, tuple[int, int]]] = ()) -> Image.Image:
    """Return the image of a scene.

    Args:
        shapes: painted over the digits.
        digits: scans, (28, 28) uint8, with their cells (column, row).
    """
    pixels = PAPER.copy()
    for scan, (column, row) in digits:
        cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell[:] = cell.astype(int) * scan[..., None] // 255
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        pixels[y1:y2, x1:x2][_mask(shape.name, x2 - x1)] = COLOURS[shape.colour]
    return Image.fromarray(pixels)


def _scene(draw: Draw, kinds: Sequence[tuple[str, str]]) -> list[Shape]:
    """Return one shape of each kind (colour, name), in different cells."""
    return [draw.shape(*kind, cell) for kind, cell in zip(kinds, draw.shuffled(CELLS), strict=False)]


def _others(draw: Draw, kinds: Sequence[tuple[str, str]], least: int, most: int) -> list[tuple[str, str]]:
    """Return ``least`` to ``most`` random kinds, with repetition."""
    return [draw.choice(kinds) for _ in range(draw.choice(range(least, most + 1)))]


class Question(NamedTuple):
    """A question about an image.

    Attributes:
        question: the text.
        answer: its answer.
        image: the scene.
        cells: the cells (column, row) that the question is about, one list per object in the question or digit of the answer.
    """

    question: str
    answer: str
    image: Image.Image
    cells: Sequence[Sequence[tuple[int, int]]]


def _cells(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    return [(shape.box[0] // CELL, shape.box[1] // CELL) for shape in shapes]


def _counting(draw: Draw, scans: Scans) -> Question:
    count, by_colour = draw.choice(range(5)), draw.choice((True, False))
    target = draw.choice(tuple(COLOURS) if by_colour else SHAPES)
    fits = [kind for kind in KINDS if target in kind]
    rest = [kind for kind in KINDS if target not in kind]
    kinds = [draw.choice(fits) for _ in range(count)] + _others(draw, rest, 1, 3)
    what = f"{target} shapes" if by_colour else f"{target}es" if target == "cross" else f"{target}s"
    shapes = _scene(draw, kinds)
    return Question(f"How many {what}?", str(count), paint(shapes), [_cells(shapes[:count])])


def _colour(draw: Draw, scans: Scans) -> Question:
    colour, name = draw.choice(KINDS)
    kinds = [(colour, name), *_others(draw, [kind for kind in KINDS if kind[1] != name], 1, 3)]
    shapes = _scene(draw, kinds)
    return Question(f"What colour is the {name}?", colour, paint(shapes), [_cells(shapes[:1])])


def _spatial(draw: Draw, scans: Scans) -> Question:
    """Both shapes are in one row or one column, and no other shape has their forms, so that only one answer is correct."""
    answer = draw.choice(("left", "right", "above", "below"))
    first, second, *others = draw.shuffled(SHAPES)
    low, high = draw.choice(((0, 1), (0, 2), (1, 2)))
    line = draw.choice(range(GRID))
    a, b = (low, high) if answer in ("left", "above") else (high, low)
    cells = [(a, line), (b, line)] if answer in ("left", "right") else [(line, a), (line, b)]
    free = [cell for cell in draw.shuffled(CELLS) if cell not in cells]
    colours = tuple(COLOURS)
    kinds = [(draw.choice(colours), first), (draw.choice(colours), second)]
    kinds += _others(draw, [kind for kind in KINDS if kind[1] in others], 0, 2)
    shapes = [draw.shape(*kind, cell) for kind, cell in zip(kinds, cells + free, strict=False)]
    return Question(f"Where is the {first} from the {second}?", answer, paint(shapes), [[cell] for cell in cells])


def _grounding(draw: Draw, scans: Scans) -> Question:
    """Another shape has the colour or the form of the target."""
    target, *rest = draw.shuffled(KINDS)
    alike = draw.choice([kind for kind in rest if kind[0] == target[0] or kind[1] == target[1]])
    shapes = _scene(draw, [target, alike, *_others(draw, rest, 0, 2)])
    return Question(f"Box the {' '.join(target)}.", "[{},{},{},{}]".format(*shapes[0].box), paint(shapes), [_cells(shapes[:1])])


def _ocr(draw: Draw, scans: Scans) -> Question:
    count, row = draw.choice((1, 2, 3)), draw.choice(range(GRID))
    start = draw.choice(range(GRID - count + 1))
    chosen = [draw.choice(range(len(scans.digits))) for _ in range(count)]
    digits = [(scans.pixels[index], (start + place, row)) for place, index in enumerate(chosen)]
    free = [cell for cell in draw.shuffled(CELLS) if cell[1] != row]
    shapes = [draw.shape(*kind, cell) for kind, cell in zip(_others(draw, KINDS, 0, 2), free, strict=False)]
    return Question(
        "Read the number.",
        "".join(str(scans.digits[index]) for index in chosen),
        paint(shapes, digits),
        [[cell] for _, cell in digits],
    )


def _negation(draw: Draw, scans: Scans) -> Question:
    """If the target is absent, two other shapes have its colour and its form."""
    target, negated, present = draw.choice(KINDS), draw.choice((False, True)), draw.choice((False, True))
    colour, name = target
    decoys = [(colour, draw.choice([s for s in SHAPES if s != name])), (draw.choice([c for c in COLOURS if c != colour]), name)]
    rest = [kind for kind in KINDS if kind != target]
    kinds = [target, draw.choice(decoys)] if present else decoys
    shapes = _scene(draw, kinds + _others(draw, rest, 0, 2))
    answer = "yes" if present != negated else "no"
    return Question(f"Is there {'no' if negated else 'a'} {colour} {name}?", answer, paint(shapes), [_cells(shapes[:present])])


CATEGORIES: dict[str, tuple[str, Callable[[Draw, Scans], Question]]] = {
    "counting": ("counting", _counting),
    "colour": ("exact", _colour),
    "spatial": ("exact", _spatial),
    "grounding": ("grounding", _grounding),
    "ocr": ("ocr", _ocr),
    "negation": ("yes_no", _negation),
}


@cache
def scans() -> dict[str, Scans]:
    """Return the scans of each split. Dev and test divide the scans that the demo holds out."""
    train, held_out = load_scans()
    dev, test = (Scans(held_out.pixels[part::2], held_out.digits[part::2]) for part in (0, 1))
    return {"train": train, "dev": dev, "test": test}


def _make(split: str, index: int) -> tuple[str, str, Question]:
    """Return a sample's category, its task of ``vlmkernels.evaluate.tasks``, and its question."""
    category = list(CATEGORIES)[index % len(CATEGORIES)]
    task, make = CATEGORIES[category]
    return category, task, make(Draw(NAME, VERSION, split, index), scans()[split])


def cell_labels(split: str, index: int) -> list[int]:
    """Return a label for each cell, in reading order: 0, or from 1 the position of the object in the question that the cell is
    about, or of the digit in the answer."""
    places = {cell: place for place, cells in enumerate(_make(split, index)[2].cells, 1) for cell in cells}
    return [places.get((column, row), 0) for row, column in product(range(GRID), repeat=2)]


def sample(split: str, index: int) -> dict:
    """Return a row: prompt (a conversation), image, answer (text), task and category."""
    category, task, (question, answer, image, _) = _make(split, index)
    content = [{"type": "text", "text": question}, {"type": "image"}]
    row = {"prompt": [{"role": "user", "content": content}], "image": image, "answer": answer}
    return {**row, "task": task, "category": category}


class ShapesAndDigits(Sequence[dict]):
    """The rows of a split, or its first ``count`` rows. A row is generated when it is read.

    Raises:
        ValueError: there is no such split, or it has fewer rows.
    """

    column_names = ("prompt", "image", "answer", "task", "category")

    def __init__(self, split: str, count: int | None = None):
        require_one_of("split", split, SPLITS)
        count = SPLITS[split] if count is None else count
        if not 1 <= count <= SPLITS[split]:
            raise ValueError(f"count must be 1 to {SPLITS[split]}, got {count}")
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in [0, {self.count}), got {index}")
        return sample(self.split, index)


def checksum(rows: Iterable[dict]) -> str:
    """Return the SHA-256 of all pixels and words of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        image = row["image"].convert("RGB")
        digest.update(json.dumps([{k: v for k, v in row.items() if k != "image"}, image.size], sort_keys=True).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
