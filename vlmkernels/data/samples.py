"""From a dataset's rows to model inputs.

Columns of a row:

- ``prompt``: a string or a conversation (a list of messages; see ``vlmkernels.data.conversations``).
- ``image`` (one), ``images`` (a list), ``videos`` (a list): optional. An image is a PIL image, a path, bytes, a
  ``{"bytes": ..., "path": ...}`` dict as ``datasets`` stores it, an array, or a URL (see ``open_image``), and gives the same
  pixels in every form (see ``vlmkernels.data.images``). A video is a list of frames,
  each an image as above or uint8 pixels (H, W, 3) or (3, H, W), or one array or tensor of all frames.
- ``fps``: frames per second of the videos, optional.
- All other columns are passed to the reward functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from jinja2.exceptions import SecurityError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmkernels.data.conversations import is_absent, normalized, text_of_parts
from vlmkernels.data.images import DEFAULT_LIMITS, IMAGE_ERRORS, ImageHeader, ImageLimits, read_image, read_size
from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs, concat
from vlmkernels.ops.checks import require_positive
from vlmkernels.ops.pack_patches.images import as_frames

MEDIA_COLUMNS = ("image", "images", "videos")
DEFAULT_FPS = 2.0  # frames per second of a video without ``fps``; Qwen's processors sample at this rate


class SampleError(ValueError):
    """A sample that cannot be used. The message names it.

    Attributes:
        index: index of the sample's row in its dataset.
    """

    def __init__(self, sample: "Sample", reason: object):
        super().__init__(f"{sample.name}: {reason}")
        self.index = sample.index


@dataclass(frozen=True)
class Sample:
    """A row with its images and videos opened.

    Args:
        index: index of the row in its dataset.
        prompt: the row's prompt. A conversation has one content part per image or video.
        images: the images, in the order of their parts; only their sizes if they are not decoded.
        row: the row itself.
        videos: the frames of each video, (T, 3, H, W) uint8.
        fps: frames per second of the videos.
        where: name of the row in error messages: the dataset, the index, the file and the line, as far as they are known.
        tools: the JSON schemas of the tools that the model may call; the chat template writes them into the prompt.
    """

    index: int
    prompt: str | list[dict[str, Any]]
    images: list[Image.Image | ImageHeader]
    row: dict[str, Any]
    videos: list[torch.Tensor]
    fps: float
    where: str = ""
    tools: Sequence[dict[str, Any]] = ()

    @property
    def name(self) -> str:
        """The name of the sample in error messages."""
        return self.where or f"sample {self.index}"

    @property
    def continues(self) -> bool:
        """Whether the prompt ends with a message of the assistant, which the completions continue."""
        return not isinstance(self.prompt, str) and self.prompt[-1]["role"] == "assistant"


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt as text for people: messages one per line, with their roles and without images."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {text_of_parts(message)}" for message in normalized(prompt))


def still_images(sample: Sample) -> list[Image.Image]:
    """Return the sample's images and the first frame of each of its videos."""
    return sample.images + [Image.fromarray(video[0].permute(1, 2, 0).cpu().numpy()) for video in sample.videos]


def _read_frame(value: Any, name: str, decode: bool, limits: ImageLimits) -> torch.Tensor:
    """Return a frame's pixels, (3, H, W) uint8; without ``decode`` on the device "meta"."""
    if not hasattr(value, "dtype"):  # neither an array nor a tensor
        try:
            value = read_image(value, limits) if decode else read_size(value, limits)
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
    """Return the values of a column. None, a list of None and Arrow's dict of None hold no value."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [] if all(map(is_absent, values)) else values


def _media(row: dict[str, Any]) -> dict[str, tuple[str, list]]:
    """Return, for "image" and "video", the name of the row's column and its unopened values.

    Raises:
        ValueError: both ``image`` and ``images`` hold images.
    """
    one, several = _as_list(row.get("image")), _as_list(row.get("images"))
    if one and several:
        raise ValueError(f"image must be None if images holds images, got both, with {len(one)} and {len(several)}")
    return {"image": ("image", one) if one else ("images", several), "video": ("videos", _as_list(row.get("videos")))}


def _conversation(
    prompt: list[dict[str, Any]], media: dict[str, tuple[str, list]]
) -> tuple[list[dict[str, Any]], dict[str, list]]:
    """Return the conversation with one part per image or video, and the values of these parts in order.

    The values of a column fill the parts of their kind in order. If the conversation has no such parts, they are inserted
    before the text of the first user message, images first. Without a column, the values are in the parts themselves.
    """
    messages = normalized(prompt)
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


def read_sample(
    row: dict[str, Any], index: int, decode: bool = True, limits: ImageLimits = DEFAULT_LIMITS, where: str = ""
) -> Sample:
    """Open the images and videos of a row.

    Args:
        row: see the module's docstring.
        index: index of the row.
        decode: False opens images without decoding their pixels.
        limits: limits of images and frames.
        where: name of the row in error messages. Default: "sample" and its index.

    Raises:
        TypeError, ValueError: the prompt, an image or a video is invalid; the message begins with the name of the row.
        NotImplementedError: the decoder that ``use_backend`` selects does not support an image.
    """
    name = where or f"sample {index}"
    if not isinstance(row, dict):
        raise TypeError(f"{name} must be a dict of columns, got {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"{name} must have 'prompt', got {', '.join(map(str, row))}")
    try:
        return _read(row, index, decode, limits, where)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except NotImplementedError as error:  # of a decoder that the caller has selected
        raise NotImplementedError(f"{name}: {error}") from error


def _read(row: dict[str, Any], index: int, decode: bool, limits: ImageLimits, where: str) -> Sample:
    """``read_sample``, with errors that do not name the row."""
    prompt, media = row["prompt"], _media(row)
    values = {kind: values for kind, (_, values) in media.items()}
    if not isinstance(prompt, str):
        prompt, values = _conversation(prompt, media)
    elif not prompt:
        raise ValueError("prompt must not be empty, got ''")
    images, column = [], media["image"][0]
    for position, value in enumerate(values["image"]):
        try:
            images.append(read_image(value, limits) if decode else read_size(value, limits))
        except IMAGE_ERRORS as error:
            name = column if column == "image" else f"{column}[{position}]"
            raise ValueError(f"{name} cannot be read: {error}") from error
    videos = [read_video(x, f"videos[{k}]", decode, limits) for k, x in enumerate(values["video"])]
    fps = DEFAULT_FPS if row.get("fps") is None else row["fps"]
    require_positive("fps", fps)
    return Sample(index, prompt, images, row, videos, float(fps), where)


def render(sample: Sample, processor: Any, **chat_template_kwargs: Any) -> str:
    """Return the prompt as the text that is tokenized, with one placeholder per image or video.

    A conversation that ends with a message of the assistant is rendered up to the end of its text, so that completions continue
    it. After any other message follows the header of an answer. ``add_generation_prompt`` or ``continue_final_message`` in
    ``chat_template_kwargs`` overrides this.

    Args:
        processor: the model's processor, or its tokenizer for a text model.
        chat_template_kwargs: arguments of ``apply_chat_template``.

    Raises:
        SampleError: the model does not support the sample's images or videos, the chat template fails, or the text has a wrong
            number of placeholders or is not valid Unicode.
    """
    media: dict[str, list] = {"image": sample.images, "video": sample.videos}
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in media}
    for kind, values in media.items():
        if tokens[kind] is None and values:
            what = f"a processor without {kind}s" if tokens["image"] else "a text model"
            raise SampleError(sample, f"{kind}s must be absent for {what}, got {len(values)}")
    text = sample.prompt
    if not isinstance(text, str):
        text = _apply_chat_template(sample, processor, tokens["image"] is not None, chat_template_kwargs)
    for kind, values in media.items():
        token = tokens[kind]
        count = text.count(token) if token else 0
        if count != len(values):
            raise SampleError(sample, f"prompt must hold one {token} per {kind}, {len(values)}, got {count} in {text!r:.200}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise SampleError(sample, f"prompt must be valid Unicode, got the lone surrogate {found!r} in {text!r:.200}") from error
    return text


def _apply_chat_template(sample: Sample, processor: Any, takes_parts: bool, options: dict[str, Any]) -> str:
    messages: Any = sample.prompt
    if not takes_parts:  # the template of a tokenizer takes plain strings
        messages = [{**message, "content": text_of_parts(message)} for message in messages]
    if not options.keys() & {"add_generation_prompt", "continue_final_message"}:
        end = {"add_generation_prompt": not sample.continues, "continue_final_message": sample.continues}
        options = {**options, **end}
    if sample.tools:  # templates of some models describe the use of tools even for an empty list
        options = {**options, "tools": list(sample.tools)}
    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    except SecurityError:  # whatever the row
        raise
    except Exception as error:  # templates raise errors of Jinja and of Python
        raise SampleError(sample, f"prompt cannot be rendered by the chat template: {error}") from error


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """Return the processor's tokenizer, or the processor itself if it is a tokenizer."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def _video_arguments(samples: list[Sample]) -> dict[str, Any]:
    """Return the processor's arguments for videos. They keep all frames, which the dataset's author has chosen already."""
    videos = [(video, sample.fps) for sample in samples for video in sample.videos]
    metadata = [{"total_num_frames": len(x), "fps": fps, "frames_indices": list(range(len(x)))} for x, fps in videos]
    return {"videos": [video for video, _ in videos], "video_metadata": metadata, "do_sample_frames": False}


def check_media(samples: list[Sample], family: Family) -> None:
    """Check that the model supports the images and videos of samples in one batch.

    Raises:
        SampleError: a sample has more videos than the family allows.
        ValueError: there are both images and videos, and the family allows only one kind in a batch.
    """
    for sample in samples:
        if family.max_videos is not None and len(sample.videos) > family.max_videos:
            raise SampleError(sample, f"videos must be at most {family.max_videos} for {family.name}, got {len(sample.videos)}")
    if family.mixes_media:
        return
    images, videos = (next((s for s in samples if getattr(s, kind)), None) for kind in ("images", "videos"))
    if images is not None and videos is not None:
        raise ValueError(
            f"samples must have only images or only videos for {family.name}, whose batches hold one kind, got images in "
            f"{images.name} and videos in {videos.name}"
        )


# Errors that name their sample already, or that no sample is responsible for.
_NOT_OF_A_SAMPLE = (SampleError, SecurityError, ImportError, MemoryError, torch.OutOfMemoryError)


def encode(
    samples: list[Sample],
    processor: Any,
    family: Family,
    chat_template_kwargs: dict[str, Any] | None = None,
    **processor_arguments: Any,
) -> ModelInputs:
    """Encode the prompts of samples, each image once. The tokens of a prompt do not depend on the other samples.

    Args:
        samples: the samples, at least one.
        processor: the model's processor, or its tokenizer for a text model.
        family: the model's family.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        processor_arguments: further arguments of the processor's call.

    Returns:
        Left-padded model inputs of one prompt per sample.

    Raises:
        SampleError: a sample cannot be encoded.
        ValueError: see ``check_media``.
    """
    check_media(samples, family)

    def encoded(some: list[Sample]) -> ModelInputs:
        return _encode(some, processor, family, chat_template_kwargs or {}, processor_arguments)

    try:
        return encoded(samples)
    except _NOT_OF_A_SAMPLE:
        raise
    except Exception:  # processors and tokenizers raise many types of errors, which do not name the sample
        for sample in samples:
            try:
                encoded([sample])
            except _NOT_OF_A_SAMPLE:
                raise
            except Exception as error:
                raise SampleError(sample, f"cannot be encoded: {error}") from error
        raise


def _encode(
    samples: list[Sample], processor: Any, family: Family, chat_template_kwargs: dict[str, Any], arguments: dict[str, Any]
) -> ModelInputs:
    """Encode with one call of the processor, or two if only some of the samples need special tokens of the tokenizer."""
    texts = [render(sample, processor, **chat_template_kwargs) for sample in samples]
    edges = special_tokens(tokenizer_of(processor))
    added = [needs_special_tokens(sample, text, processor, edges) for sample, text in zip(samples, texts, strict=True)]
    batches, order = [], []
    for value in (False, True):
        if chosen := [place for place, needed in enumerate(added) if needed == value]:
            some = [samples[place] for place in chosen], [texts[place] for place in chosen]
            batches.append(_call(*some, processor, family, value, len(edges[1]), arguments))
            order += chosen
    batch = batches[0]
    if len(batches) > 1:
        batch = concat(batches, tokenizer_of(processor).pad_token_id).select(torch.tensor(order).argsort())
    for sample, text, mask in zip(samples, texts, batch.inputs["attention_mask"], strict=True):
        if not mask.any():
            raise SampleError(sample, f"prompt must have at least one token, got none for {text!r:.80}")
    return batch


def _call(
    samples: list[Sample],
    texts: list[str],
    processor: Any,
    family: Family,
    add_special_tokens: bool,
    num_last: int,
    arguments: dict[str, Any],
) -> ModelInputs:
    """Call the processor, and remove the ``num_last`` special tokens that the tokenizer adds at the end."""
    options: dict[str, Any] = {"add_special_tokens": add_special_tokens}
    if any(sample.images for sample in samples):
        options["images"] = [sample.images for sample in samples]
    if any(sample.videos for sample in samples):
        options |= _video_arguments(samples)
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **(options | arguments))
    num_images, num_videos = (torch.tensor([len(getattr(s, kind)) for s in samples]) for kind in ("images", "videos"))
    keys = torch.tensor([_content_key(image) for sample in samples for image in sample.images], dtype=torch.int64)
    batch = replace(ModelInputs.from_processor(dict(inputs), family, num_images, num_videos), image_keys=keys)
    return batch.without_last(num_last) if add_special_tokens and num_last else batch


# Special tokens


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer adds before and after a text by itself, such as BOS and EOS."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    first = mask.index(0) if 0 in mask else len(ids)
    last = mask[::-1].index(0) if 0 in mask else 0
    return ids[:first], ids[len(ids) - last :]


def needs_special_tokens(sample: Sample, text: str, processor: Any, edges: tuple[list[int], list[int]]) -> bool:
    """Return whether the tokenizer has to add its special tokens to a rendered prompt. Those at the end are always removed.

    They are added to plain prompts, and to conversations of processors, unless the text already begins with them. They are not
    added to conversations of tokenizers, whose templates write them. transformers and TRL do the same.

    Args:
        text: its rendered prompt.
        processor: the model's processor, or its tokenizer for a text model.
        edges: the result of ``special_tokens``.
    """
    tokenizer = tokenizer_of(processor)
    first, _ = edges
    if not first or (processor is tokenizer and not isinstance(sample.prompt, str)):
        return False
    return not text.startswith(tokenizer.convert_ids_to_tokens(first[0]))


def prompt_ids(sample: Sample, text: str, processor: Any) -> list[int]:
    """Return the token ids of a rendered prompt as ``encode`` returns them, except that each placeholder is one token."""
    tokenizer = tokenizer_of(processor)
    edges = special_tokens(tokenizer)
    added = needs_special_tokens(sample, text, processor, edges)
    ids = tokenizer(text, add_special_tokens=added)["input_ids"]
    return ids[: len(ids) - len(edges[1])] if added else ids


def _content_key(image: Image.Image) -> int:
    """Return a 64-bit hash of the image's pixels, size and mode."""
    palette = image.getpalette() if image.mode.startswith("P") else None
    content = xxhash.xxh3_64(repr((image.mode, image.size, palette)).encode())
    content.update(np.ascontiguousarray(np.asarray(image)).data)
    return int.from_bytes(content.digest(), "little", signed=True)
