"""gather_logps with entropy from bf16 logits, compared with its peers: forward and backward, and forward only.

Useful bytes: the logits, read once by the forward pass and once by the backward pass, and their gradient.

Errors are those of logp, entropy and gradient against fp64 on the first rows, relative to the largest value.
"""

import importlib.util

import harness
import pytest
import torch

from vlmkernels import gather_logps

# name: (rows, vocabulary). The head of Qwen2.5-VL on one long answer and, on a GPU, on a micro-batch; the head of SmolVLM.
CASES = {"qwen2.5-vl 512 x 151936": (512, 151936), "smolvlm 2048 x 49280": (2048, 49280)}
if harness.GPU:
    CASES = {"qwen2.5-vl 8192 x 151936": (8192, 151936), "qwen2.5-vl 64 x 151936": (64, 151936), **CASES}
CHECKED = 8  # rows

_logp_weight, _entropy_weight = 1.0, 0.01


def loss_gradient(logp, entropy, logits):
    """(logp, entropy, gradient) of sum(logp) + 0.01 sum(entropy)."""
    gradient = torch.full_like(logp, _logp_weight), torch.full_like(entropy, _entropy_weight)
    return logp.detach(), entropy.detach(), torch.autograd.grad([logp, entropy], logits, gradient)[0]


def eager(logits, targets):
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl_pair(logits, targets):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def trl_fused(logits, targets):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)


@pytest.mark.parametrize("case", CASES)
def test_gather_logps(benchmark, case):
    num, vocab = CASES[case]
    rng = torch.Generator(harness.DEVICE).manual_seed(0)
    original = (3 * torch.randn(num, vocab, generator=rng, device=harness.DEVICE)).bfloat16()
    targets = torch.randint(vocab, (num,), generator=rng, device=harness.DEVICE)
    logits = original.clone().requires_grad_()
    # Each in-place run overwrites its logits. The time does not depend on values, so they are restored only before a check.
    scratch = torch.empty_like(original).copy_(original).requires_grad_()

    exact = original[:CHECKED].double().requires_grad_()
    exact = loss_gradient(*eager(exact, targets[:CHECKED]), exact)

    def ours(name, x=logits, inplace=False):
        return lambda: loss_gradient(*gather_logps(x, targets, return_entropy=True, inplace_backward=inplace, backend=name), x)

    chosen, *others = harness.backends("gather_logps", logits)
    providers = {f"vlmkernels {chosen}": ours(chosen)}
    providers[f"vlmkernels {chosen}, in place"] = ours(chosen, scratch, inplace=True)
    providers |= {f"vlmkernels {name}": ours(name) for name in others}
    if importlib.util.find_spec("trl"):
        providers["TRL selective_log_softmax_and_entropy"] = lambda: loss_gradient(*trl_fused(logits, targets), logits)
        providers["TRL selective_log_softmax + entropy_from_logits"] = lambda: loss_gradient(*trl_pair(logits, targets), logits)
    compiled = torch.compile(eager, dynamic=False)
    providers["torch.compile"] = lambda: loss_gradient(*compiled(logits, targets), logits)
    providers["eager"] = lambda: loss_gradient(*eager(logits, targets), logits)

    def check(name, result):
        errors = [((a[:CHECKED].double() - e).abs().max() / e.abs().max()).item() for a, e in zip(result, exact, strict=True)]
        with torch.no_grad():
            scratch.copy_(original)
        # The gradient is in bf16, and so is everything of TRL on the CPU: an error of 2^-8.
        assert max(errors) < 2e-2, f"{name} is wrong: relative errors {errors}"
        return f"logp {errors[0]:.0e}, entropy {errors[1]:.0e}, gradient {errors[2]:.0e}"

    copy = torch.empty_like(original)
    floors = {"copy the logits twice": lambda: (copy.copy_(original), copy.copy_(original))}
    size = 2 * num * vocab
    bytes = dict.fromkeys(providers, 3 * size) | dict.fromkeys(floors, 4 * size)
    harness.compare(benchmark, harness.Case(f"gather_logps {case}", providers, check, floors, limit_s=60, bytes=bytes))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward(benchmark, case):
    num, vocab = CASES[case]
    rng = torch.Generator(harness.DEVICE).manual_seed(0)
    logits = (3 * torch.randn(num, vocab, generator=rng, device=harness.DEVICE)).bfloat16()
    targets = torch.randint(vocab, (num,), generator=rng, device=harness.DEVICE)
    exact = eager(logits[:CHECKED].double(), targets[:CHECKED])

    providers = {
        f"vlmkernels {name}": lambda name=name: gather_logps(logits, targets, return_entropy=True, backend=name)
        for name in harness.backends("gather_logps", logits)
    }
    if importlib.util.find_spec("trl"):
        providers["TRL selective_log_softmax_and_entropy"] = lambda: trl_fused(logits, targets)
    compiled = torch.compile(eager, dynamic=False)
    providers["torch.compile"] = lambda: compiled(logits, targets)
    providers["eager"] = lambda: eager(logits, targets)

    def check(name, result):
        errors = [((a[:CHECKED].double() - e).abs().max() / e.abs().max()).item() for a, e in zip(result, exact, strict=True)]
        assert max(errors) < 2e-2, f"{name} is wrong: relative errors {errors}"
        return f"logp {errors[0]:.0e}, entropy {errors[1]:.0e}"

    floors = {"largest element of a row": lambda: logits.amax(-1)}
    title = f"gather_logps {case}, no gradient"
    harness.compare(benchmark, harness.Case(title, providers, check, floors, limit_s=30, bytes=2 * num * vocab))
