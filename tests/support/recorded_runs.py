"""Short training runs whose output_dir the tests of records and reports read."""

import json
from pathlib import Path

from support import tiny
from support.training import FixedGenerate, config, length_reward, vowel_reward
from vlmkernels.train import GRPOTrainer


def build(folder, images="one", fixed=True, model=None, **options) -> GRPOTrainer:
    """A trainer with 4 completions of one prompt per micro-batch and 2 micro-batches per step."""
    args = config(folder, **options)
    data = tiny.rows(6, images)
    trainer = GRPOTrainer(
        model or tiny.vlm(), [length_reward, vowel_reward], args, data, data[:2], processing_class=tiny.processor()
    )
    if fixed:
        trainer.engine = FixedGenerate(trainer)
    return trainer


def complete_run(folder: Path) -> GRPOTrainer:
    """Evaluate and train with a reference, two iterations, evaluation, checkpoints and completions."""
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = build(folder, "mixed", save_strategy="steps", log_completions=True, **options)
    trainer.evaluate()
    trainer.train()
    return trainer


def log_entries(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
