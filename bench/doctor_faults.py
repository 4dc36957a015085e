"""Train the demo with planted faults, and without any, and note which rule of the doctor finds each fault at which step.

python bench/doctor_faults.py                       # all runs; writes bench/results/doctor.json
python bench/doctor_faults.py --only grey_images    # some runs
python bench/doctor_faults.py --recorded            # apply the rules to recorded runs again
python bench/doctor_faults.py --recorded --fixtures # and store them, trimmed, for the tests

Every run starts from the demo's warm-up with its seed, which is kept in the folder of the runs.
"""

import argparse
import json
import math
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import RESULTS, ROOT, commit, device_name
from PIL import Image
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.demo.model import build_model, build_processor
from vlmkernels.demo.run import GRPO, NUM_TRAIN
from vlmkernels.demo.warmup import encode, warm_up
from vlmkernels.doctor import PROBLEM, diagnose, read_run
from vlmkernels.doctor import Run as DoctorRun
from vlmkernels.doctor.callback import DoctorCallback
from vlmkernels.evaluate.digits import compose, load_scans
from vlmkernels.rewards.answers import text_of
from vlmkernels.rollout.generate import Generate
from vlmkernels.train import GRPOConfig, GRPOTrainer

FAULT_STEPS, DEMO_STEPS = 20, 150
HEALTHY = {0: DEMO_STEPS, 1: DEMO_STEPS, 2: 60, 3: 60, 4: 60}  # steps by seed
FOLDER = ROOT / "tests" / "support" / "doctor_runs"
# The metrics that rules read.
READ = (
    *("step", "epoch", "loss", "policy_loss", "grad_norm", "learning_rate", "entropy", "kl", "reward", "reward_*", "frac_*"),
    *("rewards/*/mean", "rewards/*/std", "rewards/*/unparsed", "completions/mean_length", "completions/clipped_ratio"),
    *("completions/frac_*", "image_use/*", "sampling/sampling_logp_difference/mean", "sampling/effective_sample_size"),
)


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
    return [len(text_of(completion)) / 32 for completion in completions]


def repetition(completions, **kwargs):
    texts = [text_of(completion) for completion in completions]
    return [sum(a == b for a, b in pairwise(text)) / 32 for text in texts]


def three_digits_format(completions, **kwargs):
    return [float(re.fullmatch(r"\d{3}", text_of(completion)) is not None) for completion in completions]


# Faults


def grey_images(run: Run) -> None:
    for row in run.rows:
        row["image"] = Image.new("RGB", row["image"].size, (128, 128, 128))


def constant_reward(run: Run) -> None:
    run.rewards = [constant]


def length_reward(run: Run) -> None:
    run.rewards, run.options = [length], {"max_completion_length": 32}


def repetition_reward(run: Run) -> None:
    run.rewards, run.options = [repetition], {"max_completion_length": 32}


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
    for row in run.rows:
        row["box"] = [0, 0, 28, 28]
    run.rewards = [{"name": "iou", "column": "box"}, {"name": "cer", "weight": 0.1}]


def one_prompt(run: Run) -> None:
    run.rows = [run.rows[2]] * len(run.rows)  # a number of three digits


def other_temperature(run: Run) -> None:
    class Hotter(Generate):
        def __call__(self, model, prompts, num_generations, temperature, *args, **kwargs):
            return super().__call__(model, prompts, num_generations, 2 * temperature, *args, **kwargs)

    def prepare(trainer: GRPOTrainer) -> None:
        trainer.engine.__class__ = Hotter

    run.prepare = prepare


def padding_tokens(run: Run) -> None:
    head, tokenizer = run.model.get_output_embeddings().weight, run.processor.tokenizer
    with torch.no_grad():
        head[tokenizer.pad_token_id] = head[tokenizer.convert_tokens_to_ids("7")]


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
    """A fault: what is wrong, what plants it, and the rules that name it, one of which must be the first to find a problem."""

    meaning: str
    plant: Callable[[Run], None]
    rules: tuple[str, ...]


FAULTS = {
    "grey_images": Fault("the processor gets grey images", grey_images, ("image-ignored",)),
    "constant_reward": Fault("the reward is 1 for every completion", constant_reward, ("reward-flat", "groups-without-spread")),
    "length_reward": Fault("the reward is the length", length_reward, ("reward-by-length",)),
    "repetition_reward": Fault("the reward counts repeated characters", repetition_reward, ("repetition",)),
    "format_only": Fault("the reward is that of the format, 0.1 times that of the task", format_only, ("format-not-task",)),
    "bf16_weights": Fault("weights in bf16, learning rate 1e-6", bf16_weights, ("updates-lost",)),
    "large_learning_rate": Fault("learning rate times 100", large_learning_rate, ("reward-collapse",)),
    "kl_runaway": Fault("learning rate times 20 with beta 0.001", kl_runaway, ("reward-collapse", "kl-runaway")),
    "short_completions": Fault("max_completion_length 2 for answers of up to 3 digits", short_completions, ("truncation",)),
    "failing_parser": Fault("a reward that finds no answer in any completion", failing_parser, ("unparsed-as-zero",)),
    "one_prompt": Fault("all rows of the dataset are the same", one_prompt, ("data-repeated",)),
    "other_temperature": Fault("completions are sampled at twice the temperature", other_temperature, ("sampling-mismatch",)),
    "padding_tokens": Fault("padding is as likely as a digit", padding_tokens, ("special-tokens",)),
    "majority_answer": Fault("the model gives one answer to every image", majority_answer, ("one-answer",)),
}


FIXTURES = (*FAULTS, "healthy-0", "healthy-1")


def warm_model(seed: int, processor: ProcessorMixin, folder: Path) -> PreTrainedModel:
    """Return the demo's model after its warm-up, which runs once per seed."""
    model, path = build_model(processor, seed), folder / f"warm-{seed}.pt"
    if not path.exists():
        warm_up(model, processor, load_scans()[0], np.random.default_rng(seed))
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model


class StopAfter(TrainerCallback):
    """Stops a run before its learning rate has followed the whole schedule of the demo."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.steps


def train(folder: Path, name: str, seed: int, steps: int, fault: Fault | None) -> None:
    """Train the demo and record it in ``folder / name``, with what the callback of ``diagnose=True`` found in found.json."""
    shutil.rmtree(folder / name, ignore_errors=True)
    processor = build_processor()
    rows = compose(load_scans()[0], NUM_TRAIN, np.random.default_rng(1000 + seed))
    run = Run(warm_model(seed, processor, folder), processor, rows)
    if fault is not None:
        fault.plant(run)
    args = GRPOConfig(
        **{**GRPO, **run.options},
        max_steps=DEMO_STEPS,
        seed=seed,
        output_dir=str(folder / name),
        use_cpu=True,
        logging_steps=1,
        diagnose=True,
        log_completions=True,
        num_completions_to_print=4 * GRPO["num_generations"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(run.model, run.rewards, args, run.rows, processing_class=processor, callbacks=[StopAfter(steps)])
    trainer.remove_callback(PrinterCallback)
    run.prepare(trainer)
    trainer.train()
    doctor = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DoctorCallback))
    (folder / name / "found.json").write_text(json.dumps(doctor.found))


def discover(run: DoctorRun) -> dict[str, dict]:
    """Return, by rule, what the doctor finds first when it reads the run after every step, in the order of discovery."""
    found: dict[str, dict] = {}
    for end, entry in enumerate(run.steps, 1):
        step = entry["step"]
        seen = {stored: groups for stored, groups in run.completions.items() if stored <= step}
        for finding in diagnose(replace(run, steps=run.steps[:end], completions=seen)):
            values = {"step": step, "severity": finding.severity, "evidence": finding.evidence}
            found.setdefault(finding.rule, values)
    return found


def result(folder: Path, name: str, seed: int, fault: Fault | None) -> dict:
    """Return the row of a run for doctor.json."""
    run = read_run(folder / name)
    found = discover(replace(run, steps=[entry for entry in run.steps if "loss" in entry]))
    problems = {rule: values for rule, values in found.items() if values["severity"] == PROBLEM}
    row = {"name": name, "seed": seed, "steps": max(entry["step"] for entry in run.steps), "found": found}
    if fault is None:
        reward = run.curve("reward")
        return {**row, "reward": [reward.start, reward.window()], "fault": None, "rule": None, "passed": not problems}
    first = min((values["step"] for values in problems.values()), default=math.inf)
    hits = [rule for rule in fault.rules if rule in problems and problems[rule]["step"] == first <= FAULT_STEPS]
    return {**row, "fault": fault.meaning, "rule": hits[0] if hits else None, "passed": bool(hits)}


def trimmed(run: DoctorRun, rule: str | None) -> dict:
    """Return what the rules read of a run, rounded: metrics by name, and the completions of a few steps without images.

    Args:
        rule: the rule that finds the fault of the run. Completions are left out if it finds the fault without them.
    """
    steps = [entry for entry in run.steps if "loss" in entry]
    steps = steps[:: max(len(steps) // 50, 1)]
    names = sorted({name for entry in steps for name in entry if any(fnmatchcase(name, pattern) for pattern in READ)})
    chosen = [step for step in sorted(run.completions) if step <= steps[-1]["step"]][-3:]
    if rule in {finding.rule for finding in diagnose(replace(run, completions={}))}:
        chosen = []
    return {
        "arguments": {name: run.arguments[name] for name in ("max_completion_length", "num_generations")},
        "metrics": {name: [_short(entry.get(name)) for entry in steps] for name in names},
        "completions": {step: [_without_images(group) for group in run.completions[step]] for step in chosen},
    }


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _without_images(group: dict) -> dict:
    """Replace the images of a group by names that differ as the images do, and round the numbers of its completions."""
    images = [[f"data:image/png;base64,{zlib.crc32(image.source.encode()):08x}", *image[1:]] for image in group["images"]]
    rows = [
        {
            "text": row["text"],
            "rewards": {name: _short(value) for name, value in row["rewards"].items()},
            "advantage": _short(row["advantage"]),
        }
        for row in group["completions"]
    ]
    return {**group, "images": images, "completions": rows}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("doctor-runs"), help="where runs are recorded [doctor-runs]")
    parser.add_argument("--only", nargs="+", help="names of runs; the results of others are kept")
    parser.add_argument("--recorded", action="store_true", help="only apply the rules to the runs that were recorded")
    parser.add_argument("--fixtures", action="store_true", help="write trimmed runs to tests/support/doctor_runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = {name: (0, FAULT_STEPS, fault) for name, fault in FAULTS.items()}
    runs |= {f"healthy-{seed}": (seed, steps, None) for seed, steps in HEALTHY.items()}
    rows = []
    for name, (seed, steps, fault) in runs.items():
        if not args.recorded and (not args.only or name in args.only):
            train(args.folder, name, seed, steps, fault)
        if not (args.folder / name / "found.json").exists():
            continue
        rows.append(row := result(args.folder, name, seed, fault))
        if args.fixtures and name in FIXTURES:
            FOLDER.mkdir(exist_ok=True)
            text = json.dumps(trimmed(read_run(args.folder / name), row["rule"]), separators=(",", ":"))
            (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{'pass' if row['passed'] else 'FAIL'}  {name}")
        for rule, values in row["found"].items():
            print(f"      {values['severity']} at step {values['step']}: {rule}: {values['evidence']}", flush=True)
    content = {"device": device_name(), "commit": commit(), "runs": rows}
    (RESULTS / "doctor.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
