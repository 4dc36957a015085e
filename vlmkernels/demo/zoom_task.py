"""The task of ``vlmkernels demo --tools``: read a handwritten number that is too small in the image that the model gets.

An image is a page with a grid of notes. A note holds a number, and one note has a red frame. The processor scales the page down
until a digit has 3 x 3 pixels. The tool ``zoom`` returns one note at full resolution.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from vlmkernels.demo.model import build_tokenizer
from vlmkernels.evaluate.digits import DIGIT_PIXELS, Scans

ROWS, COLUMNS = 2, 4  # of the grid of notes
DIGITS = 2  # of each number
CELL = 140  # pixels of a cell of the grid
PATCH = 14  # pixels to which the processor scales a cell: one patch of the vision tower
JITTER = 28  # pixels by which a note lies away from the middle of its cell, at most
FRAME = 10  # pixels around the note with the red frame
NOTE = (DIGIT_PIXELS * DIGITS, DIGIT_PIXELS)  # width and height in pixels; one image token per digit
SEEN = (COLUMNS * PATCH, ROWS * PATCH)  # width and height of a page as the model sees it; a note has as many pixels

DESK, PAPER, RED = 190, 254, 255  # indices of the palette: a level of gray, except for the last
PALETTE = np.repeat(np.arange(256, dtype=np.uint8), 3)
PALETTE[3 * RED :] = 220, 30, 30

FIND = "Read the number in the red frame."
READ, LOCATE = "Read the number.", "Where is the red frame?"  # questions of the warm-up

# Each piece of the syntax of a call is one token, so that a call has 13.
CALL_TOKENS = ("<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"', '": ', ', "', "}}")

# Qwen's chat format without its default system prompt. Of each tool it has only the name and the arguments, so that prompts
# stay short.
CHAT_TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}){% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content or [] %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}{% for call in message.tool_calls or [] %}\
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_processor() -> Qwen2_5_VLProcessor:
    """Build the processor. It scales pages down and keeps the size of notes."""
    size = {"shortest_edge": DIGIT_PIXELS**2, "longest_edge": SEEN[0] * SEEN[1]}
    tokenizer = build_tokenizer((READ, FIND, LOCATE, "system", "tool", "zoom", "row", " column", "column"))
    tokenizer.add_tokens(list(CALL_TOKENS))
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def draw_page(scans: Scans, rng: np.random.Generator) -> dict[str, Any]:
    """Draw a page.

    Returns:
        "image": the page. "notes": (ROWS, COLUMNS, 2), x and y of the upper left corner of each note. "numbers": (ROWS,
        COLUMNS), the numbers as text. "row", "column": the place of the note with the red frame, from 1. "answer": its number.
    """
    width, height = NOTE
    pixels = np.full((ROWS * CELL, COLUMNS * CELL), DESK, np.uint8)
    chosen = rng.integers(len(scans.digits), size=(ROWS, COLUMNS, DIGITS))
    cells = np.stack(np.meshgrid(np.arange(COLUMNS), np.arange(ROWS)), -1) * CELL
    notes = cells + (CELL - np.array(NOTE)) // 2 + rng.integers(-JITTER, JITTER + 1, size=cells.shape)
    row, column = int(rng.integers(ROWS)), int(rng.integers(COLUMNS))
    x, y = notes[row, column]
    pixels[y - FRAME : y + height + FRAME, x - FRAME : x + width + FRAME] = RED
    for place in np.ndindex(ROWS, COLUMNS):
        x, y = notes[place]
        note = np.concatenate(scans.pixels[chosen[place]], axis=1)
        pixels[y : y + height, x : x + width] = np.minimum(note, PAPER)
    image = Image.fromarray(pixels, "P")
    image.putpalette(PALETTE.tobytes())
    numbers = [["".join(map(str, scans.digits[chosen[r, c]])) for c in range(COLUMNS)] for r in range(ROWS)]
    place = {"row": row + 1, "column": column + 1, "answer": numbers[row][column]}
    return {"image": image, "notes": notes.tolist(), "numbers": numbers, **place}


def question(text: str) -> list[dict[str, Any]]:
    """Return a prompt: an image and a text."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


class Pages(Sequence[dict[str, Any]]):
    """Rows for the trainer: a page that is drawn when it is read, a prompt, and what ``draw_page`` returns.

    Args:
        scans: scans of digits to choose from.
        length: number of rows.
        seed: rows with the same seed and index are the same.
    """

    def __init__(self, scans: Scans, length: int, seed: int):
        self.scans, self.length, self.seed = scans, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        return {"prompt": question(FIND), **draw_page(self.scans, np.random.default_rng((self.seed, index)))}


class ZoomEnvironment:
    """The page of one trajectory, and the tool that shows its notes."""

    def reset(self, image: Image.Image, notes: list[list[list[int]]], **row: Any) -> None:
        """Store the page. ``row`` holds the other columns, which the tool does not need."""
        self.image, self.notes = image, notes

    def zoom(self, row: int, column: int) -> Image.Image:
        """Return the note at a place of the grid, at full resolution.

        Args:
            row: The row of the note; the upper row is 1.
            column: The column of the note; the left column is 1.

        Returns:
            The note.
        """
        if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
            raise ValueError(f"row must be 1 to {ROWS} and column 1 to {COLUMNS}, got {row} and {column}")
        x, y = self.notes[row - 1][column - 1]
        return self.image.crop((x, y, x + NOTE[0], y + NOTE[1])).convert("RGB")
