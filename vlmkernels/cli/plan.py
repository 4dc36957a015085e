"""``vlmkernels plan``: estimate time and memory of a training step before running it."""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from vlmkernels.cli.flags import Help, add_flag, json_list, parse_arguments, user_errors
from vlmkernels.data.resolution import ResolutionSchedule
from vlmkernels.plan.calibration import calibrate
from vlmkernels.plan.fit import Fit, fit, train_arguments
from vlmkernels.plan.machine import MACHINES, Machine
from vlmkernels.plan.shape import HUB, MODELS, ModelShape, published
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import ENGINES, OPTIMIZERS, PARALLEL, PRECISIONS, WEIGHTS, StepTokens, Workload

# Fields of Workload that are flags -> help text, and the valid values if there are only a few.
FLAGS = {
    "prompts": ("number of prompts per step, over all GPUs", None),
    "group_size": ("completions per prompt", None),
    "prompt_tokens": ("text tokens per prompt", None),
    "completion_tokens": ("mean number of tokens per completion", None),
    "images": ("images per prompt", None),
    "image_tokens": ("tokens per image; by default computed from its size, if the model's configuration determines them", None),
    "gpus": ("number of training GPUs", None),
    "parallel": ("data parallelism of the training GPUs", PARALLEL),
    "lora_r": ("rank of LoRA adapters on the decoder's linear layers; 0 trains the whole model", None),
    "freeze_vision": ("freeze the vision tower", None),
    "reference": ("add the KL term to the loss, which needs a forward pass of the reference model", None),
    "old": ("compute old log-probabilities in a separate pass, for several optimizer steps per generation batch", None),
    "perception_loss_weight": ("weight of the perception terms; above 0, the loss also runs with masked images", None),
    "text_before_images": ("text tokens before the first image, which passes with masked images do not repeat", None),
    "image_use_steps": ("optimizer steps between measurements of image use; by default never", None),
    "teacher_weights": ("precision of the teacher's stored parameters", PRECISIONS),
    "checkpointing": ("recompute activations in the backward pass (activation checkpointing)", None),
    "activation_offloading": ("keep activations in host memory until the backward pass", None),
    "optim": ("the optimizer: moments of the dtype of the parameters, or in 8 bits", OPTIMIZERS),
    "microbatch_tokens": ("maximum number of tokens per forward and backward pass; by default no limit", None),
    "engine": ("rollout engine: transformers or vLLM on the training GPUs, or a vLLM server on other GPUs", ENGINES),
    "server_gpus": ("number of GPUs of the vLLM server", None),
    "precision": ("precision of matrix products; by default the machine's", PRECISIONS),
    "weights": ("precision of the stored parameters; fp32 with bf16 products is mixed precision, nf4 is QLoRA", WEIGHTS),
    "reward_seconds": ("seconds that the reward functions take for the whole batch", None),
}


def size(text: str) -> tuple[int, int]:
    """Parse "WIDTHxHEIGHT" or one side. argparse replaces the ValueError for any other text with its own message."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or found[1])


def memory_size(text: str) -> float:
    """Parse "24GB" or "16GiB" to bytes. A number without a unit is in GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]i?B)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a size above 0 in MB, MiB, GB, GiB, TB or TiB, such as 24GB, got {text!r}")
    prefix, *binary = (found[2] or "GB").upper().removesuffix("B")
    return float(found[1]) * (1024 if binary else 1000) ** " KMGT".index(prefix)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vlmkernels plan",
        "vlmkernels plan --model MODEL [--ARGUMENT VALUE ...]",
        "Estimate the time and memory of each phase of a GRPO step before running it, and what limits them. See docs/scale.md.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    machine = f"the device: {', '.join(MACHINES)} (data sheets), or a file written by --calibrate; by default h100, or rtx-4090"
    machine += " with --fit of at most 32 GB"
    fitted = "find a configuration that fits into this memory, such as 24GB or 16GiB; arguments that are set do not change"
    schedule = "plan an image resolution schedule, as in vlmkernels train: a JSON list of {step, min_pixels, max_pixels}"
    calibrated = "measure this machine's CPU and plan for it; with a path, save the measurement there for --machine"
    share = "run each prompt once per group: true, false, or auto (true if the model supports it)"
    add_flag(parser, "model", required=True, help=f"the model: {', '.join(MODELS)}, or the path of a model or its config.json")
    teacher = "the teacher of distillation: as --model; by default none"
    add_flag(parser, "teacher", help=teacher)
    add_flag(parser, "fit", type=memory_size, help=fitted)
    add_flag(parser, "machine", help=machine)
    add_flag(parser, "calibrate", nargs="?", const=True, help=calibrated)
    add_flag(parser, "image_size", type=size, default="896", help="size of an image in pixels, WIDTHxHEIGHT or one side")
    add_flag(parser, "share_prefix", choices=("auto", "true", "false"), default="auto", help=share)
    for field in fields(Workload):
        if field.name not in FLAGS:
            continue
        text, choices = FLAGS[field.name]
        text += f": {', '.join(choices)}" if choices else ""
        default = None if field.default is MISSING or field.name == "precision" else field.default
        if field.type is bool or field.type == "bool":
            add_flag(parser, field.name, action="store_true", help=text)
        else:
            kind = type(default) if default is not None and not choices else None if choices else int
            add_flag(parser, field.name, type=kind, choices=choices and tuple(choices), default=default, help=text)
    add_flag(parser, "image_resolution_schedule", type=json_list, help=schedule)
    add_flag(parser, "max_steps", type=int, help="number of optimizer steps, with --image_resolution_schedule")
    add_flag(parser, "json", action="store_true", help="print JSON")
    return parser


def _count(number: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} "


def _params(number: int) -> str:
    return _count(number).strip().replace("G", "B")  # billions, as in the names of models


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table with the first and the last column left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *middle, last = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in middle), last[0].ljust(last[1])]
        return "  ".join(cells).rstrip()

    return [line(head), *map(line, rows)]


def _describe_workload(found: Plan) -> list[str]:
    work, shape, machine, tokens = found.work, found.shape, found.machine, found.tokens
    tower = f", {_params(shape.vision_params)} of them in its vision tower" if shape.vision else ""
    lora = f"{'QLoRA' if work.weights == 'nf4' else 'LoRA'} of rank {work.lora_r}"
    trained = lora if work.lora_r else "all but the tower" if work.frozen_vision else "all parameters"
    devices = f"{work.gpus} x {machine.name}" + (f" ({work.parallel})" if work.gpus > 1 else "")
    server = f" on {work.server_gpus} other GPUs" if work.engine == "vllm_server" else ""
    unshared = Workload(**asdict(work) | {"share_prefix": False, "microbatch_tokens": None})
    unshared_tokens = StepTokens.from_workload(shape, unshared).passed
    of_images = work.images * shape.vision.image_tokens(work.width, work.height) if shape.vision else 0
    shared = f"; {unshared_tokens:,} without prefix sharing" if work.share_prefix else ", without prefix sharing"
    of_loss = found.loss_tokens.passed
    masked = f"; {of_loss:,} in {found.loss_tokens.packs} for the loss, with masked images" if of_loss != tokens.passed else ""
    teacher = found.teacher
    taught = (
        [] if teacher is None else [f"teacher {teacher.name}: {_params(teacher.params)} parameters in {work.teacher_weights}"]
    )
    return [
        f"{shape.name}: {_params(shape.params)} parameters{tower}",
        *taught,
        f"{devices}, {work.precision} products, {work.weights} weights, training {trained}; sampling by {work.engine}{server}",
        f"rates: {machine.source}",
        f"{work.prompts} prompts x {work.group_size} completions of {work.completion_tokens} tokens; a prompt has"
        f" {tokens.prompt:,} tokens, {of_images:,} of them for {work.images} image(s) of {work.width} x {work.height}",
        f"a pass over the batch of one GPU: {tokens.passed:,} tokens in {tokens.packs} micro-batch(es){shared}{masked}",
    ]


def to_text(found: Plan) -> str:
    """Format a plan for a terminal."""
    rows = [
        (
            phase.name,
            f"{phase.tokens:,.0f}" if phase.tokens else "",
            f"{_count(phase.flops)}FLOP" if phase.flops else "",
            f"{_count(phase.traffic)}B" if phase.traffic else "",
            f"{_count(phase.wire)}B" if phase.wire else "",
            _seconds(phase.seconds),
            f"{100 * phase.seconds / found.seconds:.0f} %",
            phase.limit if phase.seconds else "",
        )
        for phase in found.phases
    ]
    rows.append(("step", "", "", "", "", _seconds(found.seconds), "", ""))
    head = ("phase, per GPU", "tokens", "operations", "memory", "received", "time", "share", "limited by")
    lines = [*_describe_workload(found), "", *_table(head, rows)]
    total = sum(found.memory.values())
    items = sorted(found.memory.items(), key=lambda item: -item[1])
    held = [(name, f"{size / 2**30:.2f} GiB", f"{100 * size / total:.0f} %", "") for name, size in items]
    held.append(("total", f"{total / 2**30:.2f} GiB", "", f"of {found.machine.memory / 2**30:.1f} GiB"))
    lines += ["", *_table((f"peak memory ({found.moment})", "", "", ""), held)]
    if found.work.activation_offloading:
        lines.append(f"activations in host memory: {_gib(found.host_memory)}")
    return "\n".join([*lines, "", limits(found)])


def limits(found: Plan) -> str:
    """Return a short description of what limits the step."""
    slowest = max(found.phases, key=lambda phase: phase.seconds)
    share = f"{100 * slowest.seconds / found.seconds:.0f} % of the step is {slowest.name}, limited by {slowest.limit}."
    item = max(found.memory, key=lambda name: found.memory[name])
    if found.fits:
        return f"It fits. {share} The largest item in memory is: {item}."
    missing = sum(found.memory.values()) - found.machine.memory
    return f"It does not fit: {missing / 2**30:.1f} GiB are missing ({found.moment}); the largest item is: {item}. {share}"


def fit_to_text(found: Fit, model: str, teacher: str | None = None) -> str:
    """Format the result of ``fit`` for a terminal."""
    budget, best, lines = _gib(found.plan.machine.memory), found.plan, []
    for name, smallest in found.smaller.items():
        item = max(smallest.memory, key=lambda item: smallest.memory[item])
        need = _gib(sum(smallest.memory.values()))
        lines.append(f"does not fit: {name} (at least {need}, {smallest.moment}; the largest item is: {item})")
    if not best.fits:
        need = _gib(sum(best.memory.values()))
        lines += ["", f"Nothing fits into {budget}. The smallest configuration, {found.level.name}, needs {need}:", ""]
        return "\n".join([*lines, to_text(best)])
    lines += [f"fits into {budget}: {found.level.name}", *(f"compromise: {text}" for text in found.compromises), ""]
    return "\n".join([*lines, to_text(best), "", command(found, model, teacher)])


def command(found: Fit, model: str, teacher: str | None = None) -> str:
    """Return the command line of ``vlmkernels train`` for a configuration that fits, with the launcher for several GPUs."""
    work, program = found.plan.work, "vlmkernels train"
    if work.gpus > 1:
        launcher = f"accelerate launch --config_file configs/{work.parallel}.yaml --num_processes {work.gpus}"
        program = f"{launcher} -m vlmkernels.cli train"
    names = [name and HUB.get(published(name) or "", name) for name in (model, teacher)]
    arguments = train_arguments(found.plan, names[0], resized=found.level.scale < 1, teacher=names[1])
    flags = [f"--{name} {shlex.quote(value)}" for name, value in arguments.items()]
    flags[1:1] = ["--dataset train.jsonl", "--reward exact_match"]
    return " \\\n    ".join([f"{program} {flags[0]}", *flags[1:]])


def schedule_costs(
    shape: ModelShape,
    work: Workload,
    machine: Machine,
    entries: list,
    max_steps: int | None,
    teacher: ModelShape | None = None,
) -> dict[str, Any]:
    """Return the cost of each entry of an image resolution schedule, in total, and with the last size at every step.

    Raises:
        ValueError: the schedule is invalid, the model has no images of its own size, or max_steps is not above its last step.
    """
    schedule = ResolutionSchedule.from_list(entries)
    if shape.vision is None or not work.images or shape.vision.side or shape.vision.chosen or work.image_tokens:
        raise ValueError("image_resolution_schedule must be None for a model whose images do not keep their size")
    if max_steps is None or max_steps <= schedule.last.step:
        raise ValueError(f"max_steps must be above the last step of the schedule, {schedule.last.step}, got {max_steps}")
    ends = [*(entry.step for entry in schedule.entries[1:]), max_steps]
    rows = []
    for entry, end in zip(schedule.entries, ends, strict=True):
        pixels = work.width * work.height
        limited = max(min(pixels, entry.max_pixels or pixels), entry.min_pixels or 0)
        side = (limited / pixels) ** 0.5
        sized = replace(work, width=max(1, round(side * work.width)), height=max(1, round(side * work.height)))
        found = plan(shape, sized, machine, teacher)
        row = {"step": entry.step, "steps": end - entry.step, "width": sized.width, "height": sized.height}
        row |= {"prompt_tokens": found.tokens.prompt, "seconds": found.seconds, "memory": sum(found.memory.values())}
        rows.append(row)
    total = sum(row["steps"] * row["seconds"] for row in rows)
    return {"entries": rows, "seconds": total, "constant_seconds": max_steps * rows[-1]["seconds"]}


def schedule_to_text(costs: dict[str, Any]) -> str:
    """Format the result of ``schedule_costs`` for a terminal."""
    head = ("from step", "steps", "image", "tokens of a prompt", "step time", "peak memory")
    rows = [
        (
            str(row["step"]), f"{row['steps']:,}", f"{row['width']} x {row['height']}", f"{row['prompt_tokens']:,}",
            _seconds(row["seconds"]), _gib(row["memory"]),
        )
        for row in costs["entries"]
    ]  # fmt: skip
    share = costs["seconds"] / costs["constant_seconds"]
    total = f"{costs['seconds'] / 3600:.2f} h in total, {share:.2f} times the {costs['constant_seconds'] / 3600:.2f} h"
    return "\n".join([*_table(head, rows), f"{total} with the last size at every step"])


def to_json(found: Plan) -> str:
    """Format a plan as JSON."""
    return json.dumps(contents(found), indent=1)


def fit_to_json(found: Fit, model: str, teacher: str | None = None) -> str:
    """Format the result of ``fit`` as JSON."""
    needs = {
        name: {"bytes": sum(p.memory.values()), "memory": p.memory, "moment": p.moment} for name, p in found.smaller.items()
    }
    about: dict[str, Any] = {"budget": found.plan.machine.memory, "level": found.level.name, "compromises": found.compromises}
    about |= {"does_not_fit": needs, "command": command(found, model, teacher) if found.plan.fits else None}
    return json.dumps(contents(found.plan) | {"fit": about}, indent=1)


def contents(found: Plan) -> dict[str, Any]:
    """Return a plan as values that JSON has."""
    phases = [
        {"name": p.name, "tokens": p.tokens, "flops": p.flops, "bytes": p.traffic, "wire": p.wire, "seconds": p.seconds}
        | {"limit": p.limit}
        for p in found.phases
    ]
    content: dict[str, Any] = {"model": found.shape.name, "machine": found.machine.name, "workload": asdict(found.work)}
    content |= {"teacher": found.teacher and found.teacher.name, "loss_tokens": asdict(found.loss_tokens)}
    content |= {"tokens": asdict(found.tokens), "phases": phases, "seconds": found.seconds, "memory": found.memory}
    content |= {"host_memory": found.host_memory}
    return content | {"moment": found.moment, "fits": found.fits, "limits": limits(found)}


def main(argv: list[str]) -> int:
    """Print the plan and return 0; 1 if ``--fit`` finds none. Invalid arguments end the program with exit code 2."""
    parser = build_parser()
    args = parse_arguments(parser, argv)
    if args.fit is not None and args.image_resolution_schedule is not None:
        parser.error("--fit must not be used together with --image_resolution_schedule, whose costs are those of one workload")
    if args.max_steps is not None and args.image_resolution_schedule is None:
        parser.error(f"--max_steps must be used together with --image_resolution_schedule, got {args.max_steps}")
    if args.calibrate and args.machine:
        parser.error(f"--machine must not be used together with --calibrate, got {args.machine}")
    with user_errors(parser, "--model"):
        shape = ModelShape.from_name(args.model)
    with user_errors(parser, "--teacher"):
        teacher = None if args.teacher is None else ModelShape.from_name(args.teacher)
    with user_errors(parser):
        values = {name: getattr(args, name) for name in FLAGS if name != "precision"}
        values |= {"width": args.image_size[0], "height": args.image_size[1]}
        unshared = shape.unshared or (teacher and teacher.unshared)
        values["share_prefix"] = {"auto": unshared is None, "true": True, "false": False}[args.share_prefix]
        if shape.vision is None:
            values["images"] = 0
        Workload(**values)  # report invalid values before the calibration, which takes seconds
        usual = "h100" if args.fit is None or args.fit > 32e9 else "rtx-4090"
        machine = calibrate() if args.calibrate else Machine.from_name(args.machine or usual)
        if isinstance(args.calibrate, str):
            machine.save(args.calibrate)
        work = Workload(**values, precision=args.precision or machine.precision)
        if args.image_resolution_schedule is not None:
            costs = schedule_costs(shape, work, machine, args.image_resolution_schedule, args.max_steps, teacher)
            print(json.dumps(costs, indent=1) if args.json else schedule_to_text(costs))
            return 0
        if args.fit is not None:
            given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FLAGS)))  # without the defaults of flags
            kept = [name for name in FLAGS if getattr(given, name) is not None]
            fitted = fit(shape, work, replace(machine, memory=args.fit), kept, teacher)
            print((fit_to_json if args.json else fit_to_text)(fitted, args.model, args.teacher))
            return 0 if fitted.plan.fits else 1
        found = plan(shape, work, machine, teacher)
    print(to_json(found) if args.json else to_text(found))
    return 0
