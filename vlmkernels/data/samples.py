"""From a dataset's rows to model inputs.

Columns of a row:

- ``prompt``: a string or a conversation (a list of messages).
- ``image`` (one), ``images`` (a list), ``videos`` (a list): optional. An image is a PIL image, a path, bytes, a
  ``{"bytes": ..., "path": ...}`` dict as ``datasets`` stores it, or a URL (see ``open_image``). A video is a list of frames,
  each an image as above or uint8 pixels (H, W, 3) or (3, H, W), or one array or tensor of all frames.
- ``fps``: frames per second of the videos, optional.
- All other columns are passed to the reward functions.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmkernels.data.images import DEFAULT_LIMITS, IMAGE_ERRORS, ImageLimits, open_image
from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.ops.checks import require_positive
from vlmkernels.ops.pack_patches.images import as_frames

MEDIA_COLUMNS = ("image", "images", "videos")
DEFAULT_FPS = 2.0  # frames per second of a video without ``fps``; Qwen's processors sample at this rate


@dataclass(frozen=True)
class Sample:
    """A row with its images and videos opened.

    Args:
        index: index of the row in its dataset.
        prompt: the row's prompt. A conversation has one content part per image or video.
        images: the images, in the order of their parts.
        row: the row itself.
        videos: the frames of each video, (T, 3, H, W) uint8.
        fps: frames per second of the videos.
    """

    index: int
    prompt: str | list[dict[str, Any]]
    images: list[Image.Image]
    row: dict[str, Any]
    videos: list[torch.Tensor]
    fps: float


def is_conversation(prompt: Any) -> bool:
    """Return whether ``prompt`` is a non-empty list of messages with roles."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt as text for people: messages one per line, with their roles and without images."""
    if isinstance(prompt, str):
        return prompt
    texts = ["".join(part["text"] for part in _parts(message) if part["type"] == "text") for message in prompt]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(prompt, texts, strict=True))


def still_images(sample: Sample) -> list[Image.Image]:
    """Return the sample's images and the first frame of each of its videos."""
    return sample.images + [Image.fromarray(video[0].permute(1, 2, 0).cpu().numpy()) for video in sample.videos]


def _read_frame(value: Any, name: str, decode: bool, limits: ImageLimits) -> torch.Tensor:
    """Return a frame's pixels, (3, H, W) uint8; without ``decode`` on the device "meta"."""
    if not hasattr(value, "dtype"):  # neither an array nor a tensor
        try:
            value = open_image(value, limits)
        except IMAGE_ERRORS as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        if not decode:
            return torch.empty(3, value.height, value.width, dtype=torch.uint8, device="meta")
    frames = as_frames(value, name)
    if len(frames) != 1:
        raise ValueError(f"{name} must be one frame, got {len(frames)} frames")
    return frames[0] if decode else frames[0].to("meta")


def read_video(value: Any, name: str, decode: bool = True, limits: ImageLimits = DEFAULT_LIMITS) -> torch.Tensor:
    """Read a video.

    Args:
        value: see the module's docstring.
        name: name of the value in error messages.
        decode: False reads only the headers of a list of images; the frames are then on the device "meta".
        limits: limits of each frame.

    Returns:
        (T, 3, H, W) uint8.

    Raises:
        TypeError, ValueError: the value is not a video, or its frames differ in size.
    """
    if hasattr(value, "dtype"):
        pixels = as_frames(value, name)
        if len(value.shape) != 4:
            raise ValueError(f"{name} must be frames (T, H, W, 3) or (T, 3, H, W), got {tuple(value.shape)}")
        return pixels
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of frames, an array or a tensor, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one frame, got 0")
    frames = [_read_frame(frame, f"{name}[{i}]", decode, limits) for i, frame in enumerate(value)]
    height, width = frames[0].shape[1:]
    for i, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            size = f"{frame.shape[1]} x {frame.shape[2]}"
            raise ValueError(f"{name}[{i}] must have the size of the first frame, {height} x {width}, got {size}")
    return torch.stack(frames)


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _media(row: dict[str, Any]) -> dict[str, tuple[str, list]]:
    """Return, for "image" and "video", the name of the row's column and its unopened values."""
    if row.get("images") is not None:
        images = "images", _as_list(row["images"])
    else:
        images = "image", [] if row.get("image") is None else [row["image"]]
    return {"image": images, "video": ("videos", _as_list(row.get("videos")))}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _conversation(
    prompt: list[dict[str, Any]], media: dict[str, tuple[str, list]]
) -> tuple[list[dict[str, Any]], dict[str, list]]:
    """Return the conversation with one part per image or video, and the values of these parts in order.

    The values of a column fill the parts of their kind in order. If the conversation has no such parts, they are inserted
    before the text of the first user message, images first. Without a column, the values are in the parts themselves.
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


def read_sample(row: dict[str, Any], index: int, decode: bool = True, limits: ImageLimits = DEFAULT_LIMITS) -> Sample:
    """Open the images and videos of a row.

    Args:
        row: see the module's docstring.
        index: index of the row, for error messages.
        decode: False opens images without decoding their pixels.
        limits: limits of images and frames.

    Raises:
        TypeError, ValueError: the prompt, an image or a video is invalid; the message has the index.
    """
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
        except IMAGE_ERRORS as error:
            name = column if column == "image" else f"{column}[{position}]"
            raise ValueError(f"sample {index}: {name} cannot be read: {error}") from error
    videos = [read_video(x, f"sample {index}: videos[{k}]", decode, limits) for k, x in enumerate(values["video"])]
    fps = DEFAULT_FPS if row.get("fps") is None else row["fps"]
    require_positive(f"sample {index}: fps", fps)
    return Sample(index, prompt, images, row, videos, float(fps))


def render(sample: Sample, processor: Any, **chat_template_kwargs: Any) -> str:
    """Return the prompt as the text that is tokenized, with one placeholder per image or video.

    Args:
        sample: the sample.
        processor: the model's processor, or its tokenizer for a text model.
        chat_template_kwargs: arguments of ``apply_chat_template``.

    Raises:
        ValueError: the model does not support the sample's images or videos, or the number of placeholders is wrong.
    """
    text = sample.prompt
    media: dict[str, list] = {"image": sample.images, "video": sample.videos}
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in media}
    for kind, values in media.items():
        if tokens[kind] is None and values:
            what = f"a processor without {kind}s" if tokens["image"] else "a text model"
            raise ValueError(f"sample {sample.index}: {kind}s must be absent for {what}, got {len(values)}")
    if not isinstance(text, str):
        messages = text
        if tokens["image"] is None:  # the template of a tokenizer takes plain strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in text]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat_template_kwargs)
    for kind, values in media.items():
        token = tokens[kind]
        count = text.count(token) if token else 0
        if count != len(values):
            raise ValueError(
                f"sample {sample.index}: prompt must hold one {token} per {kind}, {len(values)}, got {count} in {text!r:.200}"
            )
    return text


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """Return the processor's tokenizer, or the processor itself if it is a tokenizer."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def _video_arguments(samples: list[Sample]) -> dict[str, Any]:
    """Return the processor's arguments for videos. They keep all frames, which the dataset's author has chosen already."""
    videos = [(video, sample.fps) for sample in samples for video in sample.videos]
    metadata = [{"total_num_frames": len(x), "fps": fps, "frames_indices": list(range(len(x)))} for x, fps in videos]
    return {"videos": [video for video, _ in videos], "video_metadata": metadata, "do_sample_frames": False}


def encode(
    samples: list[Sample],
    processor: Any,
    family: Family,
    chat_template_kwargs: dict[str, Any] | None = None,
    **processor_arguments: Any,
) -> ModelInputs:
    """Encode the prompts of samples, each image once, in one call of the processor.

    Args:
        samples: the samples, at least one.
        processor: the model's processor, or its tokenizer for a text model.
        family: the model's family.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        processor_arguments: further arguments of the processor's call.

    Returns:
        Left-padded model inputs of one prompt per sample.
    """
    texts = [render(sample, processor, **(chat_template_kwargs or {})) for sample in samples]
    # A chat template writes the beginning-of-sequence token, so the tokenizer must not add one.
    arguments: dict[str, Any] = {"add_special_tokens": isinstance(samples[0].prompt, str)}
    if any(sample.images for sample in samples):
        arguments["images"] = [sample.images for sample in samples]
    if any(sample.videos for sample in samples):
        arguments |= _video_arguments(samples)
    arguments |= processor_arguments
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **arguments)
    num_images, num_videos = (torch.tensor([len(getattr(s, kind)) for s in samples]) for kind in ("images", "videos"))
    keys = torch.tensor([_content_key(image) for sample in samples for image in sample.images], dtype=torch.int64)
    return replace(ModelInputs.from_processor(dict(inputs), family, num_images, num_videos), image_keys=keys)


def _content_key(image: Image.Image) -> int:
    """Return a 64-bit hash of the image's pixels, size and mode."""
    content = hashlib.blake2b(repr((image.mode, image.size, image.getpalette())).encode(), digest_size=8)
    content.update(image.tobytes())
    return int.from_bytes(content.digest(), "little", signed=True)
