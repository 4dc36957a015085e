"""Train the demo with planted faults, and without any, and note which rule of the doctor finds each fault at which step.

python bench/doctor_faults.py                       # all runs; writes bench/results/doctor.json
python bench/doctor_faults.py --only grey_images    # some runs
python bench/doctor_faults.py --fixtures            # also writes the trimmed runs that tests/doctor reads

Every run starts from the demo's warm-up with its seed, which is kept in the folder of the runs.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import RESULTS, commit, device_name
from PIL import Image
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.model import END_OF_TURN, build_model, build_processor
from vlmkernels.demo.run import GRPO, NUM_TRAIN
from vlmkernels.demo.warmup import encode, warm_up
from vlmkernels.evaluate.digits import compose, load_scans
from vlmkernels.rewards.answers import text_of
from vlmkernels.train import GRPOConfig, GRPOTrainer

FAULT_STEPS, HEALTHY_STEPS = 20, 150
HEALTHY_SEEDS = (0, 1, 2, 3, 4)


@dataclass
class Run:
    """What a fault may change before training begins."""

    model: PreTrainedModel
    processor: ProcessorMixin
    rows: list[dict]
    rewards: list[Any] = field(default_factory=lambda: ["exact_match", "cer"])
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[GRPOTrainer], None] = lambda trainer: None  # called before training


# Rewards with a fault


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def length(completions, **kwargs):
    return [len(text_of(completion)) / 16 for completion in completions]


def repetition(completions, **kwargs):
    texts = [text_of(completion) for completion in completions]
    return [sum(a == b for a, b in zip(text, text[1:], strict=False)) / 16 for text in texts]


def three_digits_format(completions, **kwargs):
    return [float(re.fullmatch(r"\d{3}", text_of(completion)) is not None) for completion in completions]


# Faults


def grey_images(run: Run) -> None:
    for row in run.rows:
        row["image"] = Image.new("RGB", row["image"].size, (128, 128, 128))


def constant_reward(run: Run) -> None:
    run.rewards = [constant]


def length_reward(run: Run) -> None:
    run.rewards, run.options = [length], {"max_completion_length": 16}


def repetition_reward(run: Run) -> None:
    run.rewards, run.options = [repetition], {"max_completion_length": 16}


def format_only(run: Run) -> None:
    run.rewards = [three_digits_format, {"name": "exact_match", "weight": 0.1}]


def bf16_weights(run: Run) -> None:
    run.model.bfloat16()
    run.options = {"learning_rate": 1e-6}


def large_learning_rate(run: Run) -> None:
    run.options = {"learning_rate": 100 * GRPO["learning_rate"]}


def kl_runaway(run: Run) -> None:
    run.options = {"learning_rate": 20 * GRPO["learning_rate"], "beta": 1e-3}


def short_completions(run: Run) -> None:
    run.options = {"max_completion_length": 2}


def failing_parser(run: Run) -> None:
    run.rewards = [{"name": "box_iou", "column": "box"}, {"name": "cer", "weight": 0.1}]


def one_prompt(run: Run) -> None:
    run.rows = [run.rows[2]] * len(run.rows)  # a number of three digits


def other_temperature(run: Run) -> None:
    def prepare(trainer: GRPOTrainer) -> None:
        engine = trainer.engine
        sample = type(engine).__call__

        class Hotter(type(engine)):
            def __call__(self, model, prompts, num_generations, temperature, *args, **kwargs):
                rollout = sample(self, model, prompts, num_generations, 2 * temperature, *args, **kwargs)
                return rollout

        engine.__class__ = Hotter

    run.prepare = prepare


def image_tokens(run: Run) -> None:
    head, names = run.model.get_output_embeddings().weight, ("<|image_pad|>", "7")
    image, digit = map(run.processor.tokenizer.convert_tokens_to_ids, names)
    with torch.no_grad():
        head[image] = head[digit]

    def prepare(trainer: GRPOTrainer) -> None:
        trainer.engine.sampling = trainer.engine.sampling.__class__(
            **{**vars(trainer.engine.sampling), "suppress_tokens": []}
        )

    run.prepare = prepare


def majority_answer(run: Run) -> None:
    """Train the model on one answer for all images."""
    optimizer, rng = torch.optim.AdamW(run.model.parameters(), lr=1e-3), np.random.default_rng(0)
    run.model.train()
    for _ in range(15):
        batch = encode(run.processor, [{**run.rows[k], "answer": "1"} for k in rng.integers(len(run.rows), size=64)])
        optimizer.zero_grad()
        run.model(**batch).loss.backward()
        optimizer.step()


class Fault(NamedTuple):
    """A fault: what is wrong, what plants it, and the rules that name it. The first of them to fire must be the first of all."""

    meaning: str
    plant: Callable[[Run], None]
    rules: tuple[str, ...]


FAULTS = {
    "grey_images": Fault("the processor gets grey images", grey_images, ("image_ignored",)),
    "constant_reward": Fault("the reward is 1 for every completion", constant_reward, ()),
    "length_reward": Fault("the reward is the length", length_reward, ()),
    "repetition_reward": Fault("the reward counts repeated characters", repetition_reward, ()),
    "format_only": Fault("the reward is that of the format, 0.1 times that of the task", format_only, ()),
    "bf16_weights": Fault("weights in bf16, learning rate 1e-6", bf16_weights, ()),
    "large_learning_rate": Fault("learning rate times 100", large_learning_rate, ()),
    "kl_runaway": Fault("learning rate times 20, beta 0.001", kl_runaway, ()),
    "short_completions": Fault("max_completion_length 2 for answers of up to 3 digits", short_completions, ()),
    "failing_parser": Fault("a reward that finds no answer in any completion", failing_parser, ()),
    "one_prompt": Fault("all rows of the dataset are the same", one_prompt, ()),
    "other_temperature": Fault("completions are sampled at twice the temperature", other_temperature, ()),
    "image_tokens": Fault("image tokens can be sampled, and are as likely as a digit", image_tokens, ()),
    "majority_answer": Fault("the model gives one answer to every image", majority_answer, ()),
}


def warm_model(seed: int, processor: ProcessorMixin, folder: Path) -> PreTrainedModel:
    """Return the demo's model after its warm-up, which runs once per seed."""
    model, path = build_model(processor, seed), folder / f"warm-{seed}.pt"
    if not path.exists():
        warm_up(model, processor, load_scans()[0], np.random.default_rng(seed))
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model


def train(output: Path, warm: Path, seed: int, steps: int, fault: Fault | None) -> None:
    processor = build_processor()
    rows = compose(load_scans()[0], NUM_TRAIN, np.random.default_rng(1000 + seed))
    for row in rows:
        row["box"] = [0, 0, 28, 28]
    run = Run(warm_model(seed, processor, warm), processor, rows)
    if fault is not None:
        fault.plant(run)
    args = GRPOConfig(
        **{**GRPO, **run.options},
        max_steps=steps,
        seed=seed,
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=4 * GRPO["num_generations"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(run.model, run.rewards, args, run.rows, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    run.prepare(trainer)
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("doctor-runs"))
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = {name: (0, FAULT_STEPS, fault) for name, fault in FAULTS.items()}
    runs |= {f"healthy-{seed}": (seed, HEALTHY_STEPS, None) for seed in HEALTHY_SEEDS}
    for name, (seed, steps, fault) in runs.items():
        if args.only and name not in args.only:
            continue
        train(args.folder / name, args.folder, seed, steps, fault)


if __name__ == "__main__":
    main()
