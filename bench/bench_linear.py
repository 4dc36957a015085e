"""The language-model head with the GRPO loss, forward and backward, compared with its peers and with bare GEMMs.

The objective is that of DAPO on samples of the policy, with one advantage per sequence; the entropy is a metric. Errors are one
minus the cosine between gradients (of hidden states and weight) and those in fp64, on some rows. Without gradients they are the
largest errors of log-probabilities and entropies. Useful FLOPs: 6 N H V for forward and backward, 4 N H V with a frozen head, 2
N H V without gradients.
"""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import harness
import pytest
import torch

from vlmkernels import backend, linear_grpo_loss, linear_logps
from vlmkernels.ops.linear_logps.sweep import default_chunk_bytes

# name: (completions, tokens of each, hidden width, vocabulary): heads of Qwen2.5-VL and Qwen3-VL, or a narrower one.
CASES = {"512 x 1024 x 151936": (8, 64, 1024, 151936)}
STREAM = (64, 256, 32000)  # largest number of tokens, hidden width, vocabulary
if harness.GPU:
    CASES = {
        "qwen3-vl-8b 8192 x 4096 x 151936": (16, 512, 4096, 151936),
        "qwen2.5-vl-3b 8192 x 2048 x 151936": (16, 512, 2048, 151936),
        "qwen2.5-vl-7b 8192 x 3584 x 152064": (16, 512, 3584, 152064),
    }
    STREAM = (2048, 2048, 151936)
# Without gradients also with few rows, where computing without logits is slower (vlmkernels/ops/linear_logps/fused.py).
FORWARD_CASES = CASES | ({"qwen3-vl-8b 512 x 4096 x 151936": (1, 512, 4096, 151936)} if harness.GPU else {})
LIMIT_S = 15 if harness.GPU else 60
LATE = ("Liger LigerFusedLinearGRPOLoss",)  # it calls torch.compile
TRL_CHUNK = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE; importing it needs more packages


def make(num, length, width, vocab, dtype=torch.bfloat16):
    """hidden (B, T, H) and weight (V, H) with logits of about 3, targets sampled from them, advantages (B,)."""
    rng = torch.Generator(harness.DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=harness.DEVICE)

    hidden = randn(num, length, width).to(dtype)
    weight = (3 / width**0.5 * randn(vocab, width)).to(dtype)
    noise = torch.rand(num * length, vocab, generator=rng, device=harness.DEVICE)
    targets = (hidden.flatten(0, 1) @ weight.T - (-noise.log()).log().to(dtype)).argmax(-1).view(num, length)
    return hidden, weight, targets, randn(num)


def on_policy(logps, advantages):
    ratio = (logps - logps.detach()).exp()
    return -(ratio * advantages.unsqueeze(1)).mean()


def naive(hidden, weight, targets, advantages):
    """Full logits, as most trainers compute them."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return on_policy(logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), advantages)


def ours_composed(hidden, weight, targets, advantages):
    return on_policy(linear_logps(hidden, weight, targets, return_entropy=True)[0], advantages)


def trl_logps(hidden, weight, targets):
    """Log-probabilities and entropies."""
    from trl.kernels import ChunkedLogProbFunction

    flat = (hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return [x.view_as(targets) for x in ChunkedLogProbFunction.apply(*flat)[:2]]


def trl(hidden, weight, targets, advantages):
    return on_policy(trl_logps(hidden, weight, targets)[0], advantages)


def liger(hidden, weight, targets, advantages):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    return loss(hidden, weight, targets, torch.ones_like(targets), advantages)[0]


def liger_hopper_logps(hidden, weight, targets):
    """Log-probabilities and entropies. The kernel also needs nvidia-cutlass-dsl and apache-tvm-ffi."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # a check that waits for the device
    flat = (hidden.flatten(0, 1), weight, targets.flatten())
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*flat, return_entropy=True)
    return -nll.view_as(targets), entropy.view_as(targets)


def liger_hopper(hidden, weight, targets, advantages):
    return on_policy(liger_hopper_logps(hidden, weight, targets)[0], advantages)


def full_logps(hidden, weight, targets):
    """Log-probabilities and entropies from full logits."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


VERL = Path(sys.prefix) / "peers" / "verl" / "utils" / "experimental" / "torch_functional.py"


@cache
def verl_module():
    """Only the file of verl with the function: importing the package needs Ray."""
    spec = importlib.util.spec_from_file_location("verl_torch_functional", VERL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl(hidden, weight, targets, advantages):
    return on_policy(verl_module().FusedLinearForPPO()(hidden, weight, targets)[0], advantages)


def peers() -> dict:
    providers = {}
    if importlib.util.find_spec("trl"):
        providers["TRL _ChunkedLogProbFunction"] = trl
    if importlib.util.find_spec("liger_kernel"):
        providers["Liger LigerFusedLinearGRPOLoss"] = liger
        if harness.GPU and torch.cuda.get_device_capability() == (9, 0):
            providers["Liger scaled cross-entropy (Hopper)"] = liger_hopper
    if VERL.exists():
        providers["verl FusedLinearForPPO"] = verl
    return providers | {"full logits": naive}


def ours() -> dict:
    """linear_grpo_loss on every backend that supports this device; first the one that "auto" selects."""
    sample = torch.zeros(1, 1, dtype=torch.bfloat16, device=harness.DEVICE)

    def provider(name):
        return lambda *inputs: linear_grpo_loss(*inputs, backend=name).loss

    return {f"vlmkernels {name}": provider(name) for name in harness.backends("linear_grpo_loss", sample)}


def gemms(hidden, weight, *, frozen: bool):
    """The matrix products that every implementation needs, into allocated memory."""
    hidden = hidden.detach().flatten(0, 1)
    weight = weight.detach()
    logits, by_hidden, by_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=by_hidden)
        if not frozen:
            torch.mm(logits.T, hidden, out=by_weight)

    return run


def gemm_flops(hidden, weight) -> int:
    """FLOPs of one matrix product of the head."""
    return 2 * hidden.shape[:-1].numel() * weight.numel()


SAMPLED = 256  # rows of each gradient that are checked


def exact_gradients(hidden, weight, targets, advantages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(indices, values in fp64) of some rows of the gradient of the hidden states, and of the gradient of the weight.

    Only the normalization of the softmax needs all logits: one product in fp64 instead of three.
    """
    hidden, weight, targets = hidden.detach().flatten(0, 1), weight.detach(), targets.flatten()
    num, vocab = len(hidden), len(weight)
    rng = torch.Generator().manual_seed(1)
    rows, some_tokens, some_rows = (
        torch.randperm(size, generator=rng)[:most].to(hidden.device)
        for size, most in ((num, SAMPLED), (vocab, SAMPLED // 2), (num, SAMPLED // 2))
    )
    tokens = torch.cat([some_tokens, targets[some_rows]]).unique()
    dlogp = -advantages.double().repeat_interleave(num // len(advantages)) / num
    double = weight.double()

    log_sum = hidden.new_empty(num, dtype=torch.float64)
    for part in torch.arange(num, device=hidden.device).split(max(1, 2**28 // vocab)):
        log_sum[part] = (hidden[part].double() @ double.T).logsumexp(-1)

    def dlogits(rows, tokens):
        """The gradient of the loss with respect to the logits of these rows and tokens."""
        probability = (hidden[rows].double() @ double[tokens].T - log_sum[rows].unsqueeze(1)).exp()
        return dlogp[rows].unsqueeze(1) * ((targets[rows].unsqueeze(1) == tokens).double() - probability)

    every = torch.arange(num, device=hidden.device)
    by_hidden = dlogits(rows, torch.arange(vocab, device=hidden.device)) @ double
    by_weight = dlogits(every, tokens).T @ hidden.double()
    return [(rows, by_hidden), (tokens, by_weight)]


def cosine(a, b) -> float:
    """Cosine similarity of all elements, computed in fp64."""
    parts = [(x.double(), y.double()) for x, y in zip(a.flatten().split(2**24), b.flatten().split(2**24), strict=True)]
    dot, square_a, square_b = (sum(torch.dot(p[i], p[j]).item() for p in parts) for i, j in ((0, 1), (0, 0), (1, 1)))
    return dot / (square_a * square_b) ** 0.5


def step(loss, inputs):
    leaves = [x for x in inputs[:2] if x.requires_grad]
    return lambda: torch.autograd.grad(loss(*inputs), leaves)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize("case", CASES)
def test_linear(benchmark, case, frozen):
    torch._dynamo.reset()
    inputs = make(*CASES[case])
    inputs[0].requires_grad_()
    inputs[1].requires_grad_(not frozen)
    exact = exact_gradients(*inputs)
    providers = {name: step(loss, inputs) for name, loss in ours().items()}
    providers["vlmkernels linear_logps + loss"] = step(ours_composed, inputs)
    providers |= {name: step(loss, inputs) for name, loss in peers().items()}

    def check(name, gradients):
        errors = []
        for gradient, (rows, values) in zip(gradients, exact[: len(gradients)], strict=True):
            assert gradient.isfinite().all(), f"{name} is wrong: not finite"
            sampled = gradient.flatten(0, -2)[rows]
            errors.append(1 - cosine(sampled, values))
            relative = ((sampled.double() - values).norm() / values.norm()).item()
            assert relative < 0.05, f"{name} is wrong: relative error {relative}"
        assert max(errors) < 1e-3, f"{name} is wrong: {errors}"
        return ", ".join(f"{error:.0e}" for error in errors)

    floors = {f"{2 if frozen else 3} bare GEMMs": gemms(*inputs[:2], frozen=frozen)}
    title = f"linear_grpo_loss {case}{', frozen head' if frozen else ''}"
    flops = (2 if frozen else 3) * gemm_flops(*inputs[:2])
    harness.compare(benchmark, harness.Case(title, providers, check, floors, limit_s=LIMIT_S, flops=flops, late=LATE))


@pytest.mark.parametrize("case", FORWARD_CASES)
@torch.no_grad()
def test_forward(benchmark, case):
    """Old and reference log-probabilities, with entropies."""
    inputs = hidden, weight, targets = make(*FORWARD_CASES[case])[:3]
    budget = {"return_entropy": True, "chunk_bytes": default_chunk_bytes(hidden.device)}
    exact = linear_logps(hidden.double(), weight.double(), targets, backend="reference", **budget)
    names = [name.split()[-1] for name in ours()]
    functions = {
        f"vlmkernels {name}": lambda *inputs, name=name: linear_logps(*inputs, backend=name, **budget) for name in names
    }
    if backend.why_not("linear_logps_fused", "triton", hidden) is None:
        fused = {"backend": "triton", "return_entropy": True, "chunk_bytes": 0}
        functions["vlmkernels triton, no logits"] = lambda *inputs: linear_logps(*inputs, **fused)
    others = {trl: trl_logps, liger_hopper: liger_hopper_logps, naive: full_logps}
    functions |= {name: others[loss] for name, loss in peers().items() if loss in others}

    def check(name, results):
        errors = [(a.double() - b).abs() for a, b in zip(results, exact, strict=True)]
        means = [error.mean().item() for error in errors]
        assert max(means) < 0.05, f"{name} is wrong: {means}"
        return ", ".join(f"{error.max():.0e}" for error in errors)

    out = hidden.new_empty(targets.numel(), len(weight))
    floors = {"1 bare GEMM": lambda: torch.mm(hidden.flatten(0, 1), weight.T, out=out)}
    providers = {name: lambda f=function: f(*inputs) for name, function in functions.items()}
    flops = gemm_flops(hidden, weight)
    harness.compare(
        benchmark, harness.Case(f"linear_logps {case}, no gradient", providers, check, floors, limit_s=LIMIT_S, flops=flops)
    )


def test_stream_of_lengths(benchmark):
    """Fifty batches of different lengths: shows what is compiled or tuned again for each length."""
    most, width, vocab = STREAM
    hidden, weight, targets, advantages = make(1, most, width, vocab)
    lengths = torch.linspace(most // 4, most, 50).long().tolist()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def stream(loss):
        def run():
            total = 0
            for length in lengths:
                value = loss(hidden[:, :length], weight, targets[:, :length], advantages)
                gradients = torch.autograd.grad(value, leaves)
                total += gradients[1].float().norm().item()
            return total

        return run

    providers = {name: stream(loss) for name, loss in (ours() | peers()).items()}
    expected = stream(naive)()

    def check(name, total):
        assert abs(total / expected - 1) < 0.01, f"{name} is wrong: {total} instead of {expected}"
        return f"{abs(total / expected - 1):.0e}"

    harness.compare(
        benchmark,
        harness.Case(
            f"linear_grpo_loss of 50 lengths, {most // 4} to {most} x {width} x {vocab}",
            providers,
            check,
            limit_s=LIMIT_S / 2,
            flops=sum(3 * gemm_flops(hidden[:, :length], weight) for length in lengths),
            late=LATE,
        ),
    )
