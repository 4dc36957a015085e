"""Compare the predictions of ``vlmkernels plan`` with real training steps: the time of each phase, and the peak memory.

Every shape runs in a process with one thread, whose CPU time is measured: other load on the machine hardly changes it. The
machine is calibrated before, between and after the steps, and the median counts. A shape passes if the whole step, its memory,
and every phase of at least a tenth of the step are predicted within 25 %.

    python bench/bench_plan.py             # all shapes; also writes bench/results/plan-<device>.json
    python bench/bench_plan.py --scale     # the tables of docs/scale.md, by data sheets
    python bench/bench_plan.py --gpu       # steps that bench_step.py has measured on a GPU, and their plans
    pytest bench/bench_plan.py
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import step_models
import torch
from bench_step import Clock
from support import tiny

TOLERANCE, SMALL = 0.25, 0.1
STEPS = 3  # measured steps, after one that warms up

SHAPES = {
    "Qwen2.5-VL 256 x 6": {
        "sizes": {"width": 256, "layers": 6, "depth": 4, "vocab": 32000},
        "work": {"prompts": 2, "group_size": 8, "completion_tokens": 64, "side": 448},
    },
    "Qwen2.5-VL 256 x 6, a prompt per completion": {
        "sizes": {"width": 256, "layers": 6, "depth": 4, "vocab": 32000},
        "work": {"prompts": 1, "group_size": 4, "completion_tokens": 32, "side": 336, "share_prefix": False},
    },
    "Qwen2.5-VL 512 x 4": {
        "sizes": {"width": 512, "layers": 4, "depth": 2, "vocab": 8000},
        "work": {"prompts": 3, "group_size": 4, "completion_tokens": 48, "side": 224},
    },
    "Qwen3-VL 384 x 8, LoRA": {
        "sizes": {"width": 384, "layers": 8, "depth": 3, "vocab": 16000, "family": "qwen3_vl"},
        "work": {"prompts": 2, "group_size": 6, "completion_tokens": 80, "side": 448, "lora_r": 8},
    },
    "Qwen2.5-VL 256 x 6, masked images": {
        "sizes": {"width": 256, "layers": 6, "depth": 4, "vocab": 32000},
        "work": {
            "prompts": 2, "group_size": 6, "completion_tokens": 48, "side": 336, "perception_loss_weight": 0.01,
            "image_use_steps": 1,
        },
    },
    "Qwen2.5-VL 256 x 6, a teacher of 512 x 6": {
        "sizes": {"width": 256, "layers": 6, "depth": 4, "vocab": 32000},
        "work": {"prompts": 2, "group_size": 6, "completion_tokens": 48, "side": 336},
        "teacher": {"width": 512, "layers": 6, "depth": 2, "vocab": 32000},
    },
}  # fmt: skip
PHASES = ("sampling", "image use", "reference log-probs", "teacher", "forward and loss", "backward", "optimizer")


def make_model(width: int, layers: int, depth: int, vocab: int, family: str = "qwen2_5_vl"):
    if family == "qwen2_5_vl":
        return step_models.make_model(width, layers, depth, vocab)
    model = tiny.qwen3_vl()
    config = model.config.to_dict()
    config["text_config"] |= {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
    }  # fmt: skip
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": 4 * width, "num_heads": width // 64}
    config["vision_config"] |= vision | {"out_hidden_size": width, "num_position_embeddings": 1024}
    return type(model)(type(model.config)(**config))


def peak_of(profile) -> int:
    """The peak memory of the profiled code in bytes, above the memory at its start."""
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(sizes: dict, work: dict, teacher: dict | None = None) -> dict:
    """Measured and planned seconds of each phase and peak bytes. ``teacher``: the sizes of a teacher."""
    from transformers import TrainerCallback

    from vlmkernels.models.branches import split_at_images
    from vlmkernels.plan import ModelShape, Workload, calibrate, plan
    from vlmkernels.train import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    now = time.process_time
    work = dict(work)
    side, shared, lora_r = work.pop("side"), work.get("share_prefix", True), work.get("lora_r", 0)
    model, processor = make_model(**sizes), step_models.make_processor(side)
    teacher_model = None if teacher is None else make_model(**teacher)
    shape, teacher_shape = (None if m is None else ModelShape.from_config(m.config) for m in (model, teacher_model))
    row = {"prompt": [{"role": "user", "content": "what do you see?"}]}
    rows = [{**row, "images": [tiny.image(k, side, side)]} for k in range(work["prompts"])]
    adapters = None
    if lora_r:
        from peft import LoraConfig

        layers = r"model\.language_model\.layers\..*_proj"
        adapters = LoraConfig(r=lora_r, lora_alpha=lora_r, target_modules=layers, task_type="CAUSAL_LM")
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=work["prompts"] * work["group_size"],
        num_generations=work["group_size"], max_completion_length=work["completion_tokens"], beta=0.04,
        max_steps=STEPS + 2, report_to="none", save_strategy="no", disable_tqdm=True,
        share_prefix="auto" if shared else "false", logging_steps=1000,
        generation_kwargs={"min_new_tokens": work["completion_tokens"]},
        perception_loss_weight=work.get("perception_loss_weight", 0.0), image_use_steps=work.get("image_use_steps"),
    )  # fmt: skip

    def length(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(
        model, length, args, rows * (STEPS + 2), processing_class=processor, peft_config=adapters, teacher=teacher_model
    )
    clock = Clock(now)
    clock.watch(type(trainer.engine), "__call__", "sampling")
    clock.watch(trainer.objective, "add_fixed_logps", "reference log-probs")
    if trainer.image_use is not None:
        clock.watch(trainer.image_use, "_measure", "image use")
    if trainer.teacher is not None:
        clock.watch(trainer.teacher, "term", "teacher")
    clock.watch(trainer.model, "forward", "forward and loss")
    clock.watch(trainer.accelerator, "backward", "backward")
    clock.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    steps, machines, profiles, held = [], [calibrate(now)], [], []

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            clock.watch(optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            clock.spent.clear()
            if state.global_step == STEPS + 1:
                moments = [x for states in optimizer.state.values() for x in states.values() if x.dim()]
                tensors = [*trainer.model.parameters(), *moments]
                others = (trainer.ref_model, trainer.teacher and trainer.teacher.model)
                tensors += [parameter for other in others if other is not None for parameter in other.parameters()]
                held.append(sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in tensors}.values()))
                profiles.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True))
                profiles[0].start()
            self.start = now()

        def on_step_end(self, args, state, control, **kwargs):
            steps.append({"whole step": now() - self.start, **clock.spent})
            if profiles:
                profiles[0].stop()
            else:
                machines.append(calibrate(now))

    trainer.add_callback(Steps())
    trainer.train()
    counted = steps[1 : STEPS + 1]
    measured = {name: statistics.median(step.get(name, 0.0) for step in counted) for name in (*PHASES, "whole step")}
    machine = median_of(machines)
    prompt = len(processor(text=processor.apply_chat_template(row["prompt"], add_generation_prompt=True)).input_ids[0]) + 2
    before = int(split_at_images(trainer._experience.rollout.prompts)[0].inputs["attention_mask"].sum(1)[0])
    workload = Workload(**work, prompt_tokens=prompt, width=side, height=side, precision="fp32", reference=True,
                        logits_bytes=2**28, text_before_images=before, teacher_weights="fp32")  # fmt: skip
    found = plan(shape, workload, machine, teacher_shape)
    planned = {phase.name: phase.seconds for phase in found.phases if phase.name in PHASES} | {"whole step": found.seconds}
    measured = {name: measured[name] for name in planned}
    measured["memory"] = held[0] + peak_of(profiles[0])
    planned["memory"] = sum(found.memory.values())
    tokens = trainer._experience.rollout.prompts.inputs["attention_mask"].sum(1).tolist()
    assert set(tokens) == {found.tokens.prompt}, (tokens, found.tokens)
    return {"measured": measured, "planned": planned, "machine": machine.__dict__, "moment": found.moment,
            "items": found.memory}  # fmt: skip


def median_of(machines: list):
    middle = statistics.median
    numbers = ("attention", "attention_backward", "bandwidth", "weights", "fresh")
    figures = {name: middle(getattr(machine, name) for machine in machines) for name in numbers}
    gemm = tuple((points[0][0], middle(rate for _, rate in points)) for points in zip(*(m.gemm for m in machines), strict=True))
    calls = {name: middle(machine.calls[name] for machine in machines) for name in machines[0].calls}
    return replace(machines[0], gemm=gemm, calls=calls, **figures)


def rows_of(result: dict) -> list[dict]:
    """A row per phase: planned, measured, their ratio, and whether the ratio must be within the tolerance."""
    measured, planned = result["measured"], result["planned"]
    return [
        {
            "what": name,
            "planned": planned[name],
            "measured": measured[name],
            "ratio": round(planned[name] / measured[name], 3) if measured[name] else None,
            "counts": name == "memory" or measured[name] >= SMALL * measured["whole step"],
        }
        for name in measured
    ]


def within(row: dict) -> bool:
    return not row["counts"] or abs(row["ratio"] - 1) <= TOLERANCE


def table(rows: list[dict]) -> list[str]:
    lines = ["| | planned | measured | ratio |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        unit, scale = ("MiB", 2**-20) if row["what"] == "memory" else ("ms", 1e3)
        figures = (f"{scale * row[name]:.0f} {unit}" for name in ("planned", "measured"))
        mark = "" if within(row) else " outside"
        lines.append(f"| {row['what']} | {' | '.join(figures)} | {row['ratio']}{'' if row['counts'] else ' (small)'}{mark} |")
    return lines


def in_process(name: str) -> dict:
    command = [sys.executable, __file__, "--shape", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(names=tuple(SHAPES)) -> dict[str, list[dict]]:
    found = {}
    for name in names:
        found[name] = rows_of(in_process(name))
        print(f"\n{name}\n", *table(found[name]), sep="\n", flush=True)
    return found


def write(found: dict[str, list[dict]]) -> Path:
    path = harness.RESULTS / f"plan-{harness.slug(harness.device_name())}.json"
    content = {"device": harness.device_name(), **harness.provenance(), "threads": 1, "clock": "CPU time", "shapes": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


@pytest.mark.skipif(harness.GPU, reason="the plan is calibrated for the CPU, and its clock is CPU time")
def test_plan(benchmark):
    found = run()
    write(found)
    benchmark.pedantic(lambda: None)  # measured above, in other processes
    outside = [f"{name}: {row['what']} {row['ratio']}" for name, rows in found.items() for row in rows if not within(row)]
    assert not outside


def gpu_steps() -> list[str]:
    """A table of the training steps in bench/results/nvidia-h200.json and their plans; nothing runs.

    Measured memory is above weights and optimizer states. 30 stands for the text tokens of the prompt.
    """
    from vlmkernels.plan import MACHINES, ModelShape, Workload, plan

    cases = json.loads((harness.RESULTS / "nvidia-h200.json").read_text())["cases"]
    parts = {"forward and loss": "forward", "backward": "backward", "optimizer": "optimizer"}
    lines = [f"| planned / measured | {' | '.join(parts)} | memory above weights and optimizer |", "| --- |" + " ---: |" * 4]
    for title, case in cases.items():
        name = re.match(r"training step (\S+),", title)
        if name is None or "detail" not in case["rows"][0]:  # ours failed
            continue
        sizes, measured = step_models.MODELS[name[1]], case["rows"][0]["detail"]
        work = sizes["work"]
        shape = ModelShape.from_config(step_models._config(sizes["text"], sizes["vision"]))
        found = plan(shape, Workload(
            prompts=1, group_size=work["generations"], prompt_tokens=30, completion_tokens=work["tokens"], width=work["side"],
            height=work["side"], weights="bf16", checkpointing="checkpointing" in title,
        ), MACHINES["h200"])  # fmt: skip
        pairs = [(1e3 * found.phase(part).seconds, measured["ms"][key], "ms") for part, key in parts.items()]
        above = sum(size for item, size in found.memory.items() if item not in ("weights", "optimizer", "reserve"))
        pairs.append((above / 2**20, measured["peak_mib"], "MiB"))
        cells = [f"{planned:.0f} / {real:.0f} {unit} ({planned / real:.2f})" for planned, real, unit in pairs]
        lines.append(f"| {title.removeprefix('training step ')} | {' | '.join(cells)} |")
    return lines


def scale() -> None:
    """Print plans for 1 to 512 GPUs with eight prompts each, sampled on the same GPUs or by a server on a quarter as many."""
    from vlmkernels.plan import MACHINES, MODELS, ModelShape, Workload, plan

    machine = MACHINES["h100"]
    for name in MODELS:
        shape = ModelShape.from_name(name)
        print(f"\n| {name}, GPUs | sampling engine | step | sampling | exposed wire | PFLOP | wire | memory | fits |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
        for gpus in (1, 8, 64, 512):
            for lora in (0, 32):
                for engine in ("transformers", "vllm_server"):
                    server = max(1, gpus // 4) * (engine == "vllm_server")
                    work = Workload(
                        prompts=8 * gpus, gpus=gpus, reference=True, checkpointing=True, microbatch_tokens=16384, lora_r=lora,
                        weights="bf16" if lora else "fp32", engine=engine, server_gpus=server,
                    )  # fmt: skip
                    found = plan(shape, work, machine)
                    alone = replace(machine, link=1e30, network=1e30)
                    exposed = found.seconds - plan(shape, work, alone).seconds
                    held = sum(found.memory.values())
                    cells = [
                        f"{gpus}, {'LoRA' if lora else 'full'}", engine, f"{found.seconds:.1f} s",
                        f"{found.phase('sampling').seconds:.1f} s", f"{exposed:.2f} s",
                        f"{sum(p.flops for p in found.phases) / 1e15:.2f}", f"{sum(p.wire for p in found.phases) / 1e9:.0f} GB",
                        f"{held / 2**30:.0f} GiB", "yes" if found.fits else f"no: {max(found.memory, key=found.memory.get)}",
                    ]  # fmt: skip
                    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.scale:
        scale()
    elif arguments.gpu:
        print(*gpu_steps(), sep="\n")
    elif arguments.shape:
        result = measure(**SHAPES[arguments.shape])
        print(json.dumps(result))
        if arguments.verbose:
            print(*table(rows_of(result)), sep="\n", file=sys.stderr)
    else:
        print("written to", write(run()))
