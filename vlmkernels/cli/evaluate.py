"""``vlmkernels eval``: measure a model, or saved predictions, on a dataset."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmkernels.cli.flags import (
    DATASET,
    ENVIRONMENT,
    REWARD,
    REWARDS,
    TOOL,
    Help,
    Repeated,
    add_flag,
    environment_factory,
    json_list,
    parse_arguments,
    require_given,
    tool_functions,
    user_errors,
)

if TYPE_CHECKING:
    from vlmkernels.data.images import ImageLimits
    from vlmkernels.evaluate.evaluation import Comparison, Evaluation, EvaluationRows, Scoring
    from vlmkernels.evaluate.predictions import Predictions
    from vlmkernels.evaluate.sampling import Decoding, ToolUse
    from vlmkernels.report.curves import Point
    from vlmkernels.rewards import Rewards
    from vlmkernels.rollout.agent import Agent

USAGE = """vlmkernels eval --model PATH --dataset PATH [--ARGUMENT VALUE ...]
       vlmkernels eval --predictions FILE --dataset PATH [--ARGUMENT VALUE ...]"""
SUITE = "shapes-and-digits"
# Flags of other programs that evaluate models, and what to use instead.
ADVICE = {
    "max_new_tokens": "use --max_completion_length",
    "limit": "use --count",
    "num_samples": "use --count",
    "output_path": "use --output",
}


def build_parser() -> argparse.ArgumentParser:
    from vlmkernels.data.images import ImageLimits
    from vlmkernels.evaluate.metrics import names
    from vlmkernels.evaluate.predictions import VIEWS
    from vlmkernels.evaluate.tasks import HARNESSES, TASKS
    from vlmkernels.rewards.boxes import FRAMES
    from vlmkernels.tools.options import ToolOptions

    parser = argparse.ArgumentParser("vlmkernels eval", USAGE, "Measure a model's answers.", formatter_class=Help)
    model = "path of a model and its processor, or of adapters; repeat the flag to compare models, or checkpoints of a run"
    predictions = "file of saved predictions (JSON lines); repeat the flag for runs with different seeds"
    add_flag(parser, "model", action=Repeated, default=[], help=model)
    add_flag(parser, "predictions", action=Repeated, default=[], help=predictions)
    add_flag(parser, "dataset", help=f"{DATASET}; or {SUITE}, the built-in benchmark")
    add_flag(parser, "split", default="test", help="the split of --dataset, if it has several")
    add_flag(parser, "count", type=int, help="number of samples to evaluate, from the start of the dataset; by default all")
    scoring = parser.add_argument_group("metrics")
    task = f"task of every sample, if the dataset has no column 'task': {', '.join(TASKS)}"
    metric = f"a metric to report instead of the task's default metrics; repeat the flag for several: {names()}"
    vocabulary = "a JSON file with the objects that CHAIR looks for: a list of names, or a map of names to synonyms"
    add_flag(scoring, "task", help=task)
    add_flag(scoring, "metric", action=Repeated, default=[], help=metric)
    add_flag(scoring, "reward", action=Repeated, default=[], help=REWARD)
    add_flag(scoring, "rewards", type=json_list, default=[], help=REWARDS)
    add_flag(scoring, "match", default="vlmkernels", help=f"compare answers as this harness does: {', '.join(HARNESSES)}")
    add_flag(scoring, "by", help="column to group the results by; by default category if the dataset has it, else the task")
    add_flag(scoring, "frame", default="original", help=f"coordinate frame of the predicted boxes: {', '.join(FRAMES)}")
    add_flag(scoring, "vocabulary", help=vocabulary)
    add_flag(scoring, "confidence", type=float, default=0.95, help="confidence level of the intervals")
    add_flag(scoring, "baseline", help="file of saved predictions to compare with, sample by sample")
    add_flag(scoring, "log", help="metrics.jsonl or trainer_state.json of a run; draws its reward curves on the page")
    decoding = parser.add_argument_group("sampling")
    add_flag(decoding, "num_generations", type=int, default=1, help="completions per prompt")
    add_flag(decoding, "temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy decoding")
    add_flag(
        decoding,
        "top_p",
        type=float,
        default=1.0,
        help="sample from the most probable tokens whose probabilities add up to top_p",
    )
    add_flag(decoding, "top_k", type=int, default=0, help="sample from the top_k most probable tokens; 0 samples from all")
    add_flag(decoding, "max_completion_length", type=int, default=512, help="maximum number of tokens per completion")
    add_flag(decoding, "batch_size", type=int, default=8, help="completions sampled together")
    add_flag(decoding, "seed", type=int, default=0, help="seed of sampling")
    add_flag(decoding, "hide", choices=VIEWS[1:], help="also evaluate with the image replaced by gray, or removed")
    tools = parser.add_argument_group("tools")
    add_flag(tools, "tools", action=Repeated, default=[], help=TOOL)
    add_flag(tools, "environment", action=Repeated, default=[], help=ENVIRONMENT)
    add_flag(tools, "max_tool_calling_iterations", type=int, help="maximum number of turns whose calls are run; by default all")
    add_flag(tools, "tool_timeout", type=float, default=ToolOptions.tool_timeout, help="seconds before a tool call fails")
    add_flag(
        tools, "max_tool_images", type=int, default=ToolOptions.max_tool_images, help="maximum number of images of a result"
    )
    add_flag(tools, "tool_format", help="how the model writes calls; by default found in the chat template")
    limits = parser.add_argument_group("limits of images")
    add_flag(limits, "max_image_pixels", type=int, default=ImageLimits.max_pixels, help="maximum number of pixels of an image")
    add_flag(limits, "max_image_bytes", type=int, default=ImageLimits.max_bytes, help="maximum size of an image file in bytes")
    add_flag(limits, "allow_image_urls", action="store_true", help="fetch images whose path is an http or https URL")
    add_flag(parser, "samples", type=int, default=12, help="number of samples per group to show on the page")
    add_flag(
        parser, "output", default="eval.json", help="file for the metrics; .md, .html and predictions are written next to it"
    )
    return parser


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of an evaluation, which are read and checked before the model is loaded."""

    dataset: Sequence[dict[str, Any]]
    rows: "EvaluationRows"
    scoring: "Scoring"
    decoding: "Decoding"
    limits: "ImageLimits"
    rewards: "Rewards | None"
    curves: "dict[str, list[Point]]"
    agent: "Agent | None" = None

    @property
    def tools(self) -> "ToolUse | None":
        """The tools and the rewards that score their trajectories; None without tools."""
        from vlmkernels.evaluate.sampling import ToolUse

        return ToolUse(self.agent, self.rewards) if self.agent else None

    def evaluate(self, runs: "list[Predictions]") -> "Evaluation":
        """Compute the metrics of one or more runs of predictions."""
        from vlmkernels.evaluate.evaluation import Evaluation, reward_parts

        views = set.intersection(*(run.views for run in runs))
        parts = {view: reward_parts(self.rewards, self.rows, runs, view) for view in views}
        return Evaluation(runs, self.rows, self.scoring, parts)


def load(path: str, split: str, count: int | None) -> Sequence[dict[str, Any]]:
    """Load the dataset, or its first ``count`` rows."""
    from vlmkernels.data.dataset import load_dataset

    if path == SUITE:
        from vlmkernels.evaluate.shapes_and_digits import ShapesAndDigits

        return ShapesAndDigits(split, count)
    dataset = load_dataset(path, split)
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count must be 1 to {len(dataset)}, got {count}")
    return dataset.select(range(count)) if hasattr(dataset, "select") else dataset[:count]


def read_inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> EvaluationInputs:
    """Read the dataset and the other inputs that the flags name. Invalid arguments end the program with exit code 2."""
    from vlmkernels.data.dataset import column_names
    from vlmkernels.evaluate.evaluation import EvaluationRows, Scoring
    from vlmkernels.evaluate.report import curves_of_log
    from vlmkernels.evaluate.sampling import Decoding
    from vlmkernels.rewards import Rewards
    from vlmkernels.rewards.compose import environment_reward

    with user_errors(parser, "--dataset"):
        dataset = load(args.dataset, args.split, args.count)
        columns = column_names(dataset) if len(dataset) else []
    with user_errors(parser, "--vocabulary"):
        vocabulary = json.loads(Path(args.vocabulary).read_text()) if args.vocabulary else None
    with user_errors(parser, "--log"):
        curves = curves_of_log(args.log) if args.log else {}
    with user_errors(parser, "--tools"):
        agent = build_agent(args)
    names = [*args.reward, *args.rewards]
    if "answer" in columns and "task" not in columns and args.task is None and "exact_match" not in names:
        names.insert(0, "exact_match")
    with user_errors(parser):
        fields = {name: getattr(args, name) for name in ("task", "match", "by", "frame", "confidence")}
        scoring = Scoring(**fields, metrics=tuple(args.metric), vocabulary=vocabulary)
        decoding_flags = ("num_generations", "temperature", "max_completion_length", "top_p", "top_k", "seed", "batch_size")
        decoding = Decoding(**{name: getattr(args, name) for name in decoding_flags})
        if agent:
            names += map(environment_reward, agent.tools.reward_names)
        rewards = Rewards(names) if names else None
        if rewards:
            rewards.check_columns(columns, "dataset")
        limits = image_limits(args)
        rows = EvaluationRows(dataset, scoring, limits)
        return EvaluationInputs(dataset, rows, scoring, decoding, limits, rewards, curves, agent)


def image_limits(args: argparse.Namespace) -> "ImageLimits":
    """Return the limits of images that the flags describe."""
    from vlmkernels.data.images import ImageLimits

    return ImageLimits(args.max_image_pixels, args.max_image_bytes, args.allow_image_urls)


def build_agent(args: argparse.Namespace) -> "Agent | None":
    """Return the agent of the tools that the flags name, or None without tools. Its workers start before a model is loaded."""
    from vlmkernels.rollout.agent import Agent
    from vlmkernels.tools.functions import Tools
    from vlmkernels.tools.options import ToolOptions

    if not args.tools and not args.environment:
        return None
    tools = Tools(tool_functions(args.tools), environment_factory(args.environment))
    options = ToolOptions(
        max_tool_calling_iterations=args.max_tool_calling_iterations,
        tool_timeout=args.tool_timeout,
        max_tool_images=args.max_tool_images,
        limits=image_limits(args),
        tool_format=args.tool_format,
    )
    return Agent(tools, options)


def checked_processor(path: str, inputs: EvaluationInputs) -> Any:
    """Return the processor of the model at ``path`` after a check of all rows and tools with it. The weights are not loaded."""
    from vlmkernels.data.dataset import RowChecks, check_dataset
    from vlmkernels.models.families import family_of
    from vlmkernels.models.loading import embedding_rows, load_config, load_processor

    processor, checks = load_processor(path), RowChecks(num_embeddings=embedding_rows(load_config(path)))
    check_dataset(inputs.dataset, "dataset", processor, checks=checks, limits=inputs.limits)
    if inputs.agent:
        inputs.agent.prepare(processor, family_of(load_config(path)))
    return processor


def predict_to(
    output: Path, path: str, name: str, processor: Any, inputs: EvaluationInputs, views: tuple[str, ...]
) -> "Predictions":
    """Sample a model's predictions and write them to a file next to ``output``.

    The name of the file has the name of the model, and a hash of the sampling settings, so that an interrupted evaluation
    resumes from its own file.
    """
    import torch

    from vlmkernels.evaluate.sampling import predict, settings_of
    from vlmkernels.models.loading import load_model

    model = load_model(path).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = json.dumps(settings_of(model, inputs.dataset, inputs.decoding, inputs.tools), sort_keys=True)
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-")
    file = output.with_name(f"{output.stem}-{plain}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.jsonl")

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    options = {"views": views, "progress": progress, "limits": inputs.limits, "tools": inputs.tools}
    return predict(model, processor, inputs.dataset, inputs.decoding, file, **options)


def model_names(paths: list[str]) -> list[str]:
    """Return the shortest ends of paths that tell the models apart: the folder, and for checkpoints their run too."""

    def name(path: str, parts: int) -> str:
        return str(Path(*Path(path).parts[-parts:])) if Path(path).parts else path

    parts = [2 if re.fullmatch(r"checkpoint-\d+", Path(path).name) else 1 for path in paths]
    while len(set(names := [name(path, n) for path, n in zip(paths, parts, strict=True)])) < len(set(paths)):
        parts = [n + (names.count(own) > 1) for n, own in zip(parts, names, strict=True)]
    return names


def steps_of(paths: list[str]) -> list[int] | None:
    """Return the training step of each checkpoint; None unless all paths end with different steps."""
    found = [re.search(r"(\d+)$", Path(path).name) for path in paths]
    steps = [int(match[1]) for match in found if match]
    return steps if len(set(steps)) == len(paths) else None


def evaluations(args: argparse.Namespace, inputs: EvaluationInputs) -> "dict[str, Evaluation]":
    """Evaluate the saved predictions, or each model. Returns evaluations by the names of models."""
    from vlmkernels.evaluate.predictions import Predictions

    if args.predictions:
        return {", ".join(args.predictions): inputs.evaluate([Predictions.read(path) for path in args.predictions])}
    views = ("image", args.hide) if args.hide else ("image",)
    names = model_names(args.model)
    with closing(inputs.agent) if inputs.agent else nullcontext():
        processors = [checked_processor(path, inputs) for path in args.model]
        return {
            name: inputs.evaluate([predict_to(Path(args.output), path, name, processor, inputs, views)])
            for name, path, processor in zip(names, args.model, processors, strict=True)
        }


def compared(found: "dict[str, Evaluation]", baseline: "tuple[str, Evaluation] | None") -> "list[Comparison]":
    """Return the comparisons of each model with the baseline and with the models before it."""
    from vlmkernels.evaluate.evaluation import Comparison

    others = [(*baseline, *run) for run in found.items()] if baseline else []
    pairs = [(*other, *run) for other, run in combinations(found.items(), 2)]
    return [Comparison(name, run, other_name, other) for other_name, other, name, run in others + pairs]


def summary(evaluation: "Evaluation", rewards: list[str]) -> dict[str, Any]:
    """Return the summary at the top of the JSON file: accuracy, mean rewards, and lengths of completions."""
    import numpy as np
    import torch

    from vlmkernels.evaluate.evaluation import ALL
    from vlmkernels.record.summary import completion_metrics

    whole = evaluation.groups.get(ALL) or next(iter(evaluation.groups.values()))
    answers, names = whole.answers["image"], whole.metrics

    def mean(name: str) -> float | None:
        value = evaluation.value(whole.name, name)
        return None if np.isnan(value) else value

    completions = {}
    if "mean_length" in names and "truncation_rate" in names:
        lengths, truncated = torch.tensor(answers.lengths).flatten(), torch.tensor(answers.truncated).flatten()
        known = ~(lengths.isnan() | truncated.isnan())  # saved predictions of other programs may lack some values
        values = completion_metrics(lengths[known], truncated[known].bool()) if known.any() else {}
        completions = {k.removeprefix("completions/"): v for k, v in values.items()}
    return {
        "num_samples": len(evaluation.rows),
        "accuracy": mean("accuracy") if "accuracy" in names else None,
        "rewards": {name: mean(f"rewards/{name}") for name in rewards},
        "completions": completions,
    }


def to_result(
    args: argparse.Namespace,
    inputs: EvaluationInputs,
    found: "dict[str, Evaluation]",
    comparisons: "list[Comparison]",
) -> dict[str, Any]:
    """Return the content of the JSON file."""
    from vlmkernels.evaluate.report import differences_to_json, to_json

    last = list(found.values())[-1]
    result = {"model": args.model[-1] if args.model else None, "dataset": args.dataset}
    result |= summary(last, list(last.rewards.get("image", {})))
    result |= {"predictions": [str(run.path) for run in last.runs], "match": args.match, "decoding": inputs.decoding.settings()}
    if inputs.tools:
        result["tools"] = inputs.tools.settings()
    result |= to_json(last)
    if args.baseline:
        result["difference"] = differences_to_json(comparisons[len(found) - 1].differences)
    if len(found) > 1:
        steps = steps_of(args.model) or [None] * len(found)
        result["models"] = [
            {"model": path, "name": name, "step": step, **to_json(found[name])}
            for path, name, step in zip(args.model, found, steps, strict=True)
        ]
        result["comparisons"] = [
            {"model": c.name, "baseline": c.other_name, "difference": differences_to_json(c.differences)} for c in comparisons
        ]
    return result


def main(argv: list[str]) -> int:
    """Write metrics and page, print a summary, and return 0. Invalid arguments end the program with exit code 2."""
    parser = build_parser()
    args = parse_arguments(parser, argv, ADVICE)
    require_given(parser, args, "dataset")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("eval runs in one process and writes one file of predictions; do not start it with torchrun")
    if bool(args.model) == bool(args.predictions):
        parser.error("exactly one of --model and --predictions must be given")
    for flag, paths in (("--model", args.model), ("--predictions", args.predictions)):
        same = [os.path.realpath(path) for path in paths]
        if repeated := next((path for path, real in zip(paths, same, strict=True) if same.count(real) > 1), None):
            parser.error(f"{flag} must be a different path each time, got {repeated} again")
    if args.predictions and (args.tools or args.environment):
        parser.error("--tools and --environment need --model: saved predictions have been sampled")
    if args.hide and (args.tools or args.environment):
        parser.error(f"--hide must not be used with tools, which can return the image, got {args.hide}")
    if args.samples < 0:
        parser.error(f"--samples must be >= 0, got {args.samples}")
    output = Path(args.output)
    if output.suffix in (".html", ".md", ".jsonl") or output.is_dir() or args.output.endswith(("/", os.sep)):
        parser.error(
            f"--output must be the JSON file, next to which the .html, .md and .jsonl files are written, got {args.output}"
        )
    with user_errors(parser, "--output"):  # before the evaluation, which can take hours
        output.parent.mkdir(parents=True, exist_ok=True)

    from vlmkernels.evaluate.page import write_page
    from vlmkernels.evaluate.predictions import Predictions
    from vlmkernels.evaluate.report import curves_of, to_markdown, to_text
    from vlmkernels.record.files import write_atomic

    inputs = read_inputs(parser, args)
    with user_errors(parser, "--baseline"):
        baseline = (args.baseline, inputs.evaluate([Predictions.read(args.baseline)])) if args.baseline else None
    with user_errors(parser):
        found = evaluations(args, inputs)
        comparisons = compared(found, baseline)
        result = to_result(args, inputs, found, comparisons)
        steps = steps_of(args.model) if len(found) > 1 else None
        curves = inputs.curves | (curves_of(list(zip(steps, found.values(), strict=True))) if steps else {})
    last = list(found.values())[-1]
    output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_atomic(output.with_suffix(".md"), to_markdown(last, comparisons))
    title = f"{list(found)[-1]} on {Path(args.dataset).name}"
    count = len(next(iter(last.completions.values()))[0])
    samples = f"{len(inputs.rows)} sample{'s' * (len(inputs.rows) > 1)}"
    subtitle = f"{samples}, {count} completion{'s' * (count > 1)} each, compared as {args.match} does"
    page = output.with_suffix(".html")
    write_page(page, title, subtitle, last, comparisons=comparisons, curves=curves, samples_per_group=args.samples)
    print(f"{subtitle}\n{to_text(found)}")
    print(f"written to {output}, {output.with_suffix('.md')} and {page}")
    return 0
