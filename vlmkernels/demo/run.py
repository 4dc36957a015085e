"""Run the whole demo: data, model, warm-up, GRPO and results."""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.images import image_seconds, image_shares
from vlmkernels.demo.model import build_model, build_processor, read_numbers
from vlmkernels.demo.report import draw_curves, write_samples
from vlmkernels.demo.warmup import warm_up
from vlmkernels.env import version
from vlmkernels.evaluate.digits import MAX_DIGITS, compose, load_scans, save_rows
from vlmkernels.train import GRPOConfig, GRPOTrainer

NUM_TRAIN, NUM_TEST = 4800, 600  # numbers; training and test numbers are composed of different scans
MIN_GAIN, MIN_ACCURACY = 0.15, 0.80  # requirements for the demo to succeed, on the held-out numbers

GRPO = {
    "per_device_train_batch_size": 64 * 8,  # completions per step
    "num_generations": 8,
    "max_completion_length": MAX_DIGITS + 1,  # one token per digit, and the end-of-turn token
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    # With "group", dividing by the standard deviation of each group amplifies single lucky guesses at the longest numbers; the
    # model then stopped writing a third digit.
    "scale_rewards": "batch",
}


class PrintEvaluations(TrainerCallback):
    """Print a line at each evaluation."""

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


def build_trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    train: list[dict],
    test: list[dict],
    config: GRPOConfig,
) -> GRPOTrainer:
    """Build the trainer, with ``PrintEvaluations`` instead of the default printing callback."""
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=["exact_match", "cer"],
        args=config,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        callbacks=[PrintEvaluations()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_config(seed: int, steps: int, output: Path) -> GRPOConfig:
    """Build the configuration of the GRPO run. It evaluates greedy answers every 10 steps."""
    return GRPOConfig(
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


def curves(log_history: list[dict], accuracy_before: float) -> dict[str, list]:
    """Return the mean rewards of sampled completions and the accuracy on held-out numbers, each with its steps."""
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
    """List the requirements that the accuracies before and after GRPO do not meet."""
    requirements = {
        "GRPO must improve the held-out accuracy": after > before,
        f"GRPO must raise the held-out accuracy by at least {100 * MIN_GAIN:.0f} points": after - before >= MIN_GAIN,
        f"the held-out accuracy must reach {100 * MIN_ACCURACY:.0f} %": after >= MIN_ACCURACY,
    }
    return [requirement for requirement, is_met in requirements.items() if not is_met]


def accuracy(answers: list[str], rows: list[dict], digits: int | None = None) -> float:
    """Return the share of correct answers, over all numbers or over the numbers with ``digits`` digits."""
    pairs = [(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    return float(np.mean([answer == truth for answer, truth in pairs if digits in (None, len(truth))]))


@dataclass(frozen=True)
class Measured:
    """The measurements of a run of the demo. Answers are the model's answers to the held-out numbers."""

    answers_before: list[str]
    answers_after: list[str]
    log: list[dict]
    warmup_steps: int
    warmup_seconds: float
    train_seconds: float
    image_seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Median duration of a GRPO step in seconds."""
        return statistics.median(entry["step_time"] for entry in self.log if "step_time" in entry)


def to_metrics(measured: Measured, test: list[dict], seed: int, steps: int) -> dict:
    """Return the content of metrics.json."""
    before, after = accuracy(measured.answers_before, test), accuracy(measured.answers_after, test)
    shares = image_shares(measured.image_seconds, measured.step_seconds)
    lengths = range(1, MAX_DIGITS + 1)
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_before_by_digits": [accuracy(measured.answers_before, test, n) for n in lengths],
        "accuracy_after_by_digits": [accuracy(measured.answers_after, test, n) for n in lengths],
        "rules_broken": failures(before, after),
        "warmup_steps": measured.warmup_steps,
        "warmup_seconds": round(measured.warmup_seconds, 1),
        "train_seconds": round(measured.train_seconds, 1),
        "step_seconds": round(measured.step_seconds, 3),
        "image_seconds_per_step": {when: round(value, 3) for when, value in measured.image_seconds.items()},
        "image_share_of_step": {when: round(value, 3) for when, value in shares.items()},
        "seed": seed,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("vlmkernels", "torch", "transformers")},
        "grpo_config": {**GRPO, "max_steps": steps},
        "curves": curves(measured.log, before),
    }


def print_result(metrics: dict, output: Path) -> None:
    """Print accuracies, times, the paths of the results, and the requirements that are not met."""
    before, after = metrics["accuracy_before"], metrics["accuracy_after"]
    gain = 100 * (after - before)
    print(f"\nHeld-out accuracy (exact match): before GRPO {before:.1%}, after {after:.1%}, {gain:+.1f} points")
    warmup, train, total = metrics["warmup_seconds"], metrics["train_seconds"], metrics["total_seconds"]
    print(f"Time: warm-up {warmup:.0f} s, GRPO {train:.0f} s, total {total:.0f} s")
    shares = metrics["image_share_of_step"]
    milliseconds = {when: f"{1e3 * value:.0f} ms" for when, value in metrics["image_seconds_per_step"].items()}
    step = f"{1e3 * metrics['step_seconds']:.0f} ms"
    print(
        f"Images: {shares['after']:.0%} of a step ({milliseconds['after']} of {step}); with the processor and vision tower of"
    )
    print(f"transformers, and one image per completion, {shares['before']:.0%} ({milliseconds['before']})")
    print(f"Results: {output / 'curves.png'}, {output / 'samples.html'}, {output / 'metrics.json'}. Next:")
    print(f"  vlmkernels report {output}")
    print(f"  vlmkernels eval --model {output / 'model'} --dataset {output / 'test.jsonl'}")
    for requirement in metrics["rules_broken"]:
        print(f"FAILED {requirement}")


def run(seed: int, steps: int, output: Path) -> int:
    """Run the demo and write its results to ``output``.

    Returns:
        0 if GRPO improved the model as much as required, else 1.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small to benefit from more threads
    disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    train_scans, test_scans = load_scans()
    rng = np.random.default_rng(seed)
    test = compose(test_scans, NUM_TEST, np.random.default_rng(0))  # the same for every seed
    processor = build_processor()
    model = build_model(processor, seed)
    print("A small vision-language model learns to read handwritten numbers.\n")
    print(f"Model     the Qwen2.5-VL architecture, {model.num_parameters():,} random weights, seed {seed}")
    print(f"Data      {len(train_scans.digits)} scanned digits for training, {len(test_scans.digits)} others for testing,")
    print(f"          composed into numbers of one to {MAX_DIGITS} digits; {NUM_TEST} numbers are held out")
    print("\nWarm-up: supervised, cross-entropy on the answers", flush=True)
    warmup_start = time.perf_counter()
    warmup_steps = warm_up(model, processor, train_scans, rng)
    warmup_seconds = time.perf_counter() - warmup_start
    answers_before = read_numbers(model, processor, test)
    print(f"  {warmup_steps} steps in {warmup_seconds:.0f} s, held-out accuracy {accuracy(answers_before, test):.1%}")

    print("\nGRPO: no labels in the loss; two rewards, exact match and 1 - character error rate", flush=True)
    train = compose(train_scans, NUM_TRAIN, rng)
    trainer = build_trainer(model, processor, train, test, build_config(seed, steps, output))
    train_start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - train_start
    answers_after = read_numbers(model, processor, test)

    prompts = GRPO["per_device_train_batch_size"] // GRPO["num_generations"]
    images = image_seconds(processor, [row["image"] for row in train[:prompts]], GRPO["num_generations"])
    log = trainer.state.log_history
    measured = Measured(answers_before, answers_after, log, warmup_steps, warmup_seconds, train_seconds, images)
    metrics = to_metrics(measured, test, seed, steps)
    draw_curves(metrics, output / "curves.png")
    write_samples(metrics, test, answers_before, answers_after, output / "samples.html")
    save_rows(test, output / "test.jsonl")
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    metrics["total_seconds"] = round(time.perf_counter() - start, 1)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print_result(metrics, output)
    return 1 if metrics["rules_broken"] else 0
