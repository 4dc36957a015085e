"""Find the answer in a completion."""

import re
from typing import Any

from vlmkernels.rewards.answers.coordinates import boxes_in

THINK = "<think>"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)

Messages = list[dict[str, Any]]  # a conversation: messages with ``role`` and ``content``


def text_of(value: str | Messages) -> str:
    """Return the text of a prompt or completion, given as a string or as a list of messages. Images are left out.

    The text of a completion with tools is that of the last message of the assistant, so that rewards judge the final answer.
    Reasoning that a message has in ``reasoning_content`` is put before its text, in a ``<think>`` element.
    """
    if isinstance(value, str):
        return value
    is_trajectory = bool(value) and value[0].get("role") == "assistant" and any(m.get("role") == "tool" for m in value)
    if is_trajectory:
        value = [message for message in value if message.get("role") == "assistant"][-1:]
    return "".join(_text(message) for message in value)


def _text(message: dict[str, Any]) -> str:
    text = "".join(part.get("text") or "" for part in _parts(message.get("content") or ""))
    reasoning = message.get("reasoning_content")
    return f"{THINK}{reasoning}</think>{text}" if reasoning else text


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": content}] if isinstance(content, str) else content


def ends_in_think(prompt: str) -> bool:
    """Whether a rendered prompt ends with ``<think>``, so that the completion begins within this element."""
    return prompt.rstrip().endswith(THINK)


def find_answer(text: str, think_opened: bool | None = None) -> str | None:
    """Return the content of the ``<answer>`` element, or if there is none, the text after ``</think>``, or the whole text.

    Returns None if the answer is empty or contains tags, if ``<answer>`` is repeated, not closed or within the ``<think>``
    element, if ``</think>`` is repeated in a text without ``<answer>``, or if the ``<think>`` element is not closed.

    Args:
        text: the completion.
        think_opened: whether the prompt ends with ``<think>``; None if unknown. If it does, a text without ``</think>`` is a
            thought that was cut off, and not an answer.
    """
    text = THINK + text if think_opened else text
    tags = text.count("<answer>"), text.count("</answer>")
    if tags == (0, 0):
        if text.count("</think>") > 1:
            return None
        answer = text.rpartition("</think>")[2]
    elif tags == (1, 1) and (match := _ANSWER.search(text)) and "</think>" not in text[match.end() :]:
        answer = match[1]
    else:
        return None
    return None if not (answer := answer.strip()) or _TAG.search(answer) else answer


def is_copied(answer: str, prompt: str) -> bool:
    """Whether an answer equals the content of an ``<answer>`` element in the prompt, or has only boxes that the prompt has."""
    if answer in map(str.strip, _ANSWER.findall(prompt)):
        return True
    given = set(boxes_in(prompt))
    found = boxes_in(answer) if given else []
    return bool(found) and given.issuperset(found)


def has_format(text: str, prompt: str = "", think_opened: bool | None = None) -> bool:
    """Whether a completion is ``<think>...</think><answer>...</answer>``, with each element once and nothing outside.

    Both elements must contain a letter or digit, and the ``<think>`` element must not be copied from the prompt.

    Args:
        text: the completion.
        prompt: the text of the prompt, which may have examples.
        think_opened: whether the prompt ends with ``<think>``, as the chat templates of models that always think do. The
            completion must then not repeat the tag; if False, it must begin with it. None: unknown, so that both have the
            format.
    """
    opened = THINK not in text if think_opened is None else think_opened
    text = THINK + text if opened else text
    match = _FORMAT.fullmatch(text)
    if not match or len(_TAG.findall(text)) != 4:
        return False
    think, answer = match[1].strip(), match[2].strip()
    written = all(any(map(str.isalnum, part)) for part in (think, answer))
    return written and f"<think>{think}</think>" not in re.sub(r"(?<=>)\s+|\s+(?=<)", "", prompt)
