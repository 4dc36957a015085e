r"""What follows a turn of the model: the results of its tools, as the tokens and images that are appended to the sequence.

Only these tokens are made here. Those of the prompt and of the model's turns stay as they were sampled: a decoded text can have
other tokens. Chat templates render whole conversations, so a minimal one is rendered, with a call of the same tool::

    <|im_start|>user\n.<|im_end|>\n<|im_start|>assistant\n<tool_call>{"name": "zoom", "arguments": {}}</tool_call><|im_end|>...
                                                                                                     what follows ^

What follows begins with the token that ends the turn, unless the model has sampled it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vlmkernels.data.samples import DEFAULT_FPS, Sample, SampleError, encode, prompt_ids, render, tokenizer_of
from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.trajectories import text_inputs

Message = dict[str, Any]

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_UNKNOWN = "unknown"
_TAIL = 256  # characters at the end of a prompt
# Texts of messages that are rendered to see what a chat template does.
_FIRST, _LAST, _TOOL = "firstpart", "lastpart", "probedtool"


class ResultError(ValueError):
    """The results of tools cannot be encoded; the message says why."""


@dataclass(frozen=True)
class Observation:
    r"""What follows a turn of the model.

    Args:
        inputs: the model inputs of one sample without padding: the tokens after those that the model sampled, up to the header
            of its next turn, and the images of the results.
        prompt_ids: the same tokens with one placeholder per image, as vLLM takes them.
        images: the images.
    """

    inputs: ModelInputs
    prompt_ids: list[int]
    images: list[Image.Image]


class TurnEncoder:
    """Encodes the results of tools.

    Args:
        processor: the model's processor, or its tokenizer for a text model.
        family: the model's family.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        processor_arguments: further arguments of the processor's call.
        end_tokens: tokens that end a turn of the model, as in ``Sampling.eos_token_id``. Default: that of the tokenizer.

    Attributes:
        processor_arguments: may be replaced between batches, when the size of images changes.
        images_unsupported: why results must not have images; None if they can. A text model has no images.

    Raises:
        ValueError: the chat template does not write tool calls, or the text of a tool's message, or what it writes before a
            tool's message depends on the message.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        chat_template_kwargs: dict[str, Any] | None = None,
        processor_arguments: dict[str, Any] | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        self.processor, self.family = processor, family
        self.processor_arguments = dict(processor_arguments or {})
        self._prompt_options = dict(chat_template_kwargs or {})
        options = {k: v for k, v in self._prompt_options.items() if k != "continue_final_message"}
        self._options = {**options, "add_generation_prompt": True}
        tokenizer = tokenizer_of(processor)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}  # a text token may be in the call itself
        ends = special.intersection(end_tokens or [tokenizer.eos_token_id])
        self._after_name = self._end_of_turn([str(tokenizer.convert_ids_to_tokens(token)) for token in ends])
        self._takes_parts = self._probe_text()
        self.images_unsupported = self._probe_images()
        image = [{"type": "image", "image": Image.new("RGB", (64, 64))}] if self.images_unsupported is None else []
        self([{"role": "tool", "name": _TOOL, "content": [{"type": "text", "text": _FIRST}, *image]}], None)

    def __call__(self, messages: Sequence[Message], last_token: int | None) -> Observation:
        """Return what follows a turn.

        Args:
            messages: the messages of the tools that the turn has called, ``{"role": "tool", "name": ..., "content": ...}``. The
                content is a string, or a list of text and image parts.
            last_token: the last token that the model sampled. If it is the token with which the template ends the turn, it is
                not repeated.

        Raises:
            NotImplementedError: a result has an image, and ``images_unsupported`` is not None.
            ResultError: a result cannot be encoded: its text has a placeholder of an image, or the processor does not accept
                an image.
        """
        parts = [part for message in messages for part in _parts(message)]
        images = [part["image"] for part in parts if part["type"] == "image"]
        if images and self.images_unsupported is not None:
            raise NotImplementedError(f"results of tools must be text, got an image: {self.images_unsupported}")
        sample = self._conversation(messages, images)
        try:
            text = render(sample, self.processor, **self._options)
            head = text[: self._start(text, _known_name(messages[0]))]
            before = prompt_ids(sample, head, self.processor)
            short = self._after(before, prompt_ids(sample, text, self.processor))
            if images:
                whole = encode([sample], self.processor, self.family, self._options, **self.processor_arguments)
                self._after(before, whole.inputs["input_ids"][0].tolist())
                inputs = _without_first(whole, len(before))
            else:
                inputs = text_inputs([short], self.family, "cpu", 0)
        except SampleError as error:
            raise ResultError(str(error)) from error
        if short[0] == last_token:
            short, inputs = short[1:], _without_first(inputs, 1)
        return Observation(inputs, short, images)

    def last_tokens(self, sample: Sample) -> list[int]:
        """Return the last tokens of a prompt, in which a turn of the model may begin, such as the header of an answer."""
        text = render(sample, self.processor, **self._prompt_options)
        ids: list[int] = tokenizer_of(self.processor)(text[-_TAIL:], add_special_tokens=False)["input_ids"]
        return ids

    def _conversation(self, messages: Sequence[Message], images: list[Image.Image]) -> Sample:
        """Return the minimal conversation in which the messages follow a call of the first one's tool."""
        contents = []
        for message in messages:
            parts = [part if part["type"] == "text" else {"type": "image"} for part in _parts(message)]
            takes_parts = self._takes_parts or any(part["type"] == "image" for part in parts)
            contents.append(parts if takes_parts else "".join(part["text"] for part in parts))
        names = list(map(_known_name, messages))
        pairs = zip(names, contents, strict=True)
        results = [{"role": "tool", "name": name, "content": content} for name, content in pairs]
        return _sample([*_call(names[0]), *results], images)

    def _start(self, text: str, name: str) -> int:
        """Return the index in a rendered conversation at which the text after a tool call begins."""
        call = name + self._after_name
        place = text.find(call)
        if place < 0:
            raise ValueError(
                f"chat_template must write a call the same way with and without its result, got no {call!r} in {text!r:.500}"
            )
        return place + len(call)

    def _after(self, before: list[int], ids: list[int]) -> list[int]:
        """Return the tokens that follow ``before``."""
        if ids[: len(before)] != before or len(ids) == len(before):
            raise ValueError(
                f"chat_template must end a turn where a token ends, got {tokenizer_of(self.processor).decode(ids)!r:.500}, in "
                f"which {self._after_name!r} ends within a token"
            )
        return ids[len(before) :]

    # What the chat template does

    def _end_of_turn(self, ends: list[str]) -> str:
        """Return what the template writes after the name of a tool without arguments, up to the token that ends the turn."""
        options = {**self._options, "add_generation_prompt": False}
        text = _rendered(_sample(_call(_TOOL)), self.processor, "an assistant's message with tool_calls", options)
        _, found, after = text.rpartition(_TOOL)
        if not found:
            raise ValueError(f"chat_template must write the tool_calls of the assistant, got {text!r:.500} without them")
        return after[: min((place for end in ends if (place := after.find(end)) >= 0), default=len(after))]

    def _after_call(self, content: str | list[dict[str, Any]], images: list[Image.Image]) -> str:
        """Return what the template writes after a call whose result has the given content."""
        result = {"role": "tool", "name": _TOOL, "content": content}
        text = _rendered(_sample([*_call(_TOOL), result], images), self.processor, "a message with role tool", self._options)
        return text[self._start(text, _TOOL) :]

    def _probe_text(self) -> bool:
        """Return whether the content of a tool's message is a list of parts, rather than a string."""
        contents: dict[bool, Any] = {True: [{"type": "text", "text": text} for text in (_FIRST, _LAST)]}
        if getattr(self.processor, "image_token", None) is not None:  # others get a string in any case
            contents[False] = _FIRST + _LAST
        found = []
        for takes_parts, content in contents.items():
            try:
                text = self._after_call(content, [])
            except ValueError as error:  # a template for contents of the other kind
                found.append(str(error))
                continue
            if (between := _between(text)) is not None and "type" not in between:
                return takes_parts
            found.append(f"{text!r:.500} for {content}")
        raise ValueError(f"chat_template must write the text of a tool's message once, got {', and '.join(found)}")

    def _probe_images(self) -> str | None:
        """Return why the results of tools cannot have images."""
        spans = self.family.bidirectional
        placeholder = getattr(self.processor, "image_token", None)
        if placeholder is None:
            return "a text model has no images"
        if spans is not None and spans.linked:
            return f"all image tokens of {self.family.name} attend to each other, also to those of later turns"
        parts = [{"type": "text", "text": _FIRST}, {"type": "image"}, {"type": "text", "text": _LAST}]
        image = Image.new("RGB", (64, 64))
        if not self._takes_parts:
            return "its chat_template writes the content of a tool's message as a string"
        user = _sample([{"role": "user", "content": parts}], [image])
        try:
            usual = _between(_rendered(user, self.processor, "a user's message with an image", self._options))
            written = _between(self._after_call(parts, [image]))
        except ValueError as error:
            return str(error)
        if usual is None or written is None or usual.strip() not in written or written.count(placeholder) != 1:
            return (
                f"its chat_template must write an image of a tool's message as that of a user's, {usual!r}, between the texts "
                f"around it, got {written!r}"
            )
        return None


def _call(name: str) -> list[Message]:
    """Return a conversation that ends with a call of a tool without arguments."""
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    user, empty = ([{"type": "text", "text": text}] for text in (".", ""))
    return [{"role": "user", "content": user}, {"role": "assistant", "content": empty, "tool_calls": [call]}]


def _known_name(message: Message) -> str:
    """Return the name of a tool as it is rendered: the model can write anything as a name."""
    name: str = message["name"]
    return name if _NAME.fullmatch(name) else _UNKNOWN


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _sample(messages: list[Message], images: Sequence[Image.Image] = ()) -> Sample:
    return Sample(-1, messages, list(images), {}, [], DEFAULT_FPS, where="results of tools")


def _rendered(sample: Sample, processor: Any, what: str, options: dict[str, Any]) -> str:
    try:
        return render(sample, processor, **options)
    except SampleError as error:
        raise ValueError(f"chat_template must support {what}, got the error {error}") from error


def _between(text: str) -> str | None:
    """Return what is between the first and the last text of a probe; None unless both are written once, in this order."""
    if text.count(_FIRST) != 1 or text.count(_LAST) != 1 or text.find(_FIRST) > text.find(_LAST):
        return None
    return text.partition(_FIRST)[2].partition(_LAST)[0]


def _without_first(inputs: ModelInputs, count: int) -> ModelInputs:
    """Remove the first ``count`` tokens of every sample."""
    cut = {name: x[:, count:] if inputs.family.axis(name) == "token" else x for name, x in inputs.inputs.items()}
    return replace(inputs, inputs=cut)
