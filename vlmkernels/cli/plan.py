"""``vlmkernels plan``."""

import argparse
import json
import re
from dataclasses import MISSING, asdict, fields

from vlmkernels.cli import Help, add_flag, user_errors
from vlmkernels.ops.checks import require
from vlmkernels.plan.machine import MACHINES, Machine, calibrate
from vlmkernels.plan.shape import MODELS, ModelShape
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import ENGINES, PARALLEL, PRECISIONS, Tokens, Workload

# The fields of Workload as flags: what they mean, and their values where they are few.
FLAGS = {
    "prompts": ("prompts of a step, over all GPUs", None),
    "group_size": ("completions of each prompt", None),
    "prompt_tokens": ("tokens of a prompt's text", None),
    "completion_tokens": ("tokens of a completion, on average", None),
    "images": ("images of a prompt; tiles, where a family cuts images into some", None),
    "gpus": ("GPUs that train", None),
    "parallel": ("how they share it", PARALLEL),
    "lora_r": ("rank of adapters on the decoder's linear layers; 0 trains the model", None),
    "freeze_vision": ("the vision tower is not trained", None),
    "reference": ("a KL term, hence a pass of the reference", None),
    "old": ("a pass for the old log-probabilities: several optimiser steps per generation batch", None),
    "checkpointing": ("compute activations again in the backward pass", None),
    "microbatch_tokens": ("the most tokens of a pass; by default all", None),
    "engine": ("what samples, on the GPUs that train or, the server, on others", ENGINES),
    "server_gpus": ("GPUs of the server", None),
    "precision": ("of matrix products, by default the machine's", PRECISIONS),
    "weights": ("of the parameters as they are kept (fp32 under bf16 is mixed precision)", PRECISIONS),
    "reward_seconds": ("seconds of the reward functions for the batch", None),
}


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or found[1])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vlmkernels plan",
        "vlmkernels plan --model MODEL [--ARGUMENT VALUE ...]",
        "Time and memory of a GRPO step, before it is run, by phase, and what limits it: docs/scale.md.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_flag(parser, "model", required=True, help=f"{', '.join(MODELS)}, or the path of a model or its config.json")
    add_flag(parser, "machine", help=f"{', '.join(MACHINES)} (data sheets), or a file that --calibrate wrote [h100]")
    add_flag(
        parser, "calibrate", nargs="?", const=True, help="measure this machine's CPU, and plan for it; a path: keep it there"
    )
    add_flag(parser, "image_size", type=size, default="896", help="pixels of an image, WIDTHxHEIGHT or one side")
    add_flag(
        parser,
        "share_prefix",
        choices=("auto", "true", "false"),
        default="auto",
        help="run a prompt once for its group: auto, true, false",
    )
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
    return _count(number).strip().replace("G", "B")  # billions, as models are named


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    last = len(head) - 1

    def line(row):
        cells = (text.ljust(width) if i in (0, last) else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths)))  # noqa: B905
        return "  ".join(cells).rstrip()

    return [line(head), *map(line, rows)]


def text_of(found: Plan) -> str:
    work, shape, machine, tokens = found.work, found.shape, found.machine, found.tokens
    tower = f", {_params(shape.vision_params)} of them its vision tower's" if shape.vision else ""
    trained = f"LoRA of rank {work.lora_r}" if work.lora_r else "all parameters" if not work.frozen_vision else "without tower"
    devices = f"{work.gpus} x {machine.name}" + (f" ({work.parallel})" if work.gpus > 1 else "")
    server = f" on {work.server_gpus} more" if work.engine == "server" else ""
    apart = Tokens.of(shape, Workload(**asdict(work) | {"share_prefix": False, "microbatch_tokens": None}))
    of_images = work.images * shape.vision.image_tokens(work.width, work.height) if work.images else 0
    saved = f"; {apart.passed:,} if each completion had a prompt of its own" if work.share_prefix else ", a prompt each"
    lines = [
        f"{shape.name}: {_params(shape.params)} parameters{tower}",
        f"{devices}, {work.precision} over {work.weights} weights, {trained}; sampling by {work.engine}{server}",
        f"figures: {machine.source}",
        f"{work.prompts} prompts x {work.group_size} completions of {work.completion_tokens} tokens; a prompt has"
        f" {tokens.prompt:,} tokens, {of_images:,} of them of {work.images} image(s) of {work.width} x {work.height}",
        f"a pass over a GPU's share: {tokens.passed:,} tokens in {tokens.packs} pack(s){saved}",
        "",
    ]
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
    lines += _table(("phase, per GPU", "tokens", "operations", "memory", "wire", "time", "share", "mostly"), rows)
    total = sum(found.memory.values())
    items = sorted(found.memory.items(), key=lambda item: -item[1])
    rows = [(name, f"{held / 2**30:.2f} GiB", f"{100 * held / total:.0f} %", "") for name, held in items]
    rows.append(("all", f"{total / 2**30:.2f} GiB", "", f"of {machine.memory / 2**30:.1f} GiB"))
    lines += ["", *_table((f"memory, at its peak in the {found.moment}", "", "", ""), rows)]
    lines += ["", limits(found)]
    return "\n".join(lines)


def limits(found: Plan) -> str:
    """What limits the step, in a sentence or two."""
    slowest = max(found.phases, key=lambda phase: phase.seconds)
    share = f"{100 * slowest.seconds / found.seconds:.0f} % of the step is {slowest.name}, limited by {slowest.limit}."
    item = max(found.memory, key=found.memory.get)
    if found.fits:
        return f"It fits. {share} Most memory goes to {item}."
    missing = sum(found.memory.values()) - found.machine.memory
    return f"It does not fit: {missing / 2**30:.1f} GiB too much in the {found.moment}, most of all for {item}. {share}"


def as_json(found: Plan) -> str:
    phases = [
        {"name": p.name, "tokens": p.tokens, "flops": p.flops, "bytes": p.traffic, "wire": p.wire, "seconds": p.seconds}
        | {"limit": p.limit}
        for p in found.phases
    ]
    content = {"model": found.shape.name, "machine": found.machine.name, "workload": asdict(found.work)}
    content |= {"tokens": asdict(found.tokens), "phases": phases, "seconds": found.seconds, "memory": found.memory}
    return json.dumps(content | {"moment": found.moment, "fits": found.fits, "limits": limits(found)}, indent=1)


def main(argv: list[str]) -> int:
    flags = parser()
    args = flags.parse_args(argv)
    with user_errors(flags):
        require(not (args.calibrate and args.machine), "machine", "be absent with --calibrate", args.machine)
    with user_errors(flags, "--model"):
        shape = ModelShape.named(args.model)
    with user_errors(flags):
        values = {name: getattr(args, name) for name in FLAGS if name != "precision"}
        values |= {"width": args.image_size[0], "height": args.image_size[1]}
        values["share_prefix"] = {"auto": shape.unshared is None, "true": True, "false": False}[args.share_prefix]
        if shape.vision is None:
            values["images"] = 0
        work = Workload(**values)  # before minutes are spent on a measurement of what cannot be
        machine = calibrate() if args.calibrate else Machine.named(args.machine or "h100")
        if isinstance(args.calibrate, str):
            machine.save(args.calibrate)
        work = Workload(**values, precision=args.precision or machine.precision)
        found = plan(shape, work, machine)
    print(as_json(found) if args.json else text_of(found))
    return 0
