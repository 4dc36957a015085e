"""Greedy decoding of groups, compared with ``generate`` on copies of the prompts: time per step of all completions together.

The time is that of a long run minus that of a short one, which leaves out the forward pass of the prompts. Errors are the share
of completions that equal those of ``generate``, and the difference of log-probabilities from those of one forward pass over
prompts and completions. Useful bytes of a step: the weights of the language model, and the keys and values, where those of a
prompt count once.

    python bench/bench_decode.py --model 3b      # 0.5b; small, the model and the work of bench_step.py; tiny
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

import harness
import pytest
import torch
from step_models import SIZES, make_model, make_processor, random_model
from support import tiny

WORK = {
    "tiny": {"prompts": 2, "generations": 3, "tokens": 12, "side": 56},
    "small": {"prompts": 2, "generations": 8, "tokens": 64, "side": 448},
    "0.5b": {"prompts": 8, "generations": 8, "tokens": 32, "side": 448},
    "3b": {"prompts": 8, "generations": 8, "tokens": 32, "side": 448},
}
SHORT = 2  # tokens of the run that is subtracted
PROFILED = 4  # additional tokens of the profiled run
ROUNDS = 3


def make(name: str):
    """The model, and prompts with one image each."""
    from vlmkernels.data.samples import encode, read_sample
    from vlmkernels.models.families import family_of

    work = WORK[name]
    model = (make_model(**SIZES) if name == "small" else random_model(name)).eval()
    processor = make_processor(work["side"])
    model.generation_config.eos_token_id = None  # every completion has all its tokens
    samples = []
    for k in range(work["prompts"]):
        image = tiny.image(k, work["side"], work["side"])
        samples.append(read_sample({"prompt": [{"role": "user", "content": "what do you see?"}], "images": [image]}, k))
    return model, encode(samples, processor, family_of(model.config)).to(harness.DEVICE)


def make_providers(name: str, model, prompts) -> dict:
    """Functions of a number of tokens that return the ids of the completions and (ours) their log-probabilities."""
    from vlmkernels.models.attention import NAME, use_tree_attention
    from vlmkernels.rollout.base import Sampling
    from vlmkernels.rollout.decode import decode_groups

    generations = WORK[name]["generations"]
    use_tree_attention(model)
    copies = prompts.repeat(generations).inputs

    def implementation(chosen: str) -> None:
        if model.config.text_config._attn_implementation != chosen:
            model.set_attn_implementation({"text_config": chosen})

    def ours(tokens: int):
        implementation(NAME)
        decoded = decode_groups(model, prompts, generations, Sampling(tokens, (), 0, temperature=0))
        return decoded.ids, decoded.logps

    def theirs(tokens: int, **options):
        implementation("sdpa")
        most = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        ids = model.generate(**copies, **most)
        return ids[:, copies["input_ids"].shape[1] :], None

    static = functools.partial(theirs, cache_implementation="static", disable_compile=True)
    return {"vlmkernels decode_groups": ours, "generate": theirs, "generate, static cache": static}


@torch.no_grad()
def scored(model, prompts, generations: int, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the completions, (B, C), from one forward pass with a copy of the prompt for each."""
    from vlmkernels.ops.gather_logps import gather_logps

    model.set_attn_implementation({"text_config": "sdpa"})
    parts = []
    for k in range(len(prompts)):
        some = ids[k * generations : (k + 1) * generations]
        batch = prompts.select(torch.full((generations,), k)).append(some, torch.ones_like(some))
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=some.shape[1] + 1).logits[:, :-1]
        parts.append(gather_logps(logits.contiguous(), some))
    return torch.cat(parts)


def useful_bytes(model, prompts, generations: int, tokens: float) -> int:
    """Useful bytes of a step when each completion has ``tokens`` tokens."""
    text = model.config.text_config
    weights = sum(x.numel() for x in model.model.language_model.layers.parameters()) + model.lm_head.weight.numel()
    heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    held = int(prompts.inputs["attention_mask"].sum()) + len(prompts) * generations * tokens
    return int((weights + 2 * text.num_hidden_layers * heads * held) * model.dtype.itemsize)


@torch.no_grad()
def measure(name: str) -> list[dict]:
    work = WORK[name]
    model, prompts = make(name)
    length = int(prompts.inputs["attention_mask"].sum(1).max())
    title = (
        f"decode {name}, {work['prompts']} x {work['generations']} completions of {work['tokens']} tokens, prompts of {length}"
    )
    rows, results, profiles, peaks = [], {}, {}, {}
    providers = make_providers(name, model, prompts)
    for provider, run in providers.items():
        try:
            run(SHORT)
            results[provider] = run(work["tokens"])
            peaks[provider] = harness.peak_memory(functools.partial(run, work["tokens"]))
        except Exception as error:
            rows.append({"provider": provider, "error": f"not measured: {harness.reason(error)}"})
            print(rows[-1], file=sys.stderr, flush=True)
        harness.release()
    times = {provider: [] for provider in results}
    start, limit_s = time.perf_counter(), float(os.environ.get("BENCH_LIMIT_S") or 60)
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - start > limit_s:
            break
        for provider in results:
            short, long = (harness.time_calls(functools.partial(providers[provider], n)) for n in (SHORT, work["tokens"]))
            times[provider].append((long - short) / (work["tokens"] - SHORT))
    if harness.GPU:
        for provider in results:
            profiles[provider] = profile(providers[provider], model.config.text_config.num_hidden_layers)
    expected = results.get("generate", (None, None))[0]
    amount = useful_bytes(model, prompts, work["generations"], work["tokens"] / 2)
    measured = []
    for provider, (ids, logps) in results.items():
        notes = []
        if expected is not None and provider != "generate":
            same = ids == expected
            notes.append(f"{int(same.all(1).sum())} of {len(ids)} completions and {same.float().mean():.1%} of tokens equal")
        if logps is not None:
            gap = (logps - scored(model, prompts, work["generations"], ids)).abs()
            notes.append(f"log-probabilities: mean {gap.mean():.0e}, max {gap.max():.0e}")
        seconds = statistics.median(times[provider])
        measured.append({
            "provider": provider, "ms": round(1e3 * seconds, 3), "rounds": len(times[provider]), "ratio_to_ours": None,
            **harness.rates(provider, seconds, amount, None, profiles.get(provider, {}).get("gpu_us")),
            **profiles.get(provider, {}), "peak_mib": round(peaks[provider] / 2**20, 1), "error": "; ".join(notes) or "none",
        })  # fmt: skip
        if measured[0]["provider"].startswith("vlmkernels"):
            measured[-1]["ratio_to_ours"] = round(measured[-1]["ms"] / measured[0]["ms"], 2)
        harness.record(title, measured + rows, ceilings=harness.ceilings())
    return measured + rows


def profile(run, layers: int) -> dict:
    """GPU time and number of kernels of a step of all completions, and kernels per layer."""
    short, long = (harness.profiled(functools.partial(run, n), calls=1) for n in (SHORT, SHORT + PROFILED))
    if not short or not long:
        return {}
    found = {name: round((long[name] - short[name]) / PROFILED, 1) for name in short}
    return found | {"kernels_per_layer": round(found["gpu_kernels"] / layers, 1)}


@pytest.mark.parametrize("name", ["3b"] if harness.GPU else ["tiny", "small"])
def test_decode(benchmark, name):
    rows = measure(name)
    benchmark.pedantic(lambda: None)
    assert all("ms" in row for row in rows), rows
    if not harness.GPU:
        assert all("equal" not in row["error"] or "100.0% of tokens" in row["error"] for row in rows), rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=WORK, default="3b" if harness.GPU else "small")
    found = measure(parser.parse_args().model)
    print(*harness.table(found), sep="\n")
    print(json.dumps(found))
