"""``vlmkernels demo --suite``: the benchmark shapes-and-digits, learnt by the demo's small model with a mixture of rewards."""

import re

import numpy as np
import torch

from vlmkernels.demo.model import END_OF_TURN, prompt_texts
from vlmkernels.evaluate import shapes_and_digits as suite

BATCH_SIZE = 64
ANSWER_TOKENS = 14  # a box of four numbers of two digits, and the end
SEEING_STEPS, ANSWERING_STEPS = 160, 400
CONTENTS = {kind: index for index, kind in enumerate([None, *suite.KINDS, *range(10)])}  # what a cell can hold


def words(rows) -> list[str]:
    """Every word of the questions and answers, with the space before it where there is one: a token each."""
    texts = (text for row in rows for text in (row["prompt"][0]["content"][1]["text"], row["answer"]))
    return sorted({word for text in texts for word in re.findall(" ?[A-Za-z]+", text)})


def crowded_scene(rng: np.random.Generator) -> tuple:
    """An image whose cells are empty, hold a shape or a digit, and what is in each, (9,) in the order of image tokens."""
    scans = suite._scans()["train"]
    draw = suite.Draw("seeing", int(rng.integers(2**31)))
    shapes, digits, contents = [], [], []
    for row in range(suite.GRID):
        for column in range(suite.GRID):
            kind = draw.of((None, "shape", "shape", "digit"))
            if kind == "shape":
                kind = draw.of(suite.KINDS)
                shapes.append(draw.shape(*kind, (column, row)))
            elif kind == "digit":
                index = draw.of(range(len(scans.digits)))
                digits.append((scans.pixels[index], (column, row)))
                kind = int(scans.digits[index])
            contents.append(CONTENTS[kind])
    return suite._paint(shapes, digits), contents


def learn_to_see(model, processor, steps: int, rng: np.random.Generator) -> float:
    """Train the vision tower alone to tell what is in each cell, as a pretrained one could. Returns the last accuracy."""
    tower = model.model.visual.train()
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(CONTENTS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1.5e-3)
    for _ in range(steps):
        images, contents = zip(*(crowded_scene(rng) for _ in range(BATCH_SIZE)), strict=True)
        inputs = processor.image_processor(images=list(images), return_tensors="pt")
        features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        logits, labels = head(features), torch.tensor(contents).flatten()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return (logits.argmax(1) == labels).float().mean().item()


def answer_loss(model, processor, rows: list[dict]) -> torch.Tensor:
    """Cross-entropy of the answers and the end of the turn: the mean over rows, each the mean over its tokens."""
    texts = [prompt + row["answer"] + END_OF_TURN for prompt, row in zip(prompt_texts(processor, rows), rows, strict=True)]
    inputs = processor(
        text=texts, images=[row["image"] for row in rows], padding=True, padding_side="left", return_tensors="pt"
    )
    lengths = torch.tensor([len(ids) + 1 for ids in processor.tokenizer([row["answer"] for row in rows])["input_ids"]])
    width = int(lengths.max())
    labels = inputs["input_ids"][:, -width:]
    is_answer = torch.arange(width) >= width - lengths.unsqueeze(1)
    logits = model(**inputs, logits_to_keep=width + 1).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return ((loss * is_answer).sum(1) / lengths).mean()


def learn_to_answer(model, processor, rows, steps: int, on_step=None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    for step in range(steps):
        batch = [rows[(step * BATCH_SIZE + i) % len(rows)] for i in range(BATCH_SIZE)]
        loss = answer_loss(model, processor, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step:
            on_step(step + 1, loss.item())
