"""``vlmkernels eval``."""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from vlmkernels.cli import DATASET, REWARD, REWARDS, Help, add_flag, json_list, user_errors

USAGE = """vlmkernels eval --model PATH --dataset PATH [--ARGUMENT VALUE ...]
       vlmkernels eval --predictions FILE --dataset PATH [--ARGUMENT VALUE ...]"""
SUITE = "shapes-and-digits"


def parser() -> argparse.ArgumentParser:
    from vlmkernels.data.images import DEFAULT
    from vlmkernels.evaluate.metrics import names
    from vlmkernels.evaluate.predictions import VIEWS
    from vlmkernels.evaluate.tasks import HARNESSES, TASKS
    from vlmkernels.rewards.boxes import FRAMES

    parser = argparse.ArgumentParser("vlmkernels eval", USAGE, "Measure a model's answers.", formatter_class=Help)
    add_flag(
        parser, "model", action="append", default=[], help="path of a model and its processor, or of adapters; again: a curve"
    )
    add_flag(
        parser, "predictions", action="append", default=[], help="saved predictions (JSON lines); again: runs of other seeds"
    )
    add_flag(parser, "dataset", required=True, help=f"{DATASET}; or {SUITE}, which is built in")
    add_flag(parser, "split", default="test", help="the split, where the dataset has several")
    add_flag(parser, "count", type=int, help="take the first samples of the dataset alone")
    scoring = parser.add_argument_group("what is measured")
    add_flag(scoring, "task", help=f"of every sample, where no column 'task' says it: {', '.join(TASKS)}")
    add_flag(scoring, "metric", action="append", default=[], help=f"in place of the task's own; again for more: {names()}")
    add_flag(scoring, "reward", action="append", default=[], help=REWARD)
    add_flag(scoring, "rewards", type=json_list, default=[], help=REWARDS)
    add_flag(scoring, "match", default="vlmkernels", help=f"compare as this harness does: {', '.join(HARNESSES)}")
    add_flag(scoring, "by", help="report by this column, by default category or the task")
    add_flag(scoring, "frame", default="original", help=f"of the predicted boxes: {', '.join(FRAMES)}")
    add_flag(scoring, "vocabulary", help="a JSON file with the objects CHAIR looks for: a list, or names with their synonyms")
    add_flag(scoring, "confidence", type=float, default=0.95, help="of the intervals")
    add_flag(scoring, "baseline", help="saved predictions to compare with, sample by sample")
    add_flag(scoring, "log", help="a trainer_state.json whose rewards are drawn too")
    decoding = parser.add_argument_group("what is sampled")
    add_flag(decoding, "num_generations", type=int, default=1, help="completions per prompt")
    add_flag(decoding, "temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    add_flag(
        decoding, "top_p", type=float, default=1.0, help="sample among the most probable tokens that hold this probability"
    )
    add_flag(decoding, "top_k", type=int, default=0, help="sample among this many most probable tokens; 0 = all")
    add_flag(decoding, "max_completion_length", type=int, default=512, help="the most tokens of a completion")
    add_flag(decoding, "batch_size", type=int, default=8, help="completions at a time")
    add_flag(decoding, "seed", type=int, default=0, help="of sampling")
    add_flag(decoding, "hide", choices=VIEWS[1:], help="measure again with the image grey, or none")
    limits = parser.add_argument_group("what images may be")
    add_flag(limits, "max_image_pixels", type=int, default=DEFAULT.max_pixels, help="the most pixels of an image")
    add_flag(limits, "max_image_bytes", type=int, default=DEFAULT.max_bytes, help="the most bytes of an image's file")
    add_flag(limits, "allow_image_urls", action="store_true", help="fetch images whose path is an http or https address")
    add_flag(parser, "samples", type=int, default=12, help="samples of each group on the page")
    add_flag(parser, "output", default="eval.json", help="where the metrics go; .md, .html and predictions go beside it")
    return parser


def load(path: str, split: str, count: int | None):
    """The dataset, or the first ``count`` rows of it."""
    from vlmkernels.data.samples import load_dataset
    from vlmkernels.ops.checks import require

    if path == SUITE:
        from vlmkernels.evaluate.shapes_and_digits import Split

        return Split(split, count)
    dataset = load_dataset(path, split)
    if count is None:
        return dataset
    require(1 <= count <= len(dataset), "count", f"be 1 to {len(dataset)}", count)
    return dataset.select(range(count)) if hasattr(dataset, "select") else dataset[:count]


def predict_to(output: Path, path: str, dataset, decoding, views: tuple[str, ...], limits):
    """The model's predictions, in a file beside ``output`` whose name is decided by what was sampled."""
    import torch

    from vlmkernels.data.samples import check_dataset
    from vlmkernels.evaluate.predictions import predict, settings_of
    from vlmkernels.models.loading import load_model, load_processor

    model = load_model(path).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(model.config._name_or_path)
    check_dataset(dataset, "dataset", processor, limits=limits)
    settings = json.dumps(settings_of(model, dataset, decoding), sort_keys=True)
    file = output.with_name(f"{output.stem}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.jsonl")

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{path}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return predict(model, processor, dataset, decoding, file, views, progress, limits)


def step_of(path: str, position: int) -> float:
    """The training step that a checkpoint's name tells, else its position."""
    match = re.search(r"(\d+)/?$", Path(path).name)
    return float(match[1]) if match else float(position)


def summary(evaluation, rewards: list[str]) -> dict:
    """The summary at the top of the JSON: accuracy, mean rewards, lengths."""
    import numpy as np
    import torch

    from vlmkernels.evaluate.evaluation import ALL
    from vlmkernels.record.summary import completion_metrics

    whole = evaluation.groups.get(ALL) or next(iter(evaluation.groups.values()))
    answers, names = whole.answers["image"], whole.metrics
    mean = lambda name: None if np.isnan(value := evaluation.value(whole.name, name)) else value  # noqa: E731
    completions = {}
    if "mean_length" in names and "truncation_rate" in names:
        lengths, truncated = torch.tensor(answers.lengths).flatten(), torch.tensor(answers.truncated).flatten().bool()
        completions = {k.removeprefix("completions/"): v for k, v in completion_metrics(lengths, truncated).items()}
    return {
        "num_samples": len(evaluation.rows),
        "accuracy": mean("accuracy") if "accuracy" in names else None,
        "rewards": {name: mean(f"rewards/{name}") for name in rewards},
        "completions": completions,
    }


def main(argv: list[str]) -> int:
    flags = parser()
    args = flags.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        flags.error("it runs in one process, not under torchrun: its predictions go to one file")
    if bool(args.model) == bool(args.predictions):
        flags.error("--model or --predictions must be given, one of them")

    from vlmkernels.data.images import ImageLimits
    from vlmkernels.data.samples import column_names
    from vlmkernels.evaluate.evaluation import Evaluation, Rows, Scoring, reward_parts
    from vlmkernels.evaluate.page import write_page
    from vlmkernels.evaluate.predictions import Decoding, Predictions
    from vlmkernels.evaluate.report import curves_of, curves_of_log, to_json, to_markdown
    from vlmkernels.rewards import Rewards

    output = Path(args.output)
    with user_errors(flags, "--dataset"):
        dataset = load(args.dataset, args.split, args.count)
        columns = column_names(dataset) if len(dataset) else []
    with user_errors(flags, "--vocabulary"):
        vocabulary = json.loads(Path(args.vocabulary).read_text()) if args.vocabulary else None
    with user_errors(flags, "--log"):
        curves = curves_of_log(args.log) if args.log else {}
    names = [*args.reward, *args.rewards]
    if "answer" in columns and "task" not in columns and args.task is None and "exact_match" not in names:
        names.insert(0, "exact_match")
    with user_errors(flags):
        fields = {name: getattr(args, name) for name in ("task", "match", "by", "frame", "confidence")}
        scoring = Scoring(**fields, metrics=tuple(args.metric), vocabulary=vocabulary)
        fields = ("num_generations", "temperature", "max_completion_length", "top_p", "top_k", "seed", "batch_size")
        decoding = Decoding(**{name: getattr(args, name) for name in fields})
        rewards = Rewards(names) if names else None
        if rewards:
            rewards.check_columns(columns, "dataset")
        limits = ImageLimits(args.max_image_pixels, args.max_image_bytes, args.allow_image_urls)
        rows = Rows(dataset, scoring, limits)

    def evaluation(runs: list[Predictions]) -> Evaluation:
        views = set.intersection(*(run.views for run in runs))
        parts = {view: reward_parts(rewards, rows, runs, view) for view in views} if rewards else None
        return Evaluation(runs, rows, scoring, parts)

    with user_errors(flags):
        if args.predictions:
            found = [(0.0, evaluation([Predictions.read(path) for path in args.predictions]))]
        else:
            views = ("image", args.hide) if args.hide else ("image",)
            found = [
                (step_of(path, place), evaluation([predict_to(output, path, dataset, decoding, views, limits)]))
                for place, path in enumerate(args.model)
            ]
        other = (args.baseline, evaluation([Predictions.read(args.baseline)])) if args.baseline else None
        last = found[-1][1]
        result = {
            "model": args.model[-1] if args.model else None,
            "dataset": args.dataset,
            **summary(last, rewards.names if rewards else []),
        }
        result |= {"predictions": [str(run.path) for run in last.runs], "match": args.match, "decoding": decoding.settings()}
        result |= to_json(last, other and other[1])
        if len(found) > 1:
            curves |= curves_of(found)
            result["steps"] = [{"step": step, **to_json(each)} for step, each in found]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    output.with_suffix(".md").write_text(to_markdown(last, other))
    title = f"{Path(args.model[-1]).name if args.model else ', '.join(args.predictions)} on {Path(args.dataset).name}"
    count = len(next(iter(last.completions.values()))[0])
    subtitle = f"{len(rows)} samples, {count} completion{'s' * (count > 1)} each, compared as {args.match} does"
    write_page(output.with_suffix(".html"), title, subtitle, last, other=other, curves=curves, samples_per_group=args.samples)
    print(subtitle)
    if result["accuracy"] is not None:
        print(f"accuracy (exact match): {100 * result['accuracy']:.1f} %")
    for name, value in result["rewards"].items():
        print(f"mean reward {name}: {'not scored' if value is None else f'{value:.4f}'}")
    print(f"written to {output}, {output.with_suffix('.md')} and {output.with_suffix('.html')}")
    return 0
