"""The demo from beginning to end: data, model, warm-up, GRPO, results."""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.images import image_seconds, image_shares
from vlmkernels.demo.model import build_model, build_processor, read_numbers
from vlmkernels.demo.report import draw_curves, write_samples
from vlmkernels.demo.warmup import warm_up
from vlmkernels.env import version
from vlmkernels.evaluate.digits import MAX_DIGITS, compose, load_scans, save_rows
from vlmkernels.train import GRPOConfig, GRPOTrainer

NUM_TRAIN, NUM_TEST = 4800, 600  # numbers, composed of different scans
MIN_GAIN, MIN_ACCURACY = 0.15, 0.80  # what GRPO must reach on the test

GRPO = {
    "per_device_train_batch_size": 64 * 8,  # completions in a step
    "num_generations": 8,
    "max_completion_length": MAX_DIGITS + 1,  # a token per digit and the end
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    # Not "group": dividing by a group's own deviation enlarges the lone lucky guesses of the longest numbers, and the model
    # unlearned to write a third digit.
    "scale_rewards": "batch",
}


class Progress(TrainerCallback):
    """A line at each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        rewards = [entry["reward"] for entry in state.log_history if "reward" in entry]
        print(
            f"  step {state.global_step:4d} of {state.max_steps}   reward {np.mean(rewards[-10:]):.2f} of 2"
            f"   held-out accuracy {metrics['eval_rewards/exact_match/mean']:6.1%}"
            f"   {time.perf_counter() - self.start:4.0f} s",
            flush=True,
        )


def build_trainer(model, processor, train: list[dict], test: list[dict], seed: int, steps: int, output: Path) -> GRPOTrainer:
    config = GRPOConfig(
        **GRPO,
        max_steps=steps,
        seed=seed,
        output_dir=str(output),
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=10,
        per_device_eval_batch_size=NUM_TEST,
        num_generations_eval=1,
        eval_temperature=0.0,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=4 * GRPO["num_generations"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=["exact_match", "cer"],
        args=config,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def curves(log_history: list[dict], accuracy_before: float) -> dict[str, list]:
    """Mean rewards of the sampled completions per step, and held-out accuracy."""
    train = [entry for entry in log_history if "reward" in entry]
    held_out = [(entry["step"], entry["eval_rewards/exact_match/mean"]) for entry in log_history if "eval_reward" in entry]
    return {
        "step": [entry["step"] for entry in train],
        "exact_match": [round(entry["rewards/exact_match/mean"], 4) for entry in train],
        "cer": [round(entry["rewards/cer/mean"], 4) for entry in train],
        "held_out_step": [0, *(step for step, _ in held_out)],
        "held_out_accuracy": [accuracy_before, *(accuracy for _, accuracy in held_out)],
    }


def failures(before: float, after: float) -> list[str]:
    """The rules that the result breaks."""
    rules = {
        "GRPO must improve the held-out accuracy": after > before,
        f"GRPO must raise the held-out accuracy by at least {100 * MIN_GAIN:.0f} points": after - before >= MIN_GAIN,
        f"the held-out accuracy must reach {100 * MIN_ACCURACY:.0f} %": after >= MIN_ACCURACY,
    }
    return [rule for rule, holds in rules.items() if not holds]


def run(seed: int, steps: int, output: Path) -> int:
    start = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small to share between cores
    disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    train_scans, test_scans = load_scans()
    rng = np.random.default_rng(seed)
    test = compose(test_scans, NUM_TEST, np.random.default_rng(0))  # the same for every seed
    processor = build_processor()
    model = build_model(processor, seed)
    print("A small vision-language model learns to read numbers written by hand.\n")
    print(f"Model     the Qwen2.5-VL architecture, {model.num_parameters():,} random weights, seed {seed}")
    print(f"Data      {len(train_scans.digits)} scanned digits to train on, {len(test_scans.digits)} others for the test,")
    print(f"          composed into numbers of one to {MAX_DIGITS} digits, {NUM_TEST} of them held out")
    print("\nWarm-up: supervised, cross-entropy on the answers", flush=True)

    def accuracy(answers: list[str], digits: int | None = None) -> float:
        """Share of the held-out numbers (of that many digits) that were read without a mistake."""
        pairs = [(answer, row["answer"]) for answer, row in zip(answers, test, strict=True)]
        return float(np.mean([answer == truth for answer, truth in pairs if digits in (None, len(truth))]))

    warmup_start = time.perf_counter()
    warmup_steps = warm_up(model, processor, train_scans, rng)
    warmup_seconds = time.perf_counter() - warmup_start
    answers_before = read_numbers(model, processor, test)
    before = accuracy(answers_before)
    print(f"  {warmup_steps} steps in {warmup_seconds:.0f} s, held-out accuracy {before:.1%}")

    print("\nGRPO: no labels in the loss, two rewards: exact match, and 1 - character error rate", flush=True)
    train = compose(train_scans, NUM_TRAIN, rng)
    trainer = build_trainer(model, processor, train, test, seed, steps, output)
    train_start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - train_start
    answers_after = read_numbers(model, processor, test)
    after = accuracy(answers_after)

    prompts = GRPO["per_device_train_batch_size"] // GRPO["num_generations"]
    images = image_seconds(processor, [row["image"] for row in train[:prompts]], GRPO["num_generations"])
    step_seconds = statistics.median(entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry)
    shares = image_shares(images, step_seconds)

    lengths = range(1, MAX_DIGITS + 1)
    broken = failures(before, after)
    metrics = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_before_by_digits": [accuracy(answers_before, n) for n in lengths],
        "accuracy_after_by_digits": [accuracy(answers_after, n) for n in lengths],
        "rules_broken": broken,
        "warmup_steps": warmup_steps,
        "warmup_seconds": round(warmup_seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "step_seconds": round(step_seconds, 3),
        "image_seconds_per_step": {when: round(value, 3) for when, value in images.items()},
        "image_share_of_step": {when: round(value, 3) for when, value in shares.items()},
        "seed": seed,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("vlmkernels", "torch", "transformers")},
        "grpo_config": {**GRPO, "max_steps": steps},
        "curves": curves(trainer.state.log_history, before),
    }
    draw_curves(metrics, output / "curves.png")
    write_samples(metrics, test, answers_before, answers_after, output / "samples.html")
    save_rows(test, output / "test.jsonl")
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    metrics["total_seconds"] = round(time.perf_counter() - start, 1)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    gain = 100 * (after - before)
    print(f"\nHeld-out accuracy (exact match): before GRPO {before:.1%}, after {after:.1%}, {gain:+.1f} points")
    print(f"Time: warm-up {warmup_seconds:.0f} s, GRPO {train_seconds:.0f} s, all {metrics['total_seconds']:.0f} s")
    milliseconds = {when: f"{1e3 * value:.0f} ms" for when, value in images.items()}
    print(f"Images: {shares['after']:.0%} of a step ({milliseconds['after']} of {1e3 * step_seconds:.0f}); with transformers'")
    print(f"processor and tower, and an image for every completion, {shares['before']:.0%} ({milliseconds['before']})")
    print(f"Look at {output / 'curves.png'}, {output / 'samples.html'}, {output / 'metrics.json'}; go on with")
    print(f"  vlmkernels report {output}")
    print(f"  vlmkernels eval --model {output / 'model'} --dataset {output / 'test.jsonl'}")
    for rule in broken:
        print(f"FAILED {rule}")
    return 1 if broken else 0
