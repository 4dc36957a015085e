"""Compare GRPO with its extensions on shapes-and-digits, from the same supervised starts, at equal steps and equal cost.

python bench/ablation.py                                            # nine runs, on two cores
python bench/ablation.py --steps 2 --start_steps 2 2 --seeds 0      # a trial

Every run is evaluated on the test split several times while it trains. Two methods are compared after the same number of
optimizer steps, of sampled completions, and of CPU seconds of sampling and training (each job is one thread). For equal cost,
the last evaluation within the cost of the cheaper run counts, for both runs.

Predictions and models go to --output, where finished runs are not repeated. bench/results/ablation.json is written after each
run; GPU_OUT is another folder for it.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, commit, device_name
from transformers import TrainerCallback

from vlmkernels.demo import suite
from vlmkernels.evaluate.evaluation import ALL, Evaluation, EvaluationRows, Scoring
from vlmkernels.evaluate.predictions import Predictions

BASE = "GRPO"
# The arguments of GRPOConfig of each method.
METHODS: dict[str, dict[str, Any]] = {
    BASE: {},
    "dynamic sampling": {"dynamic_sampling": True},
    "perception": {"perception_loss_weight": 0.01, "mask_ratio": 0.6},
}
REPORTED = {ALL: "accuracy", **suite.METRICS}
COSTS = ("step", "completions", "seconds")
ROWS_PER_PROMPT = 3  # of the dataset, for every method: dynamic sampling needs more prompts than GRPO


class Evaluate(TrainerCallback):
    """Writes the predictions of the test split after every ``every`` steps, and notes what training has cost until then."""

    def __init__(self, processor: Any, folder: Path, every: int) -> None:
        self.processor, self.folder, self.every = processor, folder, every
        self.completions, self.paused, self.points = 0, 0.0, []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.process_time()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        if "loss" not in logs:
            return
        prompts = logs.get("dynamic_sampling/prompts_sampled", args.prompts_per_generation)
        self.completions += round(prompts) * args.num_generations
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        before = time.process_time()
        path = self.folder / f"step-{state.global_step}.jsonl"
        with torch.random.fork_rng(devices=[]):
            evaluation = suite.measure(model, self.processor, path, views=("image",))
        accuracy = evaluation.value(ALL, "accuracy")
        seconds = before - self.start - self.paused
        self.points.append(
            {"step": state.global_step, "completions": self.completions, "seconds": seconds, "accuracy": accuracy}
        )
        print(f"  {self.folder.name}: step {state.global_step}, accuracy {accuracy:.1%}, {seconds:.0f} s", flush=True)
        self.paused += time.process_time() - before


@contextmanager
def finished(path: Path):
    """Write a file under another name until it is complete."""
    partial = path.with_name(f".{path.name}")
    yield partial
    partial.rename(path)


def start(seed: int, settings: dict, output: Path) -> None:
    """Train the supervised start of a seed, unless it exists, and evaluate it."""
    torch.set_num_threads(1)
    if (path := output / f"start-{seed}.pt").exists():
        return
    model, processor = suite.new_model(seed)
    suite.start_supervised(model, processor, seed, *settings["start_steps"])
    suite.measure(model, processor, output / f"start-{seed}.jsonl", views=("image",))
    with finished(path) as partial:
        torch.save(model.state_dict(), partial)


def folder_of(method: str, seed: int, output: Path) -> Path:
    return output / f"{method.replace(' ', '-')}-{seed}"


def train(method: str, seed: int, settings: dict, output: Path) -> None:
    """Train one run, unless it is finished."""
    torch.set_num_threads(1)
    folder = folder_of(method, seed, output)
    if (folder / "result.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model, processor = suite.new_model(seed)
    model.load_state_dict(torch.load(output / f"start-{seed}.pt", weights_only=True))
    model.model.visual.requires_grad_(False).eval()  # as the supervised start leaves it
    evaluate = Evaluate(processor, folder, settings["evaluate_every"])
    options = {"rows_per_prompt": ROWS_PER_PROMPT, "callbacks": [evaluate], **METHODS[method]}
    log = suite.train(model, processor, seed, settings["steps"], folder, **options)
    names = ("kept", "filled", "rounds")
    means = {name: [e[key] for e in log if (key := f"dynamic_sampling/{name}") in e] for name in names}
    run = {"method": method, "seed": seed, "commit": commit(), "device": device_name(), "points": evaluate.points}
    run |= {name: sum(values) / len(values) for name, values in means.items() if values}
    with finished(folder / "result.json") as partial:
        partial.write_text(json.dumps(run))


def point_within(run: dict, cost: str, limit: float) -> dict | None:
    """The last evaluation of a run that costs at most ``limit``."""
    return next((point for point in reversed(run["points"]) if point[cost] <= limit), None)


def compared(ours: list[dict], theirs: list[dict], cost: str, read: Callable) -> dict | None:
    """The differences between runs of two methods with the same seeds at equal cost; None without an evaluation within it."""
    chosen: list[list] = [[], []]
    for pair in zip(ours, theirs, strict=True):
        limit = min(run["points"][-1][cost] for run in pair)
        for run, points in zip(pair, chosen, strict=True):
            points.append((run, point_within(run, cost, limit)))
    if any(point is None for points in chosen for _, point in points):
        return None
    mine, base = (read([(run, point["step"]) for run, point in points]) for points in chosen)
    differences = mine.minus(base)
    return {
        "costs": [[point[cost] for _, point in points] for points in chosen],
        "steps": [[point["step"] for _, point in points] for points in chosen],
        "metrics": {
            group: {
                "ours": mine.value(group, metric),
                "base": base.value(group, metric),
                **differences[group, metric]._asdict(),
            }
            for group, metric in REPORTED.items()
        },
    }


def summarize(settings: dict, output: Path) -> None:
    """Write the results of all finished runs."""
    paths = [folder_of(method, seed, output) / "result.json" for seed in settings["seeds"] for method in METHODS]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = EvaluationRows(suite.suite.ShapesAndDigits("test"), Scoring(metrics=tuple(dict.fromkeys(REPORTED.values()))))

    def evaluated(files: list[Path]) -> Evaluation:
        return Evaluation([Predictions.read(file) for file in files], rows)

    def read(points: list[tuple[dict, int]]) -> Evaluation:
        return evaluated([folder_of(run["method"], run["seed"], output) / f"step-{step}.jsonl" for run, step in points])

    by_method = {method: {run["seed"]: run for run in runs if run["method"] == method} for method in METHODS}
    comparisons = []
    for method in METHODS:
        seeds = sorted(by_method[method].keys() & by_method[BASE].keys())
        if method == BASE or not seeds:
            continue
        ours, theirs = ([by_method[name][seed] for seed in seeds] for name in (method, BASE))
        found = {cost: compared(ours, theirs, cost, read) for cost in COSTS}
        comparisons.append({"method": method, "base": BASE, "seeds": seeds, "at_equal": found})
    starts = [path for seed in settings["seeds"] if (path := output / f"start-{seed}.jsonl").exists()]
    before = evaluated(starts)
    content = {
        "suite": suite.suite.NAME,
        "version": suite.suite.VERSION,
        "settings": settings,
        "reported": REPORTED,
        "device": device_name(),
        "commit": ", ".join(sorted({run["commit"] for run in runs})),
        "start": {group: before.value(group, metric) for group, metric in REPORTED.items()},
        "runs": runs,
        "comparisons": comparisons,
    }
    RESULTS.mkdir(exist_ok=True)
    with finished(RESULTS / "ablation.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def check_settings(settings: dict, output: Path) -> None:
    """Write the settings to the output folder, or check that the runs in it have the same."""
    output.mkdir(parents=True, exist_ok=True)
    path, kept = output / "settings.json", {name: value for name, value in settings.items() if name != "seeds"}
    if path.exists() and json.loads(path.read_text()) != kept:
        raise SystemExit(f"--output must hold runs with the settings {kept}, got {path.read_text()} in {output}")
    path.write_text(json.dumps(kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run")
    parser.add_argument(
        "--start_steps",
        type=int,
        nargs=2,
        default=[suite.SEEING_STEPS, suite.ANSWER_STEPS],
        help="supervised steps, two stages",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=8, help="number of evaluations of each run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--processes", type=int, default=2, help="number of jobs at the same time, each on one core")
    parser.add_argument("--output", type=Path, default=Path("ablation-output"))
    args = parser.parse_args()
    settings = {"steps": args.steps, "start_steps": args.start_steps, "seeds": args.seeds}
    settings["evaluate_every"] = max(1, args.steps // args.evaluations)
    check_settings(settings, args.output)
    began, failed = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, max_tasks_per_child=1) as pool:
        jobs: dict[Future, tuple[str, int] | int] = {
            pool.submit(start, seed, settings, args.output): seed for seed in args.seeds
        }
        waiting = set(jobs)
        while waiting:
            done = next(as_completed(waiting))
            waiting.remove(done)
            job = jobs[done]
            if done.exception() is not None:
                print(f"FAILED {job}: {done.exception()}", flush=True)
                failed += 1
            elif isinstance(job, int):  # a start: its runs can begin
                for method in args.methods:
                    future = pool.submit(train, method, job, settings, args.output)
                    jobs[future] = method, job
                    waiting.add(future)
            else:
                summarize(settings, args.output)
                print(f"{job[0]}, seed {job[1]}: finished after {time.perf_counter() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
