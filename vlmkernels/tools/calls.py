"""Find the tool calls in a turn of the model, in the format of its chat template."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from vlmkernels.data.decoding import control_tokens
from vlmkernels.ops.checks import require_one_of
from vlmkernels.tools.arguments import checked
from vlmkernels.tools.formats import FORMATS, MAX_CALLS, CallError, Named, named, split, too_many_calls

_TAIL = 32  # tokens before a turn, in which the start of its reasoning is searched


@dataclass(frozen=True)
class ToolCall:
    """A tool call.

    Args:
        name: the name of the tool.
        arguments: the arguments, in the types of the tool's schema.
    """

    name: str
    arguments: dict[str, Any]


class MalformedCall(str):
    """Why a tool call cannot be made, as text for the model.

    Attributes:
        name: the name of the tool in the call, also if there is no such tool; "" if it has none.
    """

    name: str

    def __new__(cls, reason: str, name: str = "") -> "MalformedCall":
        call = super().__new__(cls, reason)
        call.name = name
        return call


@dataclass(frozen=True)
class ParsedTurn:
    """A turn of the model.

    Args:
        content: the text outside of calls and reasoning, without control tokens. A call that has no name and arguments is part
            of it.
        calls: the calls in their order. A malformed call is a text, which tells the model what is wrong.
        reasoning: the reasoning, or None without one.
        written: the calls with a name and arguments, with those that do not fit the tools.
    """

    content: str
    calls: list[ToolCall | MalformedCall]
    reasoning: str | None = None
    written: list[ToolCall] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """Return the turn as a message of a conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.written:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in self.written
            ]
        return message


class CallParser:
    """Reads the turns of a model.

    If the tokenizer has a ``response_template``, transformers reads the turns. Otherwise, ``tool_format`` or the chat template
    selects a format of ``vlmkernels.tools.formats.FORMATS``.

    Args:
        tokenizer: the model's tokenizer.
        chat_template: the template that renders the prompts. Default: that of the tokenizer.
        tool_format: the name of a format; it is used instead of a ``response_template``.

    Raises:
        ValueError: the format is unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        tool_format: str | None = None,
    ):
        self.tokenizer = tokenizer
        if tool_format is not None:
            require_one_of("tool_format", tool_format, FORMATS)
        self._response_template = None if tool_format else getattr(tokenizer, "response_template", None)
        name = tool_format or _format_of(chat_template or tokenizer.chat_template)
        if name is None and self._response_template is None:
            texts = "; ".join(f"{name}: {' '.join(row.markers)}" for name, row in FORMATS.items())
            raise ValueError(
                "the chat template must write tool calls in a known format, but it has the texts of none; pass a chat template "
                f"that writes them, set tokenizer.response_template, or set tool_format ({texts})"
            )
        self._format = None if name is None else FORMATS[name]
        syntax = () if self._format is None else (*self._format.tokens, *self._format.think)
        if self._response_template is not None:
            tokenizer.get_response_parser(prefix="")  # raises ValueError if the template is not valid
            syntax = (*syntax, *(re.sub(r"\\(.)", r"\1", text) for text in _strings(self._response_template)))
        control = control_tokens(tokenizer)
        self._hidden = {token for token, text in control.items() if not any(text in part for part in syntax)}
        # Control tokens of the format, which remain in the text if the model misplaces them.
        misplaced = sorted({text for token, text in control.items() if token not in self._hidden}, key=len, reverse=True)
        self._misplaced = re.compile("|".join(map(re.escape, misplaced)) or r"(?!)")

    def __call__(
        self, ids: Sequence[int], schemas: Sequence[dict[str, Any]], prefix: Sequence[int] | None = None
    ) -> ParsedTurn:
        """Read a turn.

        Args:
            ids: the tokens that the model sampled.
            schemas: the JSON schemas of the tools that it can call.
            prefix: the tokens before the turn, which can start its reasoning. Default: unknown.
        """
        content, found, reasoning = self._split(self._decode(ids), prefix, schemas)
        by_name = {schema["function"]["name"]: schema for schema in schemas}
        typed = self._format is None or self._format.typed
        calls: list[ToolCall | MalformedCall] = []
        written: list[ToolCall] = []
        for call in found:
            try:
                if isinstance(call, CallError):
                    raise call
                name, arguments = call
                written.append(ToolCall(name, arguments))
                written[-1] = ToolCall(name, checked(name, arguments, by_name, typed))
                calls.append(written[-1])
            except CallError as error:
                calls.append(MalformedCall(str(error), error.name))
        return ParsedTurn(self._misplaced.sub("", content).strip(), calls, reasoning, written)

    def _decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without the control tokens that are no part of the format."""
        kept = [token for token in ids if token not in self._hidden]
        return cast(str, self.tokenizer.decode(kept, skip_special_tokens=False))

    def _split(
        self, text: str, prefix: Sequence[int] | None, schemas: Sequence[dict[str, Any]]
    ) -> tuple[str, list[Named | CallError], str | None]:
        """Split a turn as ``vlmkernels.tools.formats.split`` does, with the ``response_template`` if there is one."""
        error: Exception | None = None
        if self._response_template is not None:
            before = self._decode(prefix or ())
            try:
                return _of_message(self.tokenizer.parse_response(text, prefix=before, tools=list(schemas)))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as caught:
                error = caught
        if self._format is None:
            return text, [CallError(f"a tool call must have the format of the prompt: {str(error)[:100]!r}")], None
        if prefix is None:
            return split(text, self._format, opened=None)
        tail = self._decode(prefix[-_TAIL:]).rstrip()
        return split(text, self._format, opened=tail.endswith(self._format.think[0].rstrip()))


def _of_message(message: Mapping[str, Any]) -> tuple[str, list[Named | CallError], str | None]:
    """Return the text, the calls and the reasoning of a message of the ``response_template``."""
    functions = [call.get("function") if isinstance(call, dict) else call for call in message.get("tool_calls") or []]
    calls: list[Named | CallError] = [named(function) for function in functions[:MAX_CALLS]]
    if len(functions) > MAX_CALLS:
        calls.append(too_many_calls())
    return message.get("content") or "", calls, message.get("reasoning_content") or message.get("thinking") or None


def _strings(template: Any) -> Iterator[str]:
    """Yield the texts in a ``response_template``."""
    if isinstance(template, str):
        yield template
    elif isinstance(template, (dict, list)):
        for part in template.values() if isinstance(template, dict) else template:
            yield from _strings(part)


def _format_of(chat_template: str | dict[str, str] | None) -> str | None:
    """Return the name of the format in which a chat template writes calls, or None."""
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("tool_use", chat_template.get("default"))
    text = chat_template or ""
    return next((name for name, row in FORMATS.items() if all(marker in text for marker in row.markers)), None)
