"""The cost of the deterministic mode: log-probabilities of a pack, their gradients, and decoding, with and without the mode.

On the CPU the model and the work are those of bench_step.py, on a GPU a model with the shape of Qwen2.5-VL-3B.
"""

import functools

import harness
import pytest
import torch
from step_models import SIZES, make_model, make_processor, random_model
from support import tiny

PROMPTS, GENERATIONS, TOKENS, SIDE = 2, 8, 64, 448
DECODED = 16  # tokens of each completion in the case of decoding


@functools.cache
def setting():
    """The model, prompts with one image each, and sampled completions."""
    from vlmkernels.data.samples import encode, read_sample
    from vlmkernels.models.attention import use_tree_attention
    from vlmkernels.models.families import family_of
    from vlmkernels.rollout.base import Rollout, Sampling
    from vlmkernels.rollout.decode import decode_groups

    model = use_tree_attention(random_model("3b") if harness.GPU else make_model(**SIZES)).eval()
    samples = []
    for k in range(PROMPTS):
        row = {"prompt": [{"role": "user", "content": "what do you see?"}], "images": [tiny.image(k, SIDE, SIDE)]}
        samples.append(read_sample(row, k))
    prompts = encode(samples, make_processor(SIDE), family_of(model.config)).to(harness.DEVICE)
    sampling = {tokens: Sampling(tokens, (), 0, temperature=0) for tokens in (TOKENS, DECODED)}
    decoded = decode_groups(model, prompts, GENERATIONS, sampling[TOKENS])
    decode = functools.partial(decode_groups, model, prompts, GENERATIONS, sampling[DECODED])
    group = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)
    return model, Rollout(prompts, group, decoded.ids, decoded.mask, decoded.truncated, decoded.logps), decode


def providers(function):
    """``function(model, rollout, decode)`` in the mode, and without it."""
    from vlmkernels.models.deterministic import undo_deterministic, use_deterministic

    def run(prepare):
        model, rollout, decode = setting()
        prepare(model)
        return function(model, rollout, decode)

    return {"vlmkernels, deterministic": lambda: run(use_deterministic), "vlmkernels": lambda: run(undo_deterministic)}


def logps_of(model, rollout, samples=None):
    from vlmkernels.models.head import completion_logps, output_head

    samples = torch.arange(len(rollout.group)) if samples is None else samples
    batch = rollout.packed(samples, model)
    return completion_logps(model, batch, head=output_head(model), arguments={}, temperature=1.0)


def forward(model, rollout, decode):
    with torch.no_grad():
        return logps_of(model, rollout)


def forward_backward(model, rollout, decode):
    model.zero_grad()
    logps = logps_of(model, rollout)
    logps.sum().backward()
    return logps.detach()


def decoding(model, rollout, decode):
    return decode().logps.flatten()


@pytest.mark.parametrize("name", ["log-probabilities of a pack", "and their gradients", "decoding"])
def test_deterministic(benchmark, name):
    function = {"log-probabilities of a pack": forward, "and their gradients": forward_backward, "decoding": decoding}[name]
    model, rollout, _ = setting()
    title = f"{name}, {PROMPTS} x {GENERATIONS} x {DECODED if function is decoding else TOKENS} tokens"

    def check(provider, result):
        expected = rollout.logps[:, :DECODED] if function is decoding else rollout.logps
        difference = (result - expected.flatten()).abs().max().item()
        limit = 0.5 if harness.GPU else 1e-4  # bf16 on a GPU
        if not difference < limit:
            raise AssertionError(
                f"{provider} must return the log-probabilities of the rollout, got a difference of {difference:.1e}"
            )
        if "deterministic" not in provider:
            return f"{difference:.1e}"
        with torch.no_grad():  # the mode is on: parts of the batch have the same bits
            parts = torch.cat([logps_of(model, rollout, part) for part in torch.arange(len(rollout.group)).tensor_split(4)])
            if not torch.equal(parts, logps_of(model, rollout)):
                raise AssertionError(f"{provider} must not depend on the batch, got another result in 4 parts")
        return f"{difference:.1e}, equal bits in 4 parts"

    harness.compare(benchmark, harness.Case(title, providers(function), check, limit_s=30))
