"""The formats in which chat templates write tool calls, and how to read them.

A row of ``FORMATS`` is a format. Its reader gets the text of a turn and the match of ``opens``, and returns the calls and where
they end. It reads names and arguments only; ``vlmkernels.tools.arguments`` compares them with the schemas. The time is linear
in the length of the text, and nothing in the text is ever executed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 64  # of a turn; later ones are refused together
MAX_DEPTH = 32  # of lists and objects in the arguments
_MAX_DIGITS = 20  # of an integer; those of 64 bits have at most 20 characters

Named = tuple[str, dict[str, Any]]  # a call: the name of the tool, and its arguments
Reader = Callable[[str, "re.Match[str]"], tuple[list[Named], int]]


class CallError(ValueError):
    """A tool call that cannot be made. The message is for the model.

    Attributes:
        name: the name of the tool in the call; "" if it has none.
    """

    def __init__(self, reason: str, name: str = ""):
        super().__init__(reason)
        self.name = name


@dataclass(frozen=True)
class Format:
    """How calls are written.

    Args:
        markers: texts that a chat template has if it writes calls in this format.
        opens: where calls start.
        read: reads the calls at a match of ``opens``. Raises ValueError if they are malformed.
        ends: where malformed calls end, searched from the end of the match of ``opens``.
        tokens: the texts of the format that can be special tokens.
        think: the texts around the reasoning.
        typed: False if all arguments are text, so that only the schema knows their types.
    """

    markers: tuple[str, ...]
    opens: str
    read: Reader
    ends: str
    tokens: tuple[str, ...]
    think: tuple[str, str] = ("<think>", "</think>")
    typed: bool = True


def split(text: str, written: Format, opened: bool | None) -> tuple[str, list[Named | CallError], str | None]:
    """Split a turn into its text, its calls and its reasoning.

    Args:
        text: the turn.
        written: the format of its calls.
        opened: whether the prompt ends with the start of the reasoning; None if it is unknown.

    Returns:
        The text outside of calls, but with those that are malformed; the calls, or why they are malformed; the reasoning, or
        None without one. Calls in the reasoning are part of it.
    """
    think, end_think = written.think
    pieces: list[str] = []
    thoughts: list[str] = []
    calls: list[Named | CallError] = []
    if opened is None:
        opened = end_think in text and think not in text[: text.index(end_think)]
    start = re.compile(f"(?P<think>{re.escape(think)})|{written.opens}")
    position = 0
    while position < len(text) and len(calls) <= MAX_CALLS:
        if opened:
            end = text.find(end_think, position)
            end = len(text) if end < 0 else end
            thoughts.append(text[position:end].strip())
            position, opened = min(end + len(end_think), len(text)), False
        match = start.search(text, position)
        if match is None:
            break
        pieces.append(text[position : match.start()])
        if match["think"] is not None:
            position, opened = match.end(), True
            continue
        try:
            found, position = written.read(text, match)
        except (ValueError, RecursionError) as error:
            calls.append(_call_error(error))
            ending = re.compile(written.ends).search(text, match.end())
            found, position = [], ending.end() if ending else len(text)
        calls += found
        if not found:
            pieces.append(text[match.start() : position])
    pieces.append(text[position:])
    if len(calls) > MAX_CALLS:
        calls[MAX_CALLS:] = [too_many_calls()]
    return "".join(pieces).strip(), calls, "\n".join(filter(None, thoughts)) or None


def too_many_calls() -> CallError:
    """Return the error of the calls beyond ``MAX_CALLS``."""
    return CallError(f"a turn must have at most {MAX_CALLS} tool calls, the others were ignored")


def _call_error(error: Exception) -> CallError:
    """Return why a call is malformed."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, RecursionError):
        return CallError(f"a tool call must not be nested more than {MAX_DEPTH} levels deep")
    return CallError(f"a tool call must be valid JSON: {getattr(error, 'msg', error)}")


def integer(text: str) -> int:
    """Return an integer; ValueError if it has more digits than one of 64 bits."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits is too large")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; ValueError if it has a name twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} is given twice")
        found[name] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=integer, parse_constant=_no_constant)


def _expect(pattern: str, text: str, position: int, rule: str, name: str = "") -> "re.Match[str]":
    """Match a pattern, or raise the CallError that a tool call must ``rule``."""
    match = re.compile(pattern).match(text, position)
    if match is None:
        raise CallError(f"a tool call must {rule}", name)
    return match


def _space(text: str, position: int) -> int:
    """Return where the next character that is no space is."""
    return _expect(r"\s*", text, position, "").end()


def _json(text: str, position: int) -> tuple[Any, int]:
    """Read a JSON value; returns it and where it ends."""
    found: tuple[Any, int] = _DECODER.raw_decode(text, _space(text, position))
    return found


def named(value: Any) -> Named:
    """Return the call that a JSON object describes."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise CallError('a tool call must be a JSON object with "name" and "arguments"')
    name, arguments = value["name"], value.get("arguments", value.get("parameters"))
    if arguments is not None and not isinstance(arguments, dict):
        raise CallError(f"{name[:40]}: the arguments must be an object, got {type(arguments).__name__}", name[:80])
    return name, arguments or {}


def _end(pattern: str, text: str, position: int, name: str) -> int:
    """Return where a call ends: after ``pattern``, or at the end of the turn."""
    return _expect(rf"\s*(?:{pattern}|\Z)", text, position, f"end after its arguments (tool {name[:40]!r})", name).end()


def _hermes(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
    value, position = _json(text, match.end())
    call = named(value)
    return [call], _end("</tool_call>", text, position, call[0])


def _llama(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
    try:
        value, position = _json(text, match.end())
    except ValueError:
        if text.find('"parameters"', match.end()) >= 0:
            raise
        return [], len(text)  # the rest has no call
    # Any other object is part of an answer.
    return [named(value)] if "parameters" in value or "arguments" in value else [], position


def _mistral(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
    head = _expect(r"\s*([\w.-]*)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?", text, match.end(), "")
    value, position = _json(text, head.end())
    if head[1]:
        return [named({"name": head[1], "arguments": value})], position
    if not isinstance(value, list):
        raise CallError("a tool call must have the name of a tool, or a list of calls, after [TOOL_CALLS]")
    return [named(call) for call in value], position


def _in_tags(head: str, key: str, end_of_value: str, end: str) -> Reader:
    """Return the reader of a format that writes each argument in tags, as text.

    Args:
        head: pattern of the name of the tool.
        key: pattern of the name of an argument, up to its value.
        end_of_value: pattern after a value.
        end: pattern after the arguments.
    """

    def read(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
        named = _expect(head, text, match.end(), "start with the name of a tool")
        name, position = named[1].strip(), named.end()
        arguments: dict[str, str] = {}
        while argument := re.compile(key).match(text, position):
            closed = re.compile(end_of_value).search(text, argument.end())
            if closed is None or argument[1].strip() in arguments:
                rule = "be closed" if closed is None else "be given once"
                raise CallError(f"{name[:40]}: argument {argument[1].strip()[:40]!r} must {rule}", name)
            arguments[argument[1].strip()] = text[argument.end() : closed.start()]
            position = closed.end()
        return [(name, arguments)], _end(end, text, position, name)

    return read


_NAME = r"[A-Za-z_][\w.-]*"
_QUOTED = re.compile(
    r"'((?:[^'\\]|\\.)*+)'|" + r'"((?:[^"\\]|\\.)*+)"|' + re.escape('<|"|>') + "(.*?)" + re.escape('<|"|>'), re.DOTALL
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\\'\"/bfnrt]))")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_NUMBER = re.compile(r"[-+]?(?:\d+(\.\d*)?|(\.\d+))([eE][-+]?\d+)?")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
Item = Callable[[str, int], tuple[Any, int]]


def number(text: str) -> int | float | None:
    """Return the number that a text is, or None."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    return float(text) if any(match.groups()) else integer(text)


def literal(text: str, position: int = 0, depth: int = 0) -> tuple[Any, int]:
    """Read a value as JSON, Python or Gemma write it; returns it and where it ends. Names in objects can be unquoted."""
    if depth > MAX_DEPTH:
        raise RecursionError
    position = _space(text, position)
    if text.startswith(("[", "("), position):
        close = "]" if text[position] == "[" else ")"
        return _items(text, position + 1, close, lambda text, position: literal(text, position, depth + 1))
    if text.startswith("{", position):
        pairs, position = _items(text, position + 1, "}", lambda text, position: _pair(text, position, ":", depth + 1))
        return _object(pairs), position
    if match := _QUOTED.match(text, position):
        return _unquoted(match), match.end()
    if (match := re.compile(_NAME).match(text, position)) and match[0] in _WORDS:
        return _WORDS[match[0]], match.end()
    if match := _NUMBER.match(text, position):
        return number(match[0]), match.end()
    raise CallError(f"a tool call must have a value where it has {text[position : position + 10]!r}")


def _unquoted(match: "re.Match[str]") -> str:
    """Return the text of a string, with the escapes of Python and JSON. Other backslashes stay."""
    raw = next(group for group in match.groups() if group is not None)
    if match[3] is not None or "\\" not in raw:
        return raw

    def character(escape: "re.Match[str]") -> str:
        code = escape[1] or escape[2]
        return chr(int(code, 16)) if code else _ESCAPES.get(escape[3], escape[3])

    # JSON writes a character beyond 16 bits as two surrogates.
    return _ESCAPE.sub(character, raw).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _pair(text: str, position: int, separator: str, depth: int) -> tuple[tuple[str, Any], int]:
    """Read a name and its value."""
    position = _space(text, position)
    if match := _QUOTED.match(text, position):
        name = _unquoted(match)
    elif match := re.compile(_NAME).match(text, position):
        name = match[0]
    else:
        raise CallError(f"a tool call must have the name of an argument where it has {text[position : position + 10]!r}")
    position = _space(text, match.end())
    if not text.startswith(separator, position):
        raise CallError(f"a tool call must have {separator!r} and a value after the name {name[:40]!r}")
    value, position = literal(text, position + 1, depth)
    return (name, value), position


def _items(text: str, position: int, close: str, item: Item) -> tuple[list[Any], int]:
    """Read items that commas separate, up to ``close``."""
    items = []
    position = _space(text, position)
    while not text.startswith(close, position):
        value, position = item(text, position)
        items.append(value)
        position = _space(text, position)
        if text.startswith(",", position):
            position = _space(text, position + 1)
        elif not text.startswith(close, position):
            raise CallError(f"a tool call must have ',' or {close!r} where it has {text[position : position + 10]!r}")
    return items, position + 1


def _python_call(text: str, position: int) -> tuple[Named, int]:
    """Read a call as in Python, ``f(x=1)``."""
    match = _expect(rf"({_NAME})\s*\(", text, position, "have the form [name(argument=value)]")
    pairs, position = _items(text, match.end(), ")", lambda text, position: _pair(text, position, "=", 0))
    return (match[1], _object(pairs)), position


def _pythonic(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
    start = _expect(r"\s*\[", text, match.end(), "have the form [name(argument=value)]").end()
    calls, position = _items(text, start, "]", _python_call)
    return calls, _end(r"<\|tool_call_end\|>", text, position, calls[-1][0] if calls else "")


def _gemma(text: str, match: "re.Match[str]") -> tuple[list[Named], int]:
    head = _expect(rf"\s*call:({_NAME})(?=\{{)", text, match.end(), "have the form call:name{argument:value}")
    arguments, position = literal(text, head.end())
    return [(head[1], arguments)], _end(r"<tool_call\|>", text, position, head[1])


_TOOL_CALL = ("<tool_call>", "</tool_call>")
_BODY = r"</tool_call>|(?=<tool_call>)|\Z"

# In the order in which their markers are searched: a template can have those of a later row too.
FORMATS = {
    # Qwen3.5, Qwen3-Coder
    "xml": Format(
        markers=("<function=", "<parameter="),
        opens="<tool_call>",
        read=_in_tags(
            r"\s*<function=([^>\n]+)>", r"\s*<parameter=([^>\n]+)>\n?", r"\n?</parameter>", r"</function>\s*(?:</tool_call>|\Z)"
        ),
        ends=_BODY,
        tokens=_TOOL_CALL,
        typed=False,
    ),
    # GLM-4.5V, GLM-4.6V
    "glm": Format(
        markers=("<arg_key>", "<arg_value>"),
        opens="<tool_call>",
        read=_in_tags(
            r"\s*([^\s<]+)", r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>", "</arg_value>", "</tool_call>",
        ),
        ends=_BODY,
        tokens=(*_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        typed=False,
    ),
    # Gemma 4
    "gemma": Format(
        markers=("<|tool_call>", "call:"),
        opens=r"<\|tool_call>",
        read=_gemma,
        ends=r"<tool_call\|>|(?=<\|tool_call>)|\Z",
        tokens=("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
        think=("<|channel>thought\n", "<channel|>"),
    ),
    # LFM2-VL
    "pythonic": Format(
        markers=("<|tool_call_start|>",),
        opens=r"<\|tool_call_start\|>",
        read=_pythonic,
        ends=r"<\|tool_call_end\|>|(?=<\|tool_call_start\|>)|\Z",
        tokens=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    # Mistral Small 3.1, Pixtral
    "mistral": Format(
        markers=("[TOOL_CALLS]",),
        opens=r"\[TOOL_CALLS\]",
        read=_mistral,
        ends=r"(?=\[TOOL_CALLS\])|\Z",
        tokens=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
        think=("[THINK]", "[/THINK]"),
    ),
    # Qwen2.5-VL, Qwen3-VL
    "hermes": Format(
        markers=(*_TOOL_CALL, "arguments"), opens="<tool_call>", read=_hermes, ends=_BODY, tokens=_TOOL_CALL
    ),
    # Llama 3.2 Vision
    "llama": Format(
        markers=('{"name": "', '"parameters": ', "tool_calls"),
        opens=r'(?:<\|python_tag\|>\s*)?(?=\{\s*"name"\s*:)',
        read=_llama,
        ends=r"\Z",
        tokens=("<|python_tag|>",),
    ),
}  # fmt: skip
