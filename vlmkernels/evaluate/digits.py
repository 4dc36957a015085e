"""Numbers of one to three digits, composed of real scans: 1797 digits written by 43 people, 8 x 8 pixels each.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as packed by scikit-learn.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGIT_PIXELS = 28  # 2 x 2 patches of 14 pixels, which are merged into one image token
MARGIN = 2  # pixels of paper around a scan
MAX_DIGITS = 3
TEST_SHARE = 0.25
PROMPT = "Read the number."


class Scans(NamedTuple):
    """Scans of single digits.

    Attributes:
        pixels: (n, 28, 28) uint8, dark ink on white paper.
        digits: (n,), 0 to 9.
    """

    pixels: np.ndarray
    digits: np.ndarray


def load_scans() -> tuple[Scans, Scans]:
    """Return the scans for training and for testing. The two parts are disjoint and the same in every run."""
    source = load_digits()
    side = DIGIT_PIXELS - 2 * MARGIN
    paper = (255 - source.images * (255 / 16)).astype(np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in paper])
    pixels = np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), constant_values=255)
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train = np.split(order, [round(TEST_SHARE * len(order))])
    return Scans(pixels[train], source.target[train]), Scans(pixels[test], source.target[test])


def compose(scans: Scans, count: int, rng: np.random.Generator, max_digits: int = MAX_DIGITS) -> list[dict]:
    """Compose rows for the trainer: an image of random scans side by side, a prompt, and the number as answer.

    Args:
        scans: scans to choose from.
        count: number of rows. Numbers of 1 to ``max_digits`` digits alternate.
        rng: random generator that chooses the scans.
        max_digits: maximum number of digits of a number.
    """
    rows = []
    for index in range(count):
        chosen = rng.integers(len(scans.digits), size=1 + index % max_digits)
        image = Image.fromarray(np.concatenate(scans.pixels[chosen], axis=1)).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        answer = "".join(map(str, scans.digits[chosen]))
        rows.append({"prompt": [{"role": "user", "content": content}], "image": image, "answer": answer})
    return rows


def save_rows(rows: list[dict], path: Path) -> None:
    """Write rows to ``path`` as JSON lines, and their images to the folder ``<name>-images`` beside it."""
    folder = path.with_name(f"{path.stem}-images")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, row in enumerate(rows):
        name = f"{index:04d}.png"
        row["image"].save(folder / name)
        lines.append(json.dumps({**row, "image": f"{folder.name}/{name}"}) + "\n")
    path.write_text("".join(lines))
