"""Rollouts of the trainer's own engine and of vLLM in the process: time to sample, and to update vLLM's weights.

Both engines sample completions of equal length from the same prompts, in turns, and with the same model. The time to sample
includes the forward pass of the prompts. Errors are differences of log-probabilities from those of the trainer's model, whose
forward pass has a copy of the prompt for each completion; updates are followed by a comparison of fingerprints, whose time is
left out. vLLM compiles and captures CUDA graphs before it is timed; VLMKERNELS_VLLM_EAGER=1 turns both off.

    python bench/bench_engines.py --model 3b      # small
    PYTHONPATH=.:tests:bench .venv-vllm/bin/python bench/bench_engines.py     # on the CPU, after make test-vllm
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace

import harness
import pytest
import torch
from step_models import make_model, make_processor, random_model
from support import tiny

WORK = {
    "small": {"prompts": (2, 4), "generations": 4, "tokens": 16, "side": 112},
    "3b": {"prompts": (8, 64), "generations": 8, "tokens": 128, "side": 448},
}
ROUNDS = 3
UPDATES = 3  # of each kind, in turns


def make(name: str):
    """A model whose head is not tied to its embedding, because vLLM for CPUs does not update a tied head."""
    model = random_model(name) if name in ("tiny", "0.5b", "3b") else make_model(256, 4, 2, 512)
    config = model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    with torch.device(harness.DEVICE):
        return type(model)._from_config(config, dtype=model.dtype).eval()


def make_engines(model, processor, work: dict, folder: str) -> dict:
    """The engines by provider. None of them samples an end-of-sequence token, so that all completions have all tokens."""
    from accelerate import Accelerator

    from vlmkernels.rollout.base import Sampling
    from vlmkernels.rollout.make import make_engine
    from vlmkernels.rollout.vllm.config import VLLMConfig

    sampling = Sampling(work["tokens"], eos_token_id=(), pad_token_id=0)
    config = VLLMConfig(folder, "colocate", autocast_dtype=model.dtype, gpu_memory_utilization=0.4, max_model_length=2048)
    accelerator = Accelerator(cpu=not harness.GPU)
    engines = {
        "vlmkernels": make_engine(model, processor, sampling, accelerator),
        "vLLM": make_engine(model, processor, sampling, accelerator, vllm=config),
    }
    for engine in engines.values():  # as with a tokenizer for the whole vocabulary: only image and video tokens are banned
        banned = engines["vLLM"].counted
        engine.sampling = replace(engine.sampling, suppress_tokens=banned)
        engine.banned = banned
    return engines


def gap(model, rollout) -> str:
    """The differences of a rollout's log-probabilities from those of the trainer's model."""
    from vlmkernels.models.head import completion_logps, logit_arguments, output_head

    head, gaps = output_head(model), []
    options = {"head": head, "arguments": logit_arguments(model, head), "temperature": 1.0}
    for part in torch.arange(len(rollout.group)).split(8):
        with torch.no_grad():
            expected = completion_logps(model, rollout.padded(part), **options)
        gaps.append((rollout.logps[part][rollout.completion_mask[part]] - expected).abs())
    found = torch.cat(gaps)
    return f"log-probabilities: mean {found.mean():.0e}, max {found.max():.0e}"


def measure_sampling(model, processor, engines: dict, work: dict, prompts: int) -> list[dict]:
    from vlmkernels.data.samples import encode, read_sample
    from vlmkernels.models.families import family_of

    images = [tiny.image(k, work["side"], work["side"]) for k in range(prompts)]
    question = [{"role": "user", "content": "what do you see?"}]
    samples = [read_sample({"prompt": question, "images": [image]}, k) for k, image in enumerate(images)]
    inputs = encode(samples, processor, family_of(model.config)).to(harness.DEVICE)

    def run(name: str):
        return engines[name](model, inputs, work["generations"], 1.0, samples)

    errors = {name: gap(model, run(name)) for name in engines}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name in engines:
            times[name].append(harness.time_calls(lambda name=name: run(name)))
    rows, count = [], prompts * work["generations"]
    for name, values in times.items():
        seconds = statistics.median(values)
        ratio = seconds / statistics.median(times["vlmkernels"])
        speed = f"{count * work['tokens'] / seconds:.0f} tokens/s; {errors[name]}"
        row = {"provider": name, "ms": round(1e3 * seconds, 2), "rounds": ROUNDS, "ratio_to_ours": round(ratio, 2)}
        rows.append({**row, "error": speed})
    return rows


def measure_updates(model, engine) -> list[dict]:
    """Seconds of an update without the comparison after it, whose result is the error."""
    times: dict[bool, list[float]] = {True: [], False: []}
    differences: dict[bool, list[float]] = {True: [], False: []}
    compare, engine._compare = engine._compare, lambda model, when: 0.0
    for number in range(2 * UPDATES):
        engine.in_memory = number % 2 == 0
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.01)
        times[engine.in_memory].append(engine.sync_weights(model, number + 1)["vllm/sync_time"])
        differences[engine.in_memory].append(compare(model, "after an update"))
    engine.in_memory, engine._compare = True, compare
    rows = []
    for name, key in (("in memory", True), ("through a folder", False)):
        ratio = statistics.median(times[key]) / statistics.median(times[True])
        row = {"provider": name, "ms": round(1e3 * statistics.median(times[key]), 2), "rounds": UPDATES}
        rows.append({**row, "ratio_to_ours": round(ratio, 2), "error": f"fingerprints: {max(differences[key]):.0e}"})
    return rows


def measure(name: str) -> dict[str, list[dict]]:
    if os.environ.get("VLMKERNELS_VLLM_EAGER") == "1":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    work = WORK[name]
    model, processor = make(name), make_processor(work["side"])
    size = f"{sum(x.numel() for x in model.parameters()) / 1e6:.0f} million parameters"
    found = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        engines = make_engines(model, processor, work, folder)
        try:
            engines["vLLM"].sync_weights(model, 0)
            for prompts in work["prompts"]:
                shape = f"{prompts} x {work['generations']} completions of {work['tokens']} tokens"
                found[f"engines {name}, {shape}"] = measure_sampling(model, processor, engines, work, prompts)
            found[f"weights to vLLM, {size}"] = measure_updates(model, engines["vLLM"])
        finally:
            engines["vLLM"].close()
    for title, rows in found.items():
        harness.record(title, rows)
    return found


@pytest.mark.parametrize("name", ["3b"] if harness.GPU else ["small"])
def test_engines(benchmark, name):
    pytest.importorskip("vllm")
    found = measure(name)
    benchmark.pedantic(lambda: None)
    assert all("ms" in row for rows in found.values() for row in rows), found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=WORK, default="3b" if harness.GPU else "small")
    for title, rows in measure(parser.parse_args().model).items():
        print(f"\n{title}\n", *harness.table(rows), sep="\n")
        print(json.dumps(rows))
