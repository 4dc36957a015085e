"""Conversations as chat templates expect them: roles are strings, contents are lists of parts, and absent keys are absent.

``datasets`` stores the dicts of a list with the union of their keys and fills missing ones with None. Chat templates often ask
whether a part has a key, not whether it has a value, so a text part with ``image=None`` would be rendered as an image.
"""

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

# The value of ``type``, or the key of a part without a type -> kind of the part. Includes the formats of OpenAI's APIs.
KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    "thinking": "thinking",  # left to the template, as in Magistral's
}
_VALUES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path", "base64")}
MEDIA_KEYS = frozenset(key for keys in _VALUES.values() for key in keys) - {"base64"}  # whose values can be paths
# With one of these, a message of the assistant needs no content.
_CALLS = ("tool_calls", "function_call")


def normalized(prompt: Any) -> list[Message]:
    """Return the messages of a conversation with all contents as lists of text and media parts.

    A text part is ``{"type": "text", "text": ...}``. A media part is ``{"type": "image"}`` or ``{"type": "video"}``, with its
    value, if it has one, under the same name. Keys whose value is None are removed. The given prompt does not change.

    Raises:
        TypeError, ValueError: a message has no role or no content, or a part is not a text, an image or a video.
    """
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(f"prompt must be a string or a list of messages, got {prompt!r:.80}")
    if not prompt:
        raise ValueError("prompt must have at least one message, got []")
    return [_message(message, f"prompt[{position}]") for position, message in enumerate(prompt)]


def text_of_parts(message: Message) -> str:
    """Return the text of a normalized message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def without_none(value: Any) -> Any:
    """Return the value without the keys of its dicts, at any depth, that are None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def map_media_values(message: Any, function: Callable[[Any], Any]) -> Any:
    """Return a message with ``function`` applied to the values of its image and video parts, except for base64."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (list, dict)):
        return message

    def mapped(part: Any) -> Any:
        if not isinstance(part, dict) or KINDS.get(part.get("type"), "image") not in _VALUES:
            return part
        return {key: function(value) if key in MEDIA_KEYS else value for key, value in part.items()}

    return {**message, "content": mapped(content) if isinstance(content, dict) else list(map(mapped, content))}


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise TypeError(f"{name} must be a message with role and content, got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        keys = ", ".join(str(key) for key, value in message.items() if value is not None)
        raise ValueError(f"{name} must have a role, got {f'the keys {keys}' if role is None else repr(role)}")
    rest = {key: without_none(value) for key, value in message.items() if key != "content" and value is not None}
    if content is None and any(rest.get(key) for key in _CALLS):
        return {**rest, "content": []}
    return {**rest, "content": _parts(content, f"{name}.content")}


def _parts(content: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(content, (str, dict)):
        return [_part(content, name)]
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of parts, got {content!r:.80}")
    return [_part(part, f"{name}[{position}]") for position, part in enumerate(content)]


def _part(part: Any, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise TypeError(f"{name} must be a string or a part with a type, got {part!r:.80}")
    part = {key: value for key, value in part.items() if not is_absent(value)}
    kind = _kind(part, name)
    if kind == "thinking":
        return without_none(part)
    values = {key: part[key] for key in _VALUES.get(kind, ("text",)) if key in part}
    other = [key for key in part if KINDS.get(key, kind) != kind and not (isinstance(part[key], str) and not part[key])]
    if other or len(values) > 1:
        found = ", ".join([*values, *other])
        raise ValueError(f"{name} must have the value of one {kind} and of nothing else, got the keys {found}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise TypeError(f"{name}.text must be a string, got {part.get('text')!r:.80}")
        return {"type": "text", "text": part["text"]}
    media = [_media(key, value) for key, value in values.items()]
    return {"type": kind, kind: media[0]} if media else {"type": kind}


def is_absent(value: Any) -> bool:
    """Return whether a value is None, or a struct of Arrow with nothing but None."""
    return value is None or (isinstance(value, dict) and all(item is None for item in value.values()))


def _kind(part: dict[str, Any], name: str) -> str:
    if "type" in part:
        kind = KINDS.get(part["type"]) if isinstance(part["type"], str) else None
        if kind is None:
            raise ValueError(f"{name}.type must be one of {', '.join(KINDS)}, got {part['type']!r:.80}")
        return kind
    kinds = list(dict.fromkeys(KINDS[key] for key in part if key in KINDS))
    if len(kinds) != 1:
        keys = f"the keys {', '.join(map(str, part))}" if part else "an empty dict"
        raise ValueError(f"{name} must have a type, or one of text, image and video, got {keys}")
    return kinds[0]


def _media(key: str, value: Any) -> Any:
    """Return the image or video of a part, which the key of the part tells how to read."""
    if key == "base64":
        return f"data:;base64,{value}"
    return value.get("url") if key.endswith("_url") and isinstance(value, dict) else value
