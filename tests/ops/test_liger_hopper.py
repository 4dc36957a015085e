"""Why Liger's Hopper kernel is compared in benchmarks but is not a backend: it rounds more than ours.

Its roundings are emulated here. docs/head.md has the figures, and bench/accuracy.py measures the kernel itself on a Hopper GPU.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from support.budget import assert_within_budget

from vlmkernels import linear_logps

pytestmark = pytest.mark.device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, fp32_results replaces CUDA's GEMM with fp32 results
# The roundings of liger-kernel 0.8.5: a file in liger_kernel/ops/cutedsl/ops -> patterns in its text.
ROUNDS = {
    "_fused_scaled_cross_entropy_forward_fragment_sm90.py": (
        r"s_logits\[.*\] = Float16\(accum",
        r"entropy\[row\] = BFloat16\(",
    ),
    "_fused_scaled_cross_entropy_backward_fused_sm90.py": (r'dz_logit_dtype: str = "f16"', r"dw: .*BF16.*\(reduce-add\)"),
    "fused_scaled_cross_entropy_sm90.py": (r"BACKWARD_M_TILES_PER_WAVE = 8\b",),
}
WAVE = 1024  # the gradient of the weight is rounded after this many rows


def make(num=2048, width=64, vocab=2048, largest=30.0):
    """Return hidden, weight, targets sampled from logits in [-largest, largest], and the gradients of logp and entropy."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num, width, generator=rng).bfloat16(), torch.randn(vocab, width, generator=rng)
    logits = hidden.float() @ weight.T
    scale = largest / logits.abs().max()
    targets = torch.multinomial((logits * scale).softmax(-1), 1, generator=rng).squeeze(1)
    inputs = hidden, (weight * scale).bfloat16(), targets, *(torch.randn(2, num, generator=rng) / num)
    return tuple(x.to(DEVICE) for x in inputs)


def formula(hidden, weight, targets, dlogp, dentropy, logits=lambda x: x, entropies=lambda x: x, wave=None):
    """logp, entropy and the gradients of hidden states and weight, with functions that round logits and entropies."""
    x = logits(hidden @ weight.T)
    log_p = x.log_softmax(-1)
    entropy = entropies(-(log_p.exp() * log_p).sum(-1))
    dx = -log_p.exp() * (dlogp.unsqueeze(1) + dentropy.unsqueeze(1) * (log_p + entropy.unsqueeze(1)))
    dx.scatter_add_(1, targets.unsqueeze(1), dlogp.unsqueeze(1))
    dx = dx if wave is None else dx.bfloat16().float()
    by_weight = 0
    for part, states in zip(dx.split(wave or len(dx)), hidden.split(wave or len(dx)), strict=True):
        by_weight = by_weight + (part.T @ states if wave is None else (part.T @ states).bfloat16())
    return {
        "logp": log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        "entropy": entropy,
        "dhidden": dx @ weight if wave is None else (dx @ weight).bfloat16(),
        "dweight": by_weight,
    }


def liger_hopper(hidden, weight, *rest):
    rounded = {
        "logits": lambda x: x.half().float(),
        "entropies": lambda x: x.bfloat16().float(),
        "wave": WAVE,
    }
    return formula(hidden.float(), weight.float(), *rest, **rounded)


def ours(hidden, weight, targets, dlogp, dentropy):
    operands = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = linear_logps(*operands, targets, return_entropy=True)
    gradients = torch.autograd.grad([logp, entropy], operands, [dlogp, dentropy])
    return {"logp": logp.detach(), "entropy": entropy.detach(), **dict(zip(("dhidden", "dweight"), gradients, strict=True))}


def errors(results, exact):
    """Return the largest errors of logp and entropy, and 1 - cosine similarity of the gradients."""
    difference = {name: (results[name].double() - exact[name]).abs().max().item() for name in ("logp", "entropy")}

    def cosine(a, b):
        return torch.cosine_similarity(a.double().flatten(), b.flatten(), 0).item()

    return difference | {name: 1 - cosine(results[name], exact[name]) for name in ("dhidden", "dweight")}


@pytest.mark.parametrize("largest", [5.0, 30.0])
def test_ours_is_closer_in_every_result(fp32_results, largest):
    """linear_logps with a GEMM that returns fp32, like CUDA's."""
    inputs = make(largest=largest)
    exact = formula(*[x if x.dtype == torch.int64 else x.double() for x in inputs])
    own, theirs = errors(ours(*inputs), exact), errors(liger_hopper(*inputs), exact)
    assert all(own[name] < theirs[name] for name in exact)
    assert own["logp"] < theirs["logp"] / 100
    assert own["entropy"] < theirs["entropy"] / 100


def test_the_error_budget():
    """Liger's errors exceed the budget of fp32 logits. Its log-probabilities are within the budget of bf16 logits."""
    inputs = make()
    exact = formula(*[x if x.dtype == torch.int64 else x.double() for x in inputs])
    fp32 = formula(*[x if x.dtype == torch.int64 else x.float() for x in inputs])
    full = formula(*[x if x.dtype == torch.int64 else x.float() for x in inputs], logits=lambda x: x.bfloat16().float())
    results = liger_hopper(*inputs)
    for name in ("logp", "entropy"):
        with pytest.raises(AssertionError, match="is over the budget"):
            assert_within_budget(name, results[name], fp32[name], exact[name])
    assert_within_budget("logp", results["logp"], full["logp"], exact["logp"])


def test_fp16_overflows():
    """A logit beyond 65504, which bf16 operands reach, makes a row NaN."""
    hidden, weight = torch.full((1, 4), 256.0).bfloat16(), torch.tensor([[128.0], [0.0]]).expand(2, 4).bfloat16()
    inputs = hidden, weight, torch.tensor([0]), torch.ones(1), torch.zeros(1)
    assert liger_hopper(*inputs)["logp"].isnan().all()
    assert ours(*inputs)["logp"].eq(0).all()


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("file", ROUNDS)
def test_the_installed_kernel_rounds_so(file):
    """A Liger release with other roundings must be evaluated again."""
    root = Path(importlib.util.find_spec("liger_kernel").submodule_search_locations[0])
    text = (root / "ops" / "cutedsl" / "ops" / file).read_text()
    assert all(re.search(pattern, text) for pattern in ROUNDS[file])
