"""From a dataset's rows to model inputs.

A row has ``prompt``, a string or a conversation, and optionally ``image`` (one), ``images`` (a list), ``videos`` (a list) and
their ``fps``. An image is a PIL image, a path, bytes, a ``{"bytes": ..., "path": ...}`` dict as ``datasets`` stores it, or an
address (see ``open_image``). A video is a list of frames, each such an image or uint8 pixels (H, W, 3) or (3, H, W), or an
array or tensor of all of them. All other columns go to the reward functions. ``encode`` alone knows how a processor turns
prompts, images and videos into the one dict of model inputs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmkernels.data.images import DEFAULT, ERRORS, ImageLimits, open_image, scheme_of
from vlmkernels.models.families import Family
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require, require_positive
from vlmkernels.ops.pack_patches.images import as_frames

MEDIA_COLUMNS = ("image", "images", "videos")
DEFAULT_FPS = 2.0  # frames per second of a video, where a row has no ``fps``: what Qwen's processors sample at


@dataclass(frozen=True)
class Sample:
    """A row that was read: ``prompt`` in its own form, with one part per image or video where it is a conversation.

    videos: (T, 3, H, W) uint8 each, of which ``fps`` frames make a second.
    """

    index: int
    prompt: str | list[dict]
    images: list[Image.Image]
    row: dict[str, Any]
    videos: list[torch.Tensor]
    fps: float


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _frame(value: Any, name: str, decode: bool, limits: ImageLimits) -> torch.Tensor:
    """(3, H, W); with decode=False on the device "meta"."""
    if not hasattr(value, "dtype"):  # neither an array nor a tensor
        try:
            value = open_image(value, limits)
        except ERRORS as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        if not decode:
            return torch.empty(3, value.height, value.width, dtype=torch.uint8, device="meta")
    frames = as_frames(value, name)
    require(len(frames) == 1, name, "be one frame", f"{len(frames)} frames")
    return frames[0] if decode else frames[0].to("meta")


def read_video(value: Any, name: str, decode: bool = True, limits: ImageLimits = DEFAULT) -> torch.Tensor:
    """A column's video, (T, 3, H, W) uint8; with decode=False a list of frames is on the device "meta", its pixels not read."""
    if hasattr(value, "dtype"):
        frames = as_frames(value, name)
        require(len(value.shape) == 4, name, "be frames (T, H, W, 3) or (T, 3, H, W)", tuple(value.shape))
        return frames
    rule = "be a list of frames, an array or a tensor"
    require(isinstance(value, (list, tuple)), name, rule, type(value).__name__, TypeError)
    require(len(value) > 0, name, "hold at least one frame", len(value))
    frames = [_frame(frame, f"{name}[{i}]", decode, limits) for i, frame in enumerate(value)]
    for i, frame in enumerate(frames):
        sizes = f"{frame.shape[1]} x {frame.shape[2]}", f"{frames[0].shape[1]} x {frames[0].shape[2]}"
        require(frame.shape == frames[0].shape, f"{name}[{i}]", f"have the size of the first frame, {sizes[1]}", sizes[0])
    return torch.stack(frames)


def _media(row: dict) -> dict[str, tuple[str, list]]:
    """Of images and videos the name of the row's column and its values, not opened."""
    listed = lambda x: [] if x is None else list(x) if isinstance(x, (list, tuple)) else [x]  # noqa: E731
    several = row.get("images") is not None
    images = ("images", listed(row["images"])) if several else ("image", [x for x in [row.get("image")] if x is not None])
    return {"image": images, "video": ("videos", listed(row.get("videos")))}


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _conversation(prompt: list[dict], media: dict[str, tuple[str, list]]) -> tuple[list[dict], dict[str, list]]:
    """The conversation with one part per image or video, and these in order.

    Those of a column fill the conversation's parts of their kind in order; where it has none, they go before the first user
    message's text, images first. Without a column, parts bring their own.
    """
    messages = [{**message, "content": _parts(message)} for message in prompt]
    first_user = next((message for message in messages if message["role"] == "user"), messages[0])
    filled, added = {}, []
    for kind, (column, values) in media.items():
        slots = [part for message in messages for part in message["content"] if part["type"] == kind]
        if not values:
            values = [part[kind] for part in slots if part.get(kind) is not None]
        if values and not slots:
            added += [{"type": kind} for _ in values]
        elif len(slots) != len(values):
            raise ValueError(f"{column} must hold one {kind} per {kind} part of the prompt, {len(slots)}, got {len(values)}")
        filled[kind] = values
    first_user["content"] = added + first_user["content"]
    for message in messages:
        message["content"] = [{"type": p["type"]} if p["type"] in media else p for p in message["content"]]
    return messages, filled


def read_sample(row: dict, index: int, decode: bool = True, limits: ImageLimits = DEFAULT) -> Sample:
    """A row as a ``Sample``. Errors name the row's index; ``decode=False`` opens images without reading their pixels."""
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise TypeError(f"sample {index}: prompt must be a string or a list of messages, got {prompt!r:.80}")
    media = _media(row)
    values = {kind: values for kind, (_, values) in media.items()}
    try:
        if not isinstance(prompt, str):
            prompt, values = _conversation(prompt, media)
    except ValueError as error:
        raise ValueError(f"sample {index}: {error}") from error
    images, column = [], media["image"][0]
    for position, value in enumerate(values["image"]):
        try:
            image = open_image(value, limits)
            images.append(image.convert("RGB") if decode else image)
        except ERRORS as error:
            which = column if column == "image" else f"{column}[{position}]"
            raise ValueError(f"sample {index}: {which} cannot be read: {error}") from error
    videos = [read_video(x, f"sample {index}: videos[{k}]", decode, limits) for k, x in enumerate(values["video"])]
    fps = DEFAULT_FPS if row.get("fps") is None else row["fps"]
    require_positive(f"sample {index}: fps", fps)
    return Sample(index, prompt, images, row, videos, float(fps))


def render(sample: Sample, processor, **chat_template_kwargs) -> str:
    """The prompt as the text that is tokenised, one placeholder per image or video; checked."""
    text, media = sample.prompt, {"image": sample.images, "video": sample.videos}
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in media}
    for kind, values in media.items():
        if tokens[kind] is None and values:
            what = f"a processor without {kind}s" if tokens["image"] else "a text model"
            raise ValueError(f"sample {sample.index}: {kind}s must be absent for {what}, got {len(values)}")
    if not isinstance(text, str):
        messages = text
        if tokens["image"] is None:  # a tokenizer's template takes plain strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in text]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat_template_kwargs)
    for kind, values in media.items():
        token = tokens[kind]
        placeholders = text.count(token) if token else 0
        if placeholders != len(values):
            rule = f"hold one {token} per {kind}, {len(values)}"
            raise ValueError(f"sample {sample.index}: prompt must {rule}, got {placeholders} in {text!r:.200}")
    return text


def _video_arguments(samples: list[Sample]) -> dict[str, Any]:
    """Of a processor's call: all frames are taken, since they were chosen by whoever made the dataset."""
    videos = [(video, sample.fps) for sample in samples for video in sample.videos]
    metadata = [{"total_num_frames": len(x), "fps": fps, "frames_indices": list(range(len(x)))} for x, fps in videos]
    return {"videos": [video for video, _ in videos], "video_metadata": metadata, "do_sample_frames": False}


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
    if any(sample.videos for sample in samples):
        arguments |= _video_arguments(samples)
    arguments |= processor_arguments
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **arguments)
    num_images, num_videos = (torch.tensor([len(getattr(s, kind)) for s in samples]) for kind in ("images", "videos"))
    keys = torch.tensor([_key(image) for sample in samples for image in sample.images], dtype=torch.int64)
    return replace(Batch.of(dict(inputs), family, num_images, num_videos), image_keys=keys)


def _key(image: Image.Image) -> int:
    """A number that tells the image from others by its content."""
    content = hashlib.blake2b(repr((image.mode, image.size, image.getpalette())).encode(), digest_size=8)
    content.update(image.tobytes())
    return int.from_bytes(content.digest(), "little", signed=True)


def column_names(dataset) -> list[str]:
    return list(getattr(dataset, "column_names", None) or dataset[0])


def undecoded(dataset):
    """The dataset with images as they are stored: a check of every row must not read every pixel."""
    if not hasattr(dataset, "cast_column"):
        return dataset
    from datasets import Image as ImageFeature
    from datasets import List

    def stored(feature):
        if isinstance(feature, List):
            return List(stored(feature.feature))
        return ImageFeature(decode=False) if isinstance(feature, ImageFeature) else feature

    for name in dataset.features.keys() & MEDIA_COLUMNS:
        dataset = dataset.cast_column(name, stored(dataset.features[name]))
    return dataset


def check_dataset(
    dataset,
    name: str,
    processor,
    chat_template_kwargs: dict | None = None,
    check_row: Callable[[dict, str], None] | None = None,
    bad: dict[int, str] | None = None,
    limits: ImageLimits = DEFAULT,
) -> set[str]:
    """Raise for the first row that cannot be trained on: what ``read_sample``, ``render`` and ``check_row`` refuse, which gets
    the row and how to name it. Where ``bad`` is given, their indices go there, with the reasons, as long as one row is left.

    Reads every row, of each image the header alone.

    Returns:
        Which of "image" and "video" its rows have.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one sample, got 0")
    columns = column_names(dataset)
    if "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt', got {', '.join(columns)}")
    rows, kinds = undecoded(dataset), set()
    for index in range(len(rows)):
        try:
            if "prompt" not in rows[index]:
                raise ValueError(f"{name}: sample {index} must have 'prompt', got {', '.join(rows[index])}")
            sample = read_sample(rows[index], index, decode=False, limits=limits)
            render(sample, processor, **(chat_template_kwargs or {}))
            if check_row is not None:
                check_row(rows[index], f"{name}: sample {index}")
        except (ValueError, TypeError) as error:
            if bad is None:
                raise
            if len(bad) + 1 == len(rows):
                raise ValueError(f"{name} must hold a sample that can be used, got none: {error}") from error
            bad[index] = str(error)
            continue
        kinds |= {kind for kind, media in (("image", sample.images), ("video", sample.videos)) if media}
    return kinds


def _resolve(row: dict, folder: Path) -> dict:
    """The row with relative paths of images and frames, not addresses, taken from ``folder``."""

    def path(value):
        if isinstance(value, list):
            return [path(item) for item in value]
        return str(folder / value) if isinstance(value, str) and scheme_of(value) is None else value

    return {name: path(value) if name in MEDIA_COLUMNS else value for name, value in row.items()}


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a .jsonl file, each with the number of its line; empty lines are passed over."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate((line.removesuffix("\n") for line in lines), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: must be JSON, got {line[:80]!r} ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, got {line[:80]!r}")
            yield number, value


def load_dataset(path: str | os.PathLike, split: str | None = None):
    """Rows of a ``.jsonl`` or ``.parquet`` file, or of a folder written by ``datasets``' ``save_to_disk``.

    Relative paths of images start at the file's folder. ``split`` chooses within a folder of several splits.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset must be an existing file or folder, got {path}")
    if path.suffix == ".jsonl":
        return [_resolve(row, path.parent) for _, row in json_lines(path)]
    import datasets

    if path.suffix == ".parquet":
        import pyarrow.parquet

        dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        as_text = [name for name in MEDIA_COLUMNS if "string" in str(dataset.features.get(name))]
        return dataset.map(lambda row: _resolve(row, path.parent), keep_in_memory=True) if as_text else dataset
    if not path.is_dir():
        raise ValueError(f"dataset must end in .jsonl or .parquet or be a folder, got {path}")
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"split must be one of {', '.join(dataset)}, got {split!r}")
    return dataset[split]
