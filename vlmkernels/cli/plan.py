"""``vlmkernels plan``: estimate time and memory of a training step before running it."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from vlmkernels.cli.flags import Help, add_flag, parse_arguments, user_errors
from vlmkernels.plan.calibration import calibrate
from vlmkernels.plan.machine import MACHINES, Machine
from vlmkernels.plan.shape import MODELS, ModelShape
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import ENGINES, PARALLEL, PRECISIONS, StepTokens, Workload

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
    "checkpointing": ("recompute activations in the backward pass (activation checkpointing)", None),
    "microbatch_tokens": ("maximum number of tokens per forward and backward pass; by default no limit", None),
    "engine": ("rollout engine: transformers or vLLM on the training GPUs, or a vLLM server on other GPUs", ENGINES),
    "server_gpus": ("number of GPUs of the vLLM server", None),
    "precision": ("precision of matrix products; by default the machine's", PRECISIONS),
    "weights": ("precision of the stored parameters; fp32 with bf16 products is mixed precision", PRECISIONS),
    "reward_seconds": ("seconds that the reward functions take for the whole batch", None),
}


def size(text: str) -> tuple[int, int]:
    """Parse "WIDTHxHEIGHT" or one side. argparse replaces the ValueError for any other text with its own message."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or found[1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vlmkernels plan",
        "vlmkernels plan --model MODEL [--ARGUMENT VALUE ...]",
        "Estimate the time and memory of each phase of a GRPO step before running it, and what limits them. See docs/scale.md.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    machine = f"the device: {', '.join(MACHINES)} (data sheets), or a file written by --calibrate [h100]"
    calibrated = "measure this machine's CPU and plan for it; with a path, save the measurement there for --machine"
    share = "run each prompt once per group: true, false, or auto (true if the model supports it)"
    add_flag(parser, "model", required=True, help=f"the model: {', '.join(MODELS)}, or the path of a model or its config.json")
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
    trained = f"LoRA of rank {work.lora_r}" if work.lora_r else "all but the tower" if work.frozen_vision else "all parameters"
    devices = f"{work.gpus} x {machine.name}" + (f" ({work.parallel})" if work.gpus > 1 else "")
    server = f" on {work.server_gpus} other GPUs" if work.engine == "vllm_server" else ""
    unshared = Workload(**asdict(work) | {"share_prefix": False, "microbatch_tokens": None})
    unshared_tokens = StepTokens.from_workload(shape, unshared).passed
    of_images = work.images * shape.vision.image_tokens(work.width, work.height) if shape.vision else 0
    shared = f"; {unshared_tokens:,} without prefix sharing" if work.share_prefix else ", without prefix sharing"
    return [
        f"{shape.name}: {_params(shape.params)} parameters{tower}",
        f"{devices}, {work.precision} products, {work.weights} weights, training {trained}; sampling by {work.engine}{server}",
        f"rates: {machine.source}",
        f"{work.prompts} prompts x {work.group_size} completions of {work.completion_tokens} tokens; a prompt has"
        f" {tokens.prompt:,} tokens, {of_images:,} of them for {work.images} image(s) of {work.width} x {work.height}",
        f"a pass over the batch of one GPU: {tokens.passed:,} tokens in {tokens.packs} micro-batch(es){shared}",
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


def to_json(found: Plan) -> str:
    """Format a plan as JSON."""
    phases = [
        {"name": p.name, "tokens": p.tokens, "flops": p.flops, "bytes": p.traffic, "wire": p.wire, "seconds": p.seconds}
        | {"limit": p.limit}
        for p in found.phases
    ]
    content: dict[str, Any] = {"model": found.shape.name, "machine": found.machine.name, "workload": asdict(found.work)}
    content |= {"tokens": asdict(found.tokens), "phases": phases, "seconds": found.seconds, "memory": found.memory}
    return json.dumps(content | {"moment": found.moment, "fits": found.fits, "limits": limits(found)}, indent=1)


def main(argv: list[str]) -> int:
    """Print the plan and return 0. Invalid arguments end the program with exit code 2."""
    parser = build_parser()
    args = parse_arguments(parser, argv)
    if args.calibrate and args.machine:
        parser.error(f"--machine must not be used together with --calibrate, got {args.machine}")
    with user_errors(parser, "--model"):
        shape = ModelShape.from_name(args.model)
    with user_errors(parser):
        values = {name: getattr(args, name) for name in FLAGS if name != "precision"}
        values |= {"width": args.image_size[0], "height": args.image_size[1]}
        values["share_prefix"] = {"auto": shape.unshared is None, "true": True, "false": False}[args.share_prefix]
        if shape.vision is None:
            values["images"] = 0
        Workload(**values)  # report invalid values before the calibration, which takes seconds
        machine = calibrate() if args.calibrate else Machine.from_name(args.machine or "h100")
        if isinstance(args.calibrate, str):
            machine.save(args.calibrate)
        found = plan(shape, Workload(**values, precision=args.precision or machine.precision), machine)
    print(to_json(found) if args.json else to_text(found))
    return 0
