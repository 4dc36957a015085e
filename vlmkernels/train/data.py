"""From a dataset's rows to model inputs.

A row has ``prompt``, a string or a conversation, and optionally ``image`` (one) or ``images`` (a list); an image is a PIL
image, a path, bytes, or a ``{"bytes": ..., "path": ...}`` dict as ``datasets`` stores it. All other columns go to the reward
functions. ``encode`` alone knows how a processor turns prompts and images into the one dict of model inputs.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmkernels.models.batch import Batch
from vlmkernels.models.families import Family

IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Sample:
    """A row that was read: ``prompt`` in its own form, with one image part per image where it is a conversation."""

    index: int
    prompt: str | list[dict]
    images: list[Image.Image]
    row: dict[str, Any]


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def open_image(value: Any) -> Image.Image:
    """The image that a column's value stands for; its pixels are not read yet."""
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, (str, os.PathLike)):
        image = Image.open(value)
    elif isinstance(value, bytes):
        image = Image.open(io.BytesIO(value))
    elif isinstance(value, dict) and value.get("bytes") is not None:
        image = Image.open(io.BytesIO(value["bytes"]))
    elif isinstance(value, dict) and value.get("path") is not None:
        image = Image.open(value["path"])
    else:
        raise TypeError(f"must be a PIL image, a path, bytes or a dict with bytes or path, got {type(value).__name__}")
    if 0 in image.size:
        raise ValueError(f"must not be empty, got {image.width} x {image.height} pixels")
    return image


def _image_values(row: dict) -> tuple[str, list]:
    """The name of the row's image column and its images, not opened."""
    if row.get("images") is not None:
        values = row["images"]
        return "images", list(values) if isinstance(values, (list, tuple)) else [values]
    return "image", [] if row.get("image") is None else [row["image"]]


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _conversation(prompt: list[dict], column: str, values: list) -> tuple[list[dict], list]:
    """The conversation with one image part per image, and its images in order.

    Images of a column fill the conversation's image parts in order; where it has none, they go before the first user
    message's text. Without a column, image parts bring their own image.
    """
    messages = [{**message, "content": _parts(message)} for message in prompt]
    slots = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if not values:
        values = [part["image"] for part in slots if part.get("image") is not None]
    if values and not slots:
        first_user = next((message for message in messages if message["role"] == "user"), messages[0])
        first_user["content"] = [{"type": "image"} for _ in values] + first_user["content"]
        slots = values
    if len(slots) != len(values):
        raise ValueError(f"{column} must hold one image per image part of the prompt, {len(slots)}, got {len(values)}")
    for message in messages:
        message["content"] = [{"type": "image"} if p["type"] == "image" else p for p in message["content"]]
    return messages, values


def read_sample(row: dict, index: int, decode: bool = True) -> Sample:
    """A row as a ``Sample``. Errors name the row's index; ``decode=False`` opens images without reading their pixels."""
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise TypeError(f"sample {index}: prompt must be a string or a list of messages, got {prompt!r:.80}")
    name, values = _image_values(row)
    try:
        if not isinstance(prompt, str):
            prompt, values = _conversation(prompt, name, values)
    except ValueError as error:
        raise ValueError(f"sample {index}: {error}") from error
    images = []
    for position, value in enumerate(values):
        try:
            image = open_image(value)
            images.append(image.convert("RGB") if decode else image)
        except (OSError, ValueError, TypeError, SyntaxError) as error:
            which = name if name == "image" else f"{name}[{position}]"
            raise ValueError(f"sample {index}: {which} cannot be read: {error}") from error
    return Sample(index, prompt, images, row)


def render(sample: Sample, processor, **chat_template_kwargs) -> str:
    """The prompt as the text that is tokenised, one placeholder per image; checked."""
    text, token = sample.prompt, getattr(processor, "image_token", None)
    if not isinstance(text, str):
        messages = text
        if token is None and not sample.images:  # a tokenizer's template takes plain strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in text]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat_template_kwargs)
    if token is None and sample.images:
        raise ValueError(f"sample {sample.index}: images must be absent for a text model, got {len(sample.images)}")
    placeholders = text.count(token) if token else 0
    if placeholders != len(sample.images):
        rule = f"hold one {token} per image, {len(sample.images)}"
        raise ValueError(f"sample {sample.index}: prompt must {rule}, got {placeholders} in {text!r:.200}")
    return text


def encode(
    samples: list[Sample], processor, family: Family, chat_template_kwargs: dict | None = None, **processor_arguments
) -> Batch:
    """The model inputs of the samples' prompts, by one call of the processor (or tokenizer): each image once, however many
    completions its prompt gets. ``processor_arguments``: further ones of that call."""
    texts = [render(sample, processor, **(chat_template_kwargs or {})) for sample in samples]
    # A chat template writes the beginning-of-sequence token itself.
    arguments = {"add_special_tokens": isinstance(samples[0].prompt, str)}
    if any(sample.images for sample in samples):
        arguments["images"] = [sample.images for sample in samples]
    arguments |= processor_arguments
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **arguments)
    num_images = torch.tensor([len(sample.images) for sample in samples])
    keys = torch.tensor([_key(image) for sample in samples for image in sample.images], dtype=torch.int64)
    return replace(Batch.of(dict(inputs), family, num_images), image_keys=keys)


def _key(image: Image.Image) -> int:
    """A number that tells the image from others by its content."""
    content = hashlib.blake2b(repr((image.mode, image.size, image.getpalette())).encode(), digest_size=8)
    content.update(image.tobytes())
    return int.from_bytes(content.digest(), "little", signed=True)


def column_names(dataset) -> list[str]:
    return list(getattr(dataset, "column_names", None) or dataset[0])


def _undecoded(dataset):
    """The dataset with images as they are stored: a check of every row must not read every pixel."""
    if not hasattr(dataset, "cast_column"):
        return dataset
    from datasets import Image as ImageFeature
    from datasets import List

    for name in IMAGE_COLUMNS:
        feature = dataset.features.get(name)
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset


def check_dataset(dataset, name: str, processor, chat_template_kwargs: dict | None = None) -> None:
    """Raise for the first row that cannot be trained on: what ``read_sample`` and ``render`` refuse.

    Reads every row, of each image the header alone.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one sample, got 0")
    columns = column_names(dataset)
    if "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt', got {', '.join(columns)}")
    rows = _undecoded(dataset)
    for index in range(len(rows)):
        if "prompt" not in rows[index]:
            raise ValueError(f"{name}: sample {index} must have 'prompt', got {', '.join(rows[index])}")
        render(read_sample(rows[index], index, decode=False), processor, **(chat_template_kwargs or {}))


def _resolve(row: dict, folder: Path) -> dict:
    """The row with relative image paths taken from ``folder``."""
    path = lambda value: str(folder / value) if isinstance(value, str) else value  # noqa: E731
    row = dict(row)
    if row.get("image") is not None:
        row["image"] = path(row["image"])
    if row.get("images") is not None:
        row["images"] = [path(value) for value in row["images"]]
    return row


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: must be JSON, got {line[:80]!r} ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {line[:80]!r}")
        rows.append(row)
    return rows


def load_dataset(path: str | os.PathLike, split: str | None = None):
    """Rows of a ``.jsonl`` or ``.parquet`` file, or of a folder written by ``datasets``' ``save_to_disk``.

    Relative image paths start at the file's folder. ``split`` chooses within a folder of several splits.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset must be an existing file or folder, got {path}")
    if path.suffix == ".jsonl":
        return [_resolve(row, path.parent) for row in _read_jsonl(path)]
    import datasets

    if path.suffix == ".parquet":
        import pyarrow.parquet

        dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        as_text = [name for name in IMAGE_COLUMNS if "string" in str(dataset.features.get(name))]
        return dataset.map(lambda row: _resolve(row, path.parent), keep_in_memory=True) if as_text else dataset
    if not path.is_dir():
        raise ValueError(f"dataset must end in .jsonl or .parquet or be a folder, got {path}")
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"split must be one of {', '.join(dataset)}, got {split!r}")
    return dataset[split]
