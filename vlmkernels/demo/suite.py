"""``vlmkernels demo --suite``: the benchmark shapes-and-digits, learnt by the demo's small model with a mixture of rewards.

The start is supervised, in the two steps by which such models are made. First images: the vision tower learns to put what is in
a cell where the words for it are among the token embeddings. Then answers: the text model learns the questions, the tower stays
as it is. Then GRPO, from rewards alone.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.model import END_OF_TURN, build_model, build_processor, prompt_texts
from vlmkernels.evaluate import shapes_and_digits as suite
from vlmkernels.evaluate.evaluation import Evaluation
from vlmkernels.evaluate.page import write_page
from vlmkernels.evaluate.predictions import Decoding, Predictions, predict
from vlmkernels.evaluate.report import curves_of_log, to_json, to_markdown
from vlmkernels.train import GRPOConfig, GRPOTrainer

BATCH_SIZE = 96
SEEING_STEPS, ANSWERING_STEPS = 160, 400
ANSWER_TOKENS = 14  # a box of four numbers of two digits, and the end

# A reward for each category, of the answers in a column of its name; None in the others leaves their samples out.
REWARDS = [
    {"log_as": category, "column": category, **reward}
    for category, reward in {
        "counting": {"name": "count", "soft": True},
        "colour": {"name": "exact_match"},
        "spatial": {"name": "exact_match"},
        "grounding": {"name": "iou"},
        "ocr": {"name": "cer"},
        "negation": {"name": "yes_no"},
    }.items()
]
GRPO = {
    "per_device_train_batch_size": 48 * 8,  # completions in a step
    "num_generations": 8,
    "max_completion_length": ANSWER_TOKENS,
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "scale_rewards": "batch",
}


class Rows(Sequence[dict]):
    """The rows of a split with the columns that ``REWARDS`` take."""

    def __init__(self, split: str):
        self.rows = suite.Split(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {**row, **{category: row["answer"] if category == row["category"] else None for category in suite.CATEGORIES}}
