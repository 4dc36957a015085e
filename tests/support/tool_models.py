"""A tiny model that calls a tool in every turn but the last, its processor, the tool, and rows of a dataset."""

import math
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from support import tiny_families

END = "<|im_end|>"
HEADER = "assistant\n"  # the last token before a turn of the model
# Texts that are one token each, so that conversations are short.
_WORDS = (
    *("<tool_call>\n", "\n</tool_call>", "<tool_response>\n", "\n</tool_response>", "system\n", "user\n", "assistant\n"),
    *('{"name": "', '", "arguments": {"index": ', "}}", "zoom", "describe", "look ", "crop ", "saw ", "hm "),
)
TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}{% for message in messages %}{% set role = 'user' if message.role == 'tool' else message.role %}\
{% if message.role != 'tool' or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>{{ role }}
{% endif %}{% if message.role == 'tool' %}<tool_response>
{% endif %}{% if message.content is string %}{{ message.content }}{% elif message.content %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\
{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% if message.role == 'tool' %}{{ '\\n</tool_response>' }}{% endif %}\
{% if message.role != 'tool' or loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# How the tokenizer parses a turn of the model.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def picture(index: int) -> Image.Image:
    """Noise, wider for odd indices."""
    size = (32, 32 * (1 + index % 2), 3)
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8))


def zoom(index: int) -> list:
    """Return a part of the image, and for index 3 two parts.

    Args:
        index: which part.
    """
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    parts = [{"type": "text", "text": f"crop {index}"}, {"type": "image", "image": picture(100 + index)}]
    return [*parts, {"type": "image", "image": picture(200 + index)}] if index == 3 else parts


def describe(index: int) -> str:
    """Describe a part of the image.

    Args:
        index: which part.
    """
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    return f"crop {index}"


class Microscope:
    """An environment with the tool ``zoom``. It counts its calls since ``reset``; the count is its reward."""

    def __init__(self) -> None:
        self.calls = 0

    def reset(self, **row) -> None:
        self.calls = 0

    def zoom(self, index: int) -> list:
        """Return a part of the image, and for index 3 two parts.

        Args:
            index: which part.
        """
        self.calls += 1
        return zoom(index)

    def get_reward(self) -> float:
        return float(self.calls)


class ToolModel(NamedTuple):
    model: torch.nn.Module
    processor: object
    tool: object
    rows: list[dict]


@cache
def tool_model(family: str = "qwen2_5_vl", turns: int = 3, images: bool = True) -> ToolModel:
    """Train a model of ``tiny_families`` to call a tool, in less than ten seconds. Callers must not change it.

    Its greedy completion of row k (of 4) has ``turns`` turns, which call the tool with index k, k + 1, ..., and then answer.
    If sampled, half of its completions call the tool with other indices or answer at once.

    Args:
        family: a name in ``tiny_families.BUILDERS``.
        turns: the number of turns of the model.
        images: whether the tool, ``zoom``, returns text and images, and rows have an image; otherwise it is ``describe``, which
            returns text. The model also answers rows whose images were removed.
    """
    torch.manual_seed(0)
    case = tiny_families.BUILDERS[family]()
    model, processor, tool = case.model, case.processor, zoom if images else describe
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.add_special_tokens(
        {"eos_token": END, "extra_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(list(_WORDS))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    processor.chat_template = tokenizer.chat_template = TEMPLATE.replace("IMAGE", case.image)
    tokenizer.response_template = RESPONSE
    rows = [_row(index, images) for index in range(4)]
    _train(model, processor, tool, rows, turns)
    return ToolModel(model.eval(), processor, tool, rows)


def _row(index: int, images: bool) -> dict:
    row = {"prompt": [{"role": "user", "content": f"look {index}"}]}
    return row | {"images": [picture(index)]} if images else row


def _messages(row: dict, tool, indices: list[int], answer: int) -> list[dict]:
    """A conversation in which the tool is called with each of ``indices``."""
    text = row["prompt"][0]["content"]
    parts = [{"type": "image", "image": image} for image in row.get("images", ())]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    for index in indices:
        call = {"type": "function", "function": {"name": tool.__name__, "arguments": {"index": index}}}
        thought = [{"type": "text", "text": "hm " * (answer % 2)}]
        messages.append({"role": "assistant", "content": thought, "tool_calls": [call]})
        result = tool(index)
        parts = [{"type": "text", "text": result}] if isinstance(result, str) else result
        messages.append({"role": "tool", "name": tool.__name__, "content": parts})
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": f"saw {answer}"}]}]


def _train(model, processor, tool, rows: list[dict], turns: int) -> None:
    """Train on the greedy conversation of each row, with more weight, and two others; with and without its images."""
    conversations, weights = [], []
    for k, row in enumerate(rows):
        usual = list(range(k, k + turns - 1))
        for shown in [row, {"prompt": row["prompt"]}] if "images" in row else [row]:
            for indices, weight in ((usual, 4.0), ([k + 4, *usual[1:]], 1.0), ([], 1.0)):
                conversations.append(_messages(shown, tool, indices, k))
                weights.append(weight)
    inputs, is_target = _encode(processor, tool, conversations)
    labels, is_target, weight = inputs["input_ids"][:, 1:], is_target[:, 1:], torch.tensor(weights).unsqueeze(1)
    is_greedy = is_target & (weight == max(weights))
    features = []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(500):
        with _encodes_once(model, features):
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if logps[is_greedy].min() > math.log(0.6):  # 4 / 6 at the end of training
            return
        optimizer.zero_grad()
        (-(logps * weight)[is_target].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise RuntimeError(f"{type(model).__name__} did not learn its conversations")


@contextmanager
def _encodes_once(model, features: list):
    """Keep the image features of the first forward pass in ``features``: the vision tower, most of the work, is not trained."""
    encode = getattr(model.model, "get_image_features", None)
    if encode is None:
        yield
        return

    @torch.no_grad()
    def get_image_features(*args, **kwargs):
        if not features:
            features.append(encode(*args, **kwargs))
        return features[0]

    with patch.object(model.model, "get_image_features", get_image_features):
        yield


def _encode(processor, tool, conversations: list[list[dict]]) -> tuple[dict, torch.Tensor]:
    """The inputs of the model, and which of their tokens it writes."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False) for messages in conversations]
    parts = [[part for message in messages for part in message["content"]] for messages in conversations]
    images = [[part["image"] for part in each if part["type"] == "image"] for each in parts]
    media = {"images": images} if any(images) else {}
    inputs = dict(processor(text=texts, padding=True, return_tensors="pt", **media))
    header = torch.tensor(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
    is_target = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for ids, target in zip(inputs["input_ids"], is_target, strict=True):
        for start in range(len(header), len(ids)):
            if torch.equal(ids[start - len(header) : start], header):
                stop = start + int((ids[start:] == tokenizer.eos_token_id).int().argmax())
                target[start : stop + 1] = True
    return inputs, is_target
