"""Run ``vlmkernels demo --tools``: the demo's small model learns by GRPO to call a tool that shows a part of the image."""

import copy
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.model import build_model
from vlmkernels.demo.zoom_page import Outcome, write_page
from vlmkernels.demo.zoom_task import COLUMNS, DIGITS, ROWS, Pages, ZoomEnvironment, build_processor
from vlmkernels.demo.zoom_warmup import Supervised, answer_directly
from vlmkernels.env import version
from vlmkernels.evaluate.digits import Scans, load_scans
from vlmkernels.evaluate.sampling import Decoding, ToolUse, predict
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.agent import Agent
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.options import ToolOptions
from vlmkernels.train import GRPOConfig, GRPOTrainer

PAGES = 16  # per GRPO step
NUM_TEST = 400  # pages
MIN_GAIN = 0.30  # required gain of the accuracy with the tool over the best without it
ANSWER_TOKENS = DIGITS + 1  # with the end-of-turn token
EVALUATED_TOGETHER = 50  # pages
MAX_CALLS = 1  # turns of a trajectory that may call the tool
TOKENS = 40  # of a trajectory: a call of 14 tokens, its result and the answer

GRPO = {
    "per_device_train_batch_size": PAGES * 8,  # trajectories per step
    "num_generations": 8,
    "learning_rate": 2e-4,
    "warmup_steps": 5,
    "scale_rewards": "batch",
    "shuffle_dataset": False,  # pages are drawn at random
}


def calls_of(completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the arguments of the calls in a trajectory's messages."""
    return [call["function"]["arguments"] for message in completion for call in message.get("tool_calls") or ()]


def right_note(completions: list[list[dict[str, Any]]], row: list[int], column: list[int], **others: Any) -> list[float | None]:
    """Reward with weight 0, for the log: the share of calls that are for the note with the red frame. None without calls."""
    shares: list[float | None] = []
    for completion, place in zip(completions, zip(row, column, strict=True), strict=True):
        hits = [(call.get("row"), call.get("column")) == place for call in calls_of(completion)]
        shares.append(sum(hits) / len(hits) if hits else None)
    return shares


RIGHT_NOTE = {"name": right_note, "weight": 0.0}


class PrintSteps(TrainerCallback):
    """Print a line every ten steps: means over these steps."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10:
            return
        last = state.log_history[-10:]

        def mean(name: str) -> float:
            values = [entry[name] for entry in last if entry.get(name) is not None]
            return float(np.mean(values)) if values else 0.0

        tool = ""
        if any("tools/call_frequency" in entry for entry in last):
            right = mean("rewards/right_note/mean")
            tool = f"   calls {mean('tools/call_frequency'):.2f} per answer, {right:4.0%} of the right note"
        print(
            f"  step {state.global_step:3d}   right answers {mean('rewards/exact_match/mean'):4.0%}{tool}"
            f"   {time.perf_counter() - self.start:4.0f} s",
            flush=True,
        )


def train(
    model: PreTrainedModel, processor: ProcessorMixin, pages: Pages, has_tool: bool, seed: int, steps: int, output: Path
) -> list[dict[str, Any]]:
    """Train with GRPO. Returns the trainer's log."""
    config = GRPOConfig(
        **GRPO,
        max_completion_length=TOKENS if has_tool else ANSWER_TOKENS,
        max_tool_calling_iterations=MAX_CALLS,
        max_steps=steps,
        seed=seed,
        output_dir=str(output),
        use_cpu=True,
        logging_steps=1,
        log_completions=has_tool,
        num_completions_to_print=4 * GRPO["num_generations"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=["exact_match", RIGHT_NOTE] if has_tool else "exact_match",
        args=config,
        train_dataset=pages,
        processing_class=processor,
        callbacks=[PrintSteps()],
        environment_factory=ZoomEnvironment if has_tool else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def measure(
    name: str, model: PreTrainedModel, processor: ProcessorMixin, pages: Pages, agent: Agent | None, path: Path
) -> Outcome:
    """Evaluate greedy answers.

    Args:
        name: how the model was trained.
        agent: the tool; None: without it.
        path: file for the predictions.
    """
    path.unlink(missing_ok=True)
    decoding = Decoding(max_completion_length=TOKENS if agent else ANSWER_TOKENS, batch_size=EVALUATED_TOGETHER)
    use = None if agent is None else ToolUse(agent, Rewards([RIGHT_NOTE]))
    found = predict(model, processor, pages, decoding, path, tools=use)
    outcome = Outcome(name, agent is not None, [found.by_sample[index, "image"][0] for index in range(len(pages))], pages)
    calls = f", calls {outcome.calls:.2f} per answer, {outcome.right_calls or 0:.0%} of the right note" if agent else ""
    print(
        f"  {'with' if agent else 'without'} the tool, {name}: {outcome.accuracy.value:.1%} of the held-out pages{calls}",
        flush=True,
    )
    return outcome


def without_tool(
    model: PreTrainedModel, processor: ProcessorMixin, scans: Scans, test: Pages, seed: int, steps: int, output: Path
) -> list[Outcome]:
    """Measure copies of the model without the tool: as it is, after GRPO, and after supervised training.

    The training has as many steps as GRPO with the tool, and as many pages in a step as this has trajectories.
    """
    outcomes = [measure("after the warm-up", model, processor, test, None, output / "without-before.jsonl")]
    trained = copy.deepcopy(model)
    train(trained, processor, Pages(scans, steps * PAGES, seed), False, seed, steps, output / "without")
    outcomes.append(measure("after GRPO", trained, processor, test, None, output / "without-grpo.jsonl"))
    supervised = Supervised(copy.deepcopy(model), processor, scans, np.random.default_rng((seed, 1)))
    for _ in range(steps):
        supervised.step((answer_directly,), GRPO["per_device_train_batch_size"])
    name = "after supervised training"
    return [*outcomes, measure(name, supervised.model, processor, test, None, output / "without-supervised.jsonl")]


class Laps:
    """Seconds of the parts of a run, by name."""

    def __init__(self) -> None:
        self.start, self.seconds = time.perf_counter(), {}

    def end(self, name: str) -> None:
        """End the part ``name``, which began where the last one ended."""
        self.seconds[name] = round(time.perf_counter() - self.start - sum(self.seconds.values()), 1)

    def __str__(self) -> str:
        parts = {**self.seconds, "total": sum(self.seconds.values())}
        return ", ".join(f"{name} {value:.0f} s" for name, value in parts.items())


def write_results(outcomes: list[Outcome], log: list[dict[str, Any]], about: dict[str, Any], output: Path) -> None:
    """Write metrics.json and index.html. ``about``: seed, steps and seconds, added to metrics.json."""
    metrics = {
        **about,
        "outcomes": [outcome.to_json() for outcome in outcomes],
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("vlmkernels", "torch", "transformers")},
        "grpo_config": GRPO,
        "log": log,
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    subtitle = f"{NUM_TEST} held-out pages of scans that were not used in training, greedy decoding. Seed {about['seed']}."
    write_page(output / "index.html", subtitle, outcomes, log)


def run(seed: int, steps: int, output: Path) -> int:
    """Run the demo and write its results to ``output``.

    Returns:
        0 if GRPO with the tool raised the accuracy as much as required above the best without the tool, else 1.
    """
    laps = Laps()
    torch.set_num_threads(1)  # the matrices are too small to benefit from more threads
    disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    agent = Agent(Tools(environment_factory=ZoomEnvironment), ToolOptions(max_tool_calling_iterations=MAX_CALLS))
    scans, test_scans = load_scans()
    test = Pages(test_scans, NUM_TEST, 0)  # the same for every seed
    processor = build_processor()
    model = build_model(processor, seed)
    print("A small vision-language model learns to zoom.\n")
    print(f"Model     the Qwen2.5-VL architecture, {model.num_parameters():,} random weights, seed {seed}")
    print(f"Data      pages of {ROWS} x {COLUMNS} handwritten numbers, too small to be read; zoom(row, column) shows one")
    print("\nWarm-up: supervised, on single notes, on places, and on answers that seldom call the tool", flush=True)
    Supervised(model, processor, scans, np.random.default_rng(seed)).warm_up()
    before = measure("after the warm-up", model, processor, test, agent, output / "before.jsonl")
    laps.end("warm-up")

    print(f"\nThe best without the tool: {steps} steps of GRPO, and of supervised training", flush=True)
    outcomes = without_tool(model, processor, scans, test, seed, steps, output)
    laps.end("without the tool")

    print(f"\nGRPO with the tool, {steps} steps: the reward is 1 for a right answer; means of the last ten steps", flush=True)
    log = train(model, processor, Pages(scans, steps * PAGES, seed), True, seed, steps, output)
    after = measure("after GRPO", model, processor, test, agent, output / "after.jsonl")
    agent.close()
    laps.end("GRPO with the tool")

    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    best = max(outcomes, key=lambda outcome: outcome.accuracy.value)
    gain = after.accuracy.value - best.accuracy.value
    about = {"seed": seed, "steps": steps, "gain": gain, "best_without_tool": best.name, "seconds": laps.seconds}
    write_results([*outcomes, before, after], log, about, output)
    print(f"\nHeld-out accuracy: without the tool at most {best.accuracy.value:.1%} ({best.name}), with the tool")
    print(f"{before.accuracy.value:.1%} before GRPO and {after.accuracy.value:.1%} after it, {100 * gain:+.1f} points")
    print(f"Time: {laps}")
    print(f"Results: {output / 'index.html'}, {output / 'metrics.json'}. Next:")
    print(f"  vlmkernels report {output}")
    if gain >= MIN_GAIN:
        return 0
    print(f"FAILED the accuracy with the tool must be at least {100 * MIN_GAIN:.0f} points above the best without it")
    return 1
