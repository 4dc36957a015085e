"""Conversations in the formats that people use, and with the keys that Arrow fills in."""

import copy

import datasets
import pytest
from support import tiny

from vlmkernels.data.conversations import normalized, text_of_parts, without_none
from vlmkernels.data.samples import prompt_text

TEXT = {"type": "text", "text": "what?"}
SLOT = {"type": "image"}


def content_of(content):
    return normalized([{"role": "user", "content": content}])[0]["content"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("what?", [TEXT]),
        ("", [{"type": "text", "text": ""}]),
        ([], []),
        (["what?", {"type": "image"}], [TEXT, SLOT]),
        ({"type": "text", "text": "what?"}, [TEXT]),
        ([{"text": "what?"}], [TEXT]),
        ([{"type": "input_text", "text": "what?"}], [TEXT]),
        ([{"type": "text", "text": "what?", "image": None, "image_url": {"url": None}}], [TEXT]),
        ([{"type": "text", "text": "what?", "cache_control": {"type": "ephemeral"}}], [TEXT]),
        ([{"type": "image", "image": None, "text": None}], [SLOT]),
        ([{"type": "image", "text": ""}], [SLOT]),
        ([{"type": "image", "image": {"bytes": None, "path": None}}], [SLOT]),
        ([{"image": "a.png"}], [{"type": "image", "image": "a.png"}]),
        ([{"type": "image", "path": "a.png"}], [{"type": "image", "image": "a.png"}]),
        ([{"type": "image", "url": "https://a/b.png"}], [{"type": "image", "image": "https://a/b.png"}]),
        ([{"type": "image", "base64": "iVBO"}], [{"type": "image", "image": "data:;base64,iVBO"}]),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], [{"type": "image", "image": "a.png"}]),
        ([{"type": "input_image", "image_url": "a.png"}], [{"type": "image", "image": "a.png"}]),
        ([{"image_url": {"url": "a.png", "detail": "low"}}], [{"type": "image", "image": "a.png"}]),
        ([{"video": ["a.png"]}], [{"type": "video", "video": ["a.png"]}]),
        ([{"type": "thinking", "thinking": "hm", "text": None}], [{"type": "thinking", "thinking": "hm"}]),
    ],
    ids=str,
)
def test_content_in_every_form(content, parts):
    before = copy.deepcopy(content)
    assert content_of(content) == parts
    assert content == before
    assert content_of(parts) == parts  # a normalized content stays as it is


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be a string or a list of messages, got None"),
        ({"role": "user", "content": "?"}, "prompt must be a string or a list of messages, got {'role'"),
        ([], r"prompt must have at least one message, got \[\]"),
        (["what?"], r"prompt\[0\] must be a message with role and content, got 'what\?'"),
        ([{"content": "?"}], r"prompt\[0\] must have a role, got the keys content"),
        ([{"role": None, "content": "?"}], r"prompt\[0\] must have a role, got the keys content"),
        ([{"role": "", "content": "?"}], r"prompt\[0\] must have a role, got ''"),
        ([{"from": "human", "value": "?"}], r"prompt\[0\] must have a role, got the keys from, value"),
        ([{"role": "user"}], r"prompt\[0\].content must be a string or a list of parts, got None"),
        (
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": None}],
            r"\[1\].content .* None",
        ),
        ([{"role": "user", "content": 5}], r"prompt\[0\].content must be a string or a list of parts, got 5"),
        ([{"role": "tool", "content": {"degrees": 5}}], r"\[0\].content must have a type, or .*, got the keys degrees"),
        ([{"role": "user", "content": [7]}], r"prompt\[0\].content\[0\] must be a string or a part with a type, got 7"),
        ([{"role": "user", "content": [{}]}], r"content\[0\] must have a type, or one of .*, got an empty dict"),
        ([{"role": "user", "content": [{"text": "a", "image": "b"}]}], r"must have a type, or .*, got the keys text, image"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string, got None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"content\[0\].text must be a string, got 5"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\[0\].type must be one of text, .*, got 'audio'"),
        ([{"role": "user", "content": [{**TEXT, "image": "a.png"}]}], "must have the value of one text and of nothing else"),
        ([{"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}], "one image .*, got the keys image, url"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_invalid_conversations_are_named(prompt, message):
    with pytest.raises((TypeError, ValueError), match=message):
        normalized(prompt)


def test_keys_that_arrow_fills_in_are_removed():
    """datasets gives every dict of a list the keys of all others, also within tool calls."""
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}
    prompt = [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": None, "tool_calls": [call, {"type": "function", "function": {"name": "stop"}}]},
        {"role": "tool", "name": "zoom", "content": "done"},
    ]
    stored = datasets.Dataset.from_list([{"prompt": prompt}])[0]["prompt"]
    assert stored[0]["tool_calls"] is None
    expected = without_none(prompt)
    for message in expected:
        message["content"] = [{"type": "text", "text": message["content"]}] if "content" in message else []
    assert normalized(stored) == normalized(prompt) == expected
    assert prompt_text(stored) == "user: find it\nassistant: \ntool: done"


def test_values_of_parts_are_not_copied():
    image = tiny.image(0)
    part = content_of([{"type": "image", "image": image}])[0]
    assert part["image"] is image
    assert text_of_parts({"role": "user", "content": [part, TEXT, {"type": "thinking", "thinking": "hm"}]}) == "what?"
