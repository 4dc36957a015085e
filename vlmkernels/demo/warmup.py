"""Supervised warm-up: train on the answers until the model reads some numbers, so that rewards differ within groups."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from vlmkernels.demo.model import END_OF_TURN, prompt_texts, read_numbers
from vlmkernels.evaluate.digits import MAX_DIGITS, Scans, compose

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
CHECK_EVERY = 5  # steps
MAX_STEPS = 400  # per stage


class Stage(NamedTuple):
    """Train on numbers of up to ``max_digits`` digits until the model reads the share ``target`` correctly."""

    name: str
    max_digits: int
    target: float


STAGES = (Stage("one digit", 1, 0.5), Stage(f"one to {MAX_DIGITS} digits", MAX_DIGITS, 0.6))


def encode(processor: ProcessorMixin, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return model inputs of prompts and answers. ``labels`` is -100 except at the answer and the end-of-turn token."""
    texts = [prompt + row["answer"] + END_OF_TURN for prompt, row in zip(prompt_texts(processor, rows), rows, strict=True)]
    inputs = processor(text=texts, images=[row["image"] for row in rows], padding=True, return_tensors="pt")
    length = torch.tensor([len(row["answer"]) + 1 for row in rows])  # a digit is one token; padding is on the left
    width = inputs["input_ids"].shape[1]
    is_answer = torch.arange(width) >= width - length.unsqueeze(1)
    return {**inputs, "labels": inputs["input_ids"].where(is_answer, -100)}


def warm_up(model: PreTrainedModel, processor: ProcessorMixin, scans: Scans, rng: np.random.Generator) -> int:
    """Train ``model`` through ``STAGES``. Accuracy is measured on other numbers composed of training scans.

    Returns:
        The total number of steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = 0
    for stage in STAGES:
        checked = compose(scans, 300, rng, stage.max_digits)
        for step in range(1, MAX_STEPS + 1):
            model.train()
            batch = encode(processor, compose(scans, BATCH_SIZE, rng, stage.max_digits))
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % CHECK_EVERY == 0 or step == MAX_STEPS:
                answers = read_numbers(model, processor, checked)
                accuracy = np.mean([answer == row["answer"] for answer, row in zip(answers, checked, strict=True)])
                if accuracy >= stage.target:
                    break
        steps += step
        print(f"  {stage.name}: {step} steps, loss {loss.item():.2f}, {accuracy:.0%} of the numbers read correctly", flush=True)
    return steps
