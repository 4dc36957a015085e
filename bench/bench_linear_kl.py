"""The divergence between the heads of a student and a teacher, with gradients to the student, compared with its peers.

The loss is the mean over the tokens. Errors are one minus the cosine between gradients (of hidden states and weight) and those
of the reference in a wider dtype: fp32 for bf16, fp64 for fp32. Useful FLOPs: 2 N (H + H') V for the logits of both sides and
4 N H V for the gradients.
"""

import importlib.util

import harness
import pytest
import torch
import torch.nn.functional as F
from bench_linear import cosine

from vlmkernels import linear_kl

# name: (tokens, hidden widths of student and teacher, vocabulary, dtype)
CASES = {
    "bf16 512 x 1024 / 2048 x 151936": (512, 1024, 2048, 151936, torch.bfloat16),
    "fp32 256 x 512 / 1024 x 32000": (256, 512, 1024, 32000, torch.float32),
}
if harness.GPU:
    CASES = {
        "qwen3-vl-2b / 8b 4096 x 2048 / 4096 x 151936": (4096, 2048, 4096, 151936, torch.bfloat16),
        "qwen2.5-vl-3b / 7b 4096 x 2048 / 3584 x 151936": (4096, 2048, 3584, 151936, torch.bfloat16),
    }
BETAS = {"reverse KL": 1.0, "JSD": 0.5}
LIMIT_S = 15 if harness.GPU else 60
LATE = ("Liger LigerFusedLinearJSDLoss",)  # it calls torch.compile


def make(num, width, teacher_width, vocab, dtype):
    """hidden, weight, teacher_hidden and teacher_weight with logits of about 3; the teacher resembles the student."""
    rng = torch.Generator(harness.DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=harness.DEVICE)

    hidden, weight = randn(num, width), 3 / width**0.5 * randn(vocab, width)
    other = randn(num, teacher_width - width), 1 / (teacher_width - width) ** 0.5 * randn(vocab, teacher_width - width)
    operands = hidden, weight, torch.cat([hidden, other[0]], 1), torch.cat([weight, other[1]], 1)
    return [x.to(dtype) for x in operands]


def divergence_of_logits(logits, teacher_logits, beta):
    log_p, log_q = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if beta == 1:
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    log_m = torch.logaddexp(log_q + torch.tensor(beta).log(), log_p + torch.tensor(1 - beta).log())
    of_p, of_q = (F.kl_div(log_m, x, log_target=True, reduction="none").sum(-1) for x in (log_p, log_q))
    return beta * of_q + (1 - beta) * of_p


def naive(hidden, weight, teacher_hidden, teacher_weight, beta, divergence=divergence_of_logits):
    """Full logits of both sides, as most trainers compute them."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.T
    return divergence(hidden @ weight.T, teacher_logits, beta).mean()


def trl(hidden, weight, teacher_hidden, teacher_weight, beta):
    """The function that TRL's DistillationTrainer calls in _chunked_divergence_loss."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)[0].mean()


def liger(hidden, weight, teacher_hidden, teacher_weight, beta):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    return loss(
        hidden, weight, teacher_hidden, teacher_weight, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    )


def peers(beta) -> dict:
    compiled = torch.compile(divergence_of_logits)
    providers = {}
    if importlib.util.find_spec("trl"):
        providers["TRL ChunkedDivergenceFunction"] = trl
    if importlib.util.find_spec("liger_kernel"):
        providers["Liger LigerFusedLinearJSDLoss"] = liger
    providers["full logits"] = naive
    providers["torch.compile full logits"] = lambda *inputs: naive(*inputs, divergence=compiled)
    return {name: lambda *inputs, loss=loss: loss(*inputs, beta) for name, loss in providers.items()}


def ours(beta, inputs) -> dict:
    """The weighted sum on every backend that supports this device, and the divergences per token."""
    hidden, _, teacher_hidden, _ = inputs
    mean = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)

    def provider(name):
        return lambda *inputs: linear_kl(*inputs, beta=beta, token_weights=mean, backend=name)

    providers = {f"vlmkernels {name}": provider(name) for name in harness.backends("linear_kl", hidden, teacher_hidden)}
    return providers | {"vlmkernels per token": lambda *inputs: linear_kl(*inputs, beta=beta).mean()}


def gemms(hidden, weight, teacher_hidden, teacher_weight):
    """The matrix products that every implementation needs, into allocated memory."""
    hidden, weight = hidden.detach(), weight.detach()
    logits, by_hidden, by_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)
    teacher_logits = torch.empty_like(logits)

    def run():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=by_hidden)
        torch.mm(logits.T, hidden, out=by_weight)

    return run


def step(loss, inputs):
    return lambda: torch.autograd.grad(loss(*inputs), inputs[:2])


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("case", CASES)
def test_linear_kl(benchmark, case, kind):
    torch._dynamo.reset()
    beta = BETAS[kind]
    inputs = make(*CASES[case])
    wide = torch.float64 if inputs[0].dtype == torch.float32 else torch.float32
    exact_inputs = [x.to(wide) for x in inputs]
    for x in (*inputs[:2], *exact_inputs[:2]):
        x.requires_grad_()
    mean = torch.full((len(inputs[0]),), 1 / len(inputs[0]), device=harness.DEVICE)
    exact = step(lambda *inputs: linear_kl(*inputs, beta=beta, token_weights=mean, backend="reference"), exact_inputs)()
    del exact_inputs
    providers = {name: step(loss, inputs) for name, loss in (ours(beta, inputs) | peers(beta)).items()}

    def check(name, gradients):
        errors = []
        for gradient, right in zip(gradients, exact, strict=True):
            assert gradient.isfinite().all(), f"{name} is wrong: not finite"
            errors.append(1 - cosine(gradient, right))
            size = gradient.float().norm() / right.float().norm()
            assert abs(size.item() - 1) < 0.05, f"{name} is wrong: {size.item()} times the right norm"
        assert max(errors) < 1e-2, f"{name} is wrong: {errors}"
        return ", ".join(f"{error:.0e}" for error in errors)

    num, width, teacher_width, vocab, _ = CASES[case]
    flops = 2 * num * vocab * (3 * width + teacher_width)
    floors = {"4 bare GEMMs": gemms(*inputs)}
    title = f"linear_kl {case}, {kind}"
    harness.compare(benchmark, harness.Case(title, providers, check, floors, limit_s=LIMIT_S, flops=flops, late=LATE))
