"""Supervised warm-up: the model learns to read single notes, to say where the red frame is, and how a call is written.

It also learns to read the result of a call. But the tool is seldom called, and seldom for the right note. That calls help, and
for which note, is left for GRPO to find out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlmkernels.demo.model import END_OF_TURN
from vlmkernels.demo.zoom_task import COLUMNS, FIND, LOCATE, READ, ROWS, ZoomEnvironment, draw_page, question
from vlmkernels.evaluate.digits import Scans
from vlmkernels.tools.functions import Tools

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
CHECK_EVERY, NUM_CHECKED = 10, 200  # steps, conversations
CALLS = 0.1  # share of the conversations with the tool in which it is called
FOUND = 0.25  # share of the calls that are for the note with the red frame on purpose; the others are for any note


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from.

    Args:
        messages: its messages.
        images: its images.
        has_tool: whether the prompt has the tool.
        last_only: whether only the last turn of the model is learned.
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    has_tool: bool = False
    last_only: bool = False


Maker = Callable[[Scans, np.random.Generator], Conversation]


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _zoomed(page: dict[str, Any], row: int, column: int) -> Image.Image:
    environment = ZoomEnvironment()
    environment.reset(**page)
    return environment.zoom(row, column)


def read_note(scans: Scans, rng: np.random.Generator) -> Conversation:
    """Return a conversation about a note at full resolution."""
    page = draw_page(scans, rng)
    return Conversation([*question(READ), _answer(page["answer"])], [_zoomed(page, page["row"], page["column"])])


def locate_frame(scans: Scans, rng: np.random.Generator) -> Conversation:
    """Return a conversation about the place of the red frame."""
    page = draw_page(scans, rng)
    answer = f"row {page['row']} column {page['column']}"
    return Conversation([*question(LOCATE), _answer(answer)], [page["image"].convert("RGB")])


def answer_directly(scans: Scans, rng: np.random.Generator, has_tool: bool = False) -> Conversation:
    """Return a conversation about a page, with the right answer and without a call."""
    page = draw_page(scans, rng)
    return Conversation([*question(FIND), _answer(page["answer"])], [page["image"].convert("RGB")], has_tool)


def call_tool(scans: Scans, rng: np.random.Generator) -> Conversation:
    """Return a conversation about a page with a call for any note. The answer is the number of that note."""
    page = draw_page(scans, rng)
    arguments = {"row": int(rng.integers(ROWS)) + 1, "column": int(rng.integers(COLUMNS)) + 1}
    if rng.random() < FOUND:
        arguments = {"row": page["row"], "column": page["column"]}
    messages = [
        *question(FIND),
        {**_answer(""), "tool_calls": [{"type": "function", "function": {"name": "zoom", "arguments": arguments}}]},
        {"role": "tool", "name": "zoom", "content": [{"type": "image"}]},
        _answer(page["numbers"][arguments["row"] - 1][arguments["column"] - 1]),
    ]
    return Conversation(messages, [page["image"].convert("RGB"), _zoomed(page, **arguments)], has_tool=True)


def read_result(scans: Scans, rng: np.random.Generator) -> Conversation:
    """Return a conversation with a call, from which only the answer is learned, so that the model does not call more often."""
    return replace(call_tool(scans, rng), last_only=True)


def call_or_answer(scans: Scans, rng: np.random.Generator) -> Conversation:
    """Return a conversation with the tool, which is seldom called."""
    return call_tool(scans, rng) if rng.random() < CALLS else answer_directly(scans, rng, has_tool=True)


class Stage(NamedTuple):
    """Train on the conversations of ``makers``, which are equally frequent, for ``min_steps`` to ``max_steps`` steps.

    The stage ends as soon as the model knows the share ``target`` of conversations that the first of ``makers`` makes.
    """

    name: str
    makers: tuple[Maker, ...]
    min_steps: int
    max_steps: int
    target: float


MIXTURE = (read_result, answer_directly, call_or_answer, call_or_answer, read_note, locate_frame)
STAGES = (
    Stage("numbers of single notes", (read_note,), 0, 300, 0.8),
    Stage("places of the red frame", (locate_frame, locate_frame, locate_frame, read_note), 0, 400, 0.95),
    Stage("results of calls", MIXTURE, 100, 300, 0.8),
)


def encode(processor: ProcessorMixin, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Return model inputs of conversations. ``labels`` is -100 except at the turns of the model with their ends."""
    tokenizer, schemas = processor.tokenizer, Tools(environment_factory=ZoomEnvironment).schemas()
    texts = [
        processor.apply_chat_template(c.messages, tokenize=False, tools=schemas if c.has_tool else None) for c in conversations
    ]
    images = [c.images for c in conversations]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    header, end = tokenizer("<|im_start|>assistant\n")["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TURN)
    labels = torch.full_like(inputs["input_ids"], -100)
    for ids, label, made in zip(inputs["input_ids"].tolist(), labels, conversations, strict=True):
        starts = [k + len(header) for k in range(len(ids)) if ids[k : k + len(header)] == header]
        for start in starts[-1:] if made.last_only else starts:
            stop = ids.index(end, start) + 1
            label[start:stop] = torch.tensor(ids[start:stop])
    return {**inputs, "labels": labels}


@torch.no_grad()
def known(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Return the share of conversations in which each token of the model is the most likely one."""
    logits = model.eval()(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(1).float().mean().item()


class Supervised:
    """Supervised training of a model.

    Args:
        model, processor: the model and its processor.
        scans: scans of digits to draw from.
        rng: random generator of the conversations.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, scans: Scans, rng: np.random.Generator):
        self.model, self.encode, self.scans, self.rng = model, partial(encode, processor), scans, rng
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def batch(self, makers: Sequence[Maker], size: int) -> dict[str, torch.Tensor]:
        """Return model inputs of ``size`` conversations."""
        return self.encode([makers[index % len(makers)](self.scans, self.rng) for index in range(size)])

    def step(self, makers: Sequence[Maker], size: int = BATCH_SIZE) -> float:
        """Train on ``size`` new conversations and return the loss."""
        loss = self.model.train()(**self.batch(makers, size)).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def warm_up(self) -> int:
        """Train through ``STAGES`` and return the number of steps."""
        steps = 0
        for stage in STAGES:
            checked = self.batch(stage.makers[:1], NUM_CHECKED)
            for step in range(1, stage.max_steps + 1):
                loss = self.step(stage.makers)
                if step % CHECK_EVERY and step < stage.max_steps:
                    continue
                share = known(self.model, checked)
                if share >= stage.target and step >= stage.min_steps:
                    break
            steps += step
            print(f"  {stage.name}: {step} steps, loss {loss:.2f}, {share:.0%} known", flush=True)
        return steps
