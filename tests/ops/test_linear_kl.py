"""linear_kl: every backend against the fp64 reference, values and gradients; top_k, sums, excluded tokens, wrappers."""

import math
from itertools import pairwise

import pytest
import torch
from support.budget import assert_within_budget
from support.linear_cases import KERNELS, ROW

from vlmkernels import backend as backends
from vlmkernels import linear_kl
from vlmkernels.ops.linear_kl.inputs import Pair, SelectedRows
from vlmkernels.ops.linear_logps.sweep import Head, narrowed

pytestmark = pytest.mark.device

BETAS = [0, 0.3, 1]
NAMES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def make(rows, vocab, widths, dtypes, device, scale=2.0):
    """The operands of both sides by name, with logits of about ``scale``. Every backend gets the same rounded values."""
    rng = torch.Generator().manual_seed(sum(rows) + vocab)
    operands = []
    for width, dtype in zip(widths, dtypes, strict=True):
        sizes = (1.0, (*rows, width)), (scale / width**0.5, (vocab, width)), (1.0, (vocab,))
        operands += [(factor * torch.randn(*shape, generator=rng)).to(device, dtype) for factor, shape in sizes]
    return dict(zip(NAMES, operands, strict=True))


def small(device, dtype=torch.float32, rows=(2, 3), vocab=20):
    return make(rows, vocab, (4, 6), (dtype, dtype), device)


def doubled(operands):
    return {name: x.double() for name, x in operands.items()}


def ramp(x):
    """Weights of tokens that differ, in the shape of ``x``."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x)


def run(operands, **options):
    """The divergence, and the gradients of its sum weighted by ``ramp``."""
    operands = {name: x.clone().requires_grad_(not name.startswith("teacher")) for name, x in operands.items()}
    divergence = linear_kl(**operands, **options)
    leaves = [operands[name] for name in NAMES[:3]]
    gradients = torch.autograd.grad(divergence, leaves, ramp(divergence))
    return {"divergence": divergence.detach(), **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=True))}


def run_sum(operands, token_weights, **options):
    """The weighted sum and its gradients."""
    operands = {name: x.clone().requires_grad_(not name.startswith("teacher")) for name, x in operands.items()}
    total = linear_kl(**operands, token_weights=token_weights, **options)
    gradients = torch.autograd.grad(total, [operands[name] for name in NAMES[:3]])
    return {"total": total.detach(), **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=True))}


def capped(x, softcap):
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def definition(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature=1.0, softcaps=(None, None), k=None
):
    """The formulas of the docstring, from full logits."""
    z = capped(hidden @ weight.T + bias, softcaps[0]) / temperature
    z_teacher = capped(teacher_hidden @ teacher_weight.T + teacher_bias, softcaps[1]) / temperature
    log_p, log_q = z.log_softmax(-1), z_teacher.log_softmax(-1)
    if k is not None:
        chosen = z_teacher.topk(k).indices
        rest = torch.ones_like(z, dtype=torch.bool).scatter(-1, chosen, False)
        log_p, log_q = (
            torch.cat([x.gather(-1, chosen), x.where(rest, -math.inf).logsumexp(-1, keepdim=True)], -1) for x in (log_p, log_q)
        )

    def kl(a, b):
        return torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def check(operands, backend, **options):
    """Compare a backend with the fp64 reference, within the error of the reference in the same dtype."""
    exact = run(doubled(operands), backend="reference", **options | {"chunk_bytes": None})
    eager = run(operands, backend="reference", **options)
    actual = run(operands, backend=backend, **options)
    scales = {}
    if operands["hidden"].dtype == operands["teacher_hidden"].dtype == torch.float32:
        # Terms cancel: q log q - q log p in a divergence; p log p, p log q and p K in a gradient of the logits.
        terms = exact["divergence"].abs().max().item() + math.log(len(operands["weight"]))
        scales = {"divergence": terms, "dbias": terms * ramp(exact["divergence"]).abs().sum().item()}
        scales["dhidden"] = 2 * terms * operands["weight"].abs().max().item()
        scales["dweight"] = scales["dbias"] * operands["hidden"].abs().max().item()
    for name, value in exact.items():
        assert_within_budget(name, actual[name], eager[name], value, scale=scales.get(name))
    return actual


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("beta", [0, 0.3, 0.9, 1])
def test_equals_the_definition(device, beta, top_k):
    """In fp64, with chunks; per token and as a weighted sum."""
    operands = {name: x.requires_grad_() for name, x in small(device, torch.float64).items()}
    leaves = [operands[name] for name in NAMES[:3]]
    options = {"beta": beta, "temperature": 0.7, "top_k": top_k, "chunk_bytes": 4 * 20 * 8}
    for softcaps in ((None, None), (2.0, None), (2.0, 3.0)):
        expected = definition(**operands, beta=beta, temperature=0.7, softcaps=softcaps, k=top_k)
        caps = {"softcap": softcaps[0], "teacher_softcap": softcaps[1]}
        actual = linear_kl(**operands, **options, **caps)
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(expected, leaves, ramp(expected))
        torch.testing.assert_close(torch.autograd.grad(actual, leaves, ramp(actual)), gradients)
        total = linear_kl(**operands, **options, **caps, token_weights=ramp(expected))
        torch.testing.assert_close(total, (ramp(expected) * expected).sum())
        torch.testing.assert_close(torch.autograd.grad(total, leaves), gradients)


def test_beta_is_that_of_liger():
    """tests/integrations/test_trl.py compares with TRL."""
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction.distillation_loss_fn
    operands = small("cpu", rows=(5,), vocab=30)
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = operands.values()
    logits = (hidden @ weight.T + bias) / 0.8, (teacher_hidden @ teacher_weight.T + teacher_bias) / 0.8
    for beta in (0.0, 0.2, 1.0):
        expected = linear_kl(**operands, beta=beta, temperature=0.8).sum()
        torch.testing.assert_close(jsd(*logits, beta=beta), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "rows", "vocab", "widths"),
    [
        (torch.float32, (1,), 2, (1, 1)),
        (torch.float32, (2, 3), 1003, (33, 16)),
        (torch.float32, (2,), 5003, (16, 8)),
        (torch.bfloat16, (3,), 1003, (33, 16)),
        (torch.float16, (3,), 1003, (33, 16)),
    ],
    ids=str,
)
def test_matches_fp64(need, device, nan_filled, backend, dtype, rows, vocab, widths):
    """Odd sizes; several blocks of the vocabulary. The teacher has another width and, with beta = 0.3, another dtype."""
    for beta in BETAS:
        operands = make(rows, vocab, widths, (dtype, torch.float32 if beta == 0.3 else dtype), device)
        need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
        check(operands, backend, beta=beta, temperature=0.7)
    check(operands, backend, beta=0.3, temperature=1.3, logit_scale=0.5, softcap=4.0, teacher_softcap=3.0)
    check(operands, backend, beta=1, teacher_logit_scale=0.7, teacher_softcap=5.0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_top_k_matches_fp64(need, device, nan_filled, backend, dtype, softcap):
    """All backends choose the same tokens: the teacher's logits are exact in bf16."""
    operands = make((4,), 1003, (33, 8), (dtype, dtype), device)
    need("linear_logps", backend, operands["hidden"])
    rng = torch.Generator().manual_seed(0)
    operands["teacher_weight"] = torch.zeros(1003, 8, dtype=dtype, device=device)
    operands["teacher_bias"] = (torch.randperm(1003, generator=rng) / 4 % 16).to(device, dtype)
    operands["teacher_bias"][torch.randperm(1003, generator=rng)[:7]] = torch.arange(16.0, 23).to(device, dtype)
    for beta in BETAS:
        check(operands, backend, beta=beta, top_k=5, softcap=softcap, chunk_bytes=3 * 1003 * ROW)


@pytest.mark.parametrize(("backend", "chunk_rows"), [*((backend, None) for backend in KERNELS), ("auto", 7)])
def test_token_weights_compute_the_gradients_in_the_forward_pass(need, device, nan_filled, backend, chunk_rows):
    operands = make((4, 5), 301, (16, 8), (torch.bfloat16, torch.float32), device)
    if backend != "auto":
        need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    options = {"beta": 0.6, "chunk_bytes": None if chunk_rows is None else chunk_rows * 301 * ROW}
    token_weights = ramp(torch.empty(4, 5, device=device))
    exact = run_sum(doubled(operands), token_weights.double(), backend="reference", **options | {"chunk_bytes": None})
    eager = run_sum(operands, token_weights, backend="reference", **options)
    actual = run_sum(operands, token_weights, backend=backend, **options)
    assert actual["total"].shape == ()
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])


@pytest.mark.parametrize("chunk_rows", [7, 30])
def test_chunks_and_kept_logits(device, nan_filled, chunk_rows):
    """Chunks of 7 rows, the last one shorter, computed twice; one chunk, kept."""
    operands = make((4, 5), 301, (16, 8), (torch.bfloat16, torch.bfloat16), device)
    itemsize = 4 if device == "cuda" else 2
    check(operands, "auto", beta=0.5, chunk_bytes=chunk_rows * 301 * itemsize)


SELECTIONS = {
    "mask": {"mask": [1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0]},
    "rows": {"rows": [[7, 2, 2, 11], [2, 0, 7, 7]], "teacher_rows": [[0, 1, 5, 5], [9, 9, 0, 3]]},
    "rows+mask": {"rows": [7, 2, 2, 11, 2], "teacher_rows": [0, 1, 5, 5, 9], "mask": [1, 0, 1, 1, 0]},
    "teacher_rows": {"teacher_rows": [11, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0]},
    "none": {"mask": [0] * 12},
}


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_selected_results_are_computed(device, nan_filled, selection, top_k):
    """Rows without a result are not multiplied (they are NaN here) and get gradient 0; gradients of repeated rows are added."""
    operands = doubled(make((12,), 301, (16, 8), (torch.float32,) * 2, device))
    options = {name: torch.tensor(x, device=device) for name, x in SELECTIONS[selection].items()}
    mask = options.get("mask")
    rows = options.get("rows", torch.arange(12, device=device))
    teacher_rows = options.get("teacher_rows", torch.arange(12, device=device))
    selected = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
    for name, index in (("hidden", rows), ("teacher_hidden", teacher_rows)):
        used = torch.zeros(12, dtype=torch.bool, device=device)
        used[index[selected]] = True
        operands[name][~used] = torch.nan
    hidden = operands["hidden"].clone().requires_grad_()
    of_rows = {"hidden": hidden[rows[selected]], "teacher_hidden": operands["teacher_hidden"][teacher_rows[selected]]}
    expected = torch.zeros(rows.shape, dtype=torch.float64, device=device)
    expected[selected] = definition(**operands | of_rows, beta=0.4, k=top_k)
    (gradient,) = torch.autograd.grad((expected * ramp(expected)).sum(), hidden)
    for form in (run, lambda *args, **options: run_sum(operands, ramp(expected), **options)):
        result = form(operands, beta=0.4, top_k=top_k, chunk_bytes=5 * 301 * 8, **options)
        if "divergence" in result:
            torch.testing.assert_close(result["divergence"], expected.detach())
        torch.testing.assert_close(result["dhidden"], gradient)


def test_top_k_is_a_divergence_of_fewer_events(device):
    """It grows with k up to that of the whole vocabulary, which k = V - 1 has already."""
    operands = small(device, torch.float64)
    for beta in BETAS:
        values = [linear_kl(**operands, beta=beta, top_k=k) for k in (1, 3, 8, 19, 500, None)]
        assert all((fewer <= more + 1e-12).all() for fewer, more in pairwise(values))
        assert torch.equal(values[3], values[5])
        assert torch.equal(values[4], values[5])


def test_top_k_where_all_other_tokens_are_impossible(device):
    """The teacher excludes all but 2 tokens, so the event of all others has probability 0 for it."""
    operands = small(device, torch.float64)
    operands["teacher_bias"][2:] = -math.inf
    for beta in (0, 0.4):
        torch.testing.assert_close(linear_kl(**operands, beta=beta, top_k=4), linear_kl(**operands, beta=beta))
        actual, expected = (run(operands, beta=beta, top_k=k)["dhidden"] for k in (4, None))
        torch.testing.assert_close(actual, expected)
    operands["bias"][2:] = -math.inf  # and so does the student
    for beta in BETAS:
        torch.testing.assert_close(run(operands, beta=beta, top_k=4), run(operands, beta=beta))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_excluded_tokens(need, device, backend):
    """Tokens at -inf in the student, the teacher or both: 0 log 0 is 0, and x log(x / 0) is inf."""
    operands = small(device, rows=(3,))
    need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    both, own, other = operands["bias"].clone(), operands["bias"].clone(), operands["teacher_bias"].clone()
    both[4:9], own[4:9], other[4:9] = -math.inf, -math.inf, -math.inf
    excluded = {**operands, "bias": own, "teacher_bias": other}
    kept = {name: x if "hidden" in name else torch.cat([x[:4], x[9:]]) for name, x in operands.items()}
    for beta in BETAS:
        result, expected = run(excluded, beta=beta, backend=backend), run(kept, beta=beta, backend=backend)
        torch.testing.assert_close(result["divergence"], expected["divergence"])
        torch.testing.assert_close(result["dhidden"], expected["dhidden"])
        assert result["dweight"][4:9].eq(0).all()
    by_student, by_teacher = {**operands, "bias": own}, {**operands, "teacher_bias": other}
    for beta, infinite in ((0, by_student), (1, by_teacher)):
        result = run(infinite, beta=beta, backend=backend)
        assert result["divergence"].isposinf().all()
        assert result["dhidden"].isfinite().all() == (beta == 0)
    most = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    for beta, finite in ((0, by_teacher), (1, by_student), (0.3, by_student), (0.3, by_teacher)):
        result = run(finite, beta=beta, backend=backend)
        assert all(x.isfinite().all() for x in result.values())
        assert beta != 0.3 or (result["divergence"] < most).all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_equal_and_disjoint_distributions(need, device, backend):
    operands = small(device, torch.float32, rows=(3,), vocab=300)
    need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    own = {name: operands[name] for name in NAMES[:3]}
    for beta in BETAS:
        result = run(own | {f"teacher_{name}": x for name, x in own.items()}, beta=beta, backend=backend)
        assert result["divergence"].abs().max() < 1e-6
        assert result["dhidden"].abs().max() < 1e-6
    first, second = torch.zeros(2, 300, device=device)
    first[:150], second[150:] = -math.inf, -math.inf
    value = linear_kl(**operands | {"bias": first, "teacher_bias": second}, beta=0.3, backend=backend)
    torch.testing.assert_close(value, torch.full_like(value, -0.3 * math.log(0.3) - 0.7 * math.log(0.7)))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("side", ["hidden", "teacher_hidden"])
def test_nan_stays_nan(need, device, backend, side):
    operands = small(device)
    need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    operands[side][0, 1] = math.nan
    for beta in BETAS:
        result = run(operands, beta=beta, backend=backend)
        assert result["divergence"].isnan().nonzero().tolist() == [[0, 1]]
        assert result["dhidden"].isnan().any(-1).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [4, 1003, 5002])  # several groups, the last one shorter
def test_fp32_logits_are_narrowed_in_place(need, device, backend, half, vocab):
    """As on a GPU, the logits of 16-bit operands are fp32, and their 16-bit gradient is written over them."""
    need("linear_kl", backend, *torch.zeros(2, 1, 1, dtype=half, device=device))
    rng = torch.Generator().manual_seed(vocab)
    logits, teacher_logits = (3 * torch.randn(2, 3, vocab, generator=rng)).to(device)
    weight = torch.zeros(vocab, 1, dtype=half, device=device)
    for beta, softcap in ((0.0, None), (0.3, 5.0), (1.0, None)):
        pair = Pair(Head(weight, None, 0.7, 1.0, softcap), Head(weight, None, 0.7, 1.0, None), beta)
        results = {}
        for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
            x = logits.to(dtype, copy=True)
            upstream = torch.tensor([1.0, -2.0, 0.5], dtype=dtype, device=device)
            nothing = upstream.new_empty(3, 0)
            rows = SelectedRows(upstream.new_empty(3), upstream.new_empty(3, 5), nothing, nothing, upstream)
            out = torch.empty_like(x) if name == "reference" else narrowed(x, half)
            backends.load("linear_kl", name).sweep(x, teacher_logits.to(dtype), rows, pair, out)
            results[name] = rows.divergence, out
        torch.testing.assert_close(results[backend][0].double(), results["reference"][0], rtol=1e-5, atol=1e-5)
        actual, exact = results[backend][1], results["reference"][1]
        assert actual.dtype == half
        assert ((actual.double() - exact).abs() <= torch.finfo(half).eps * exact.abs() + 2e-6).all()


def test_gemms_with_fp32_results(device, nan_filled, fp32_results):
    """The logits are not rounded: values are as exact as in fp32; only gradients have the precision of the operands."""
    operands = make((4, 5), 301, (16, 8), (torch.bfloat16,) * 2, device)
    exact = run(doubled(operands), backend="reference")
    for options in ({}, {"chunk_bytes": 7 * 301 * ROW}):
        actual = run(operands, **options)
        torch.testing.assert_close(actual["divergence"].double(), exact["divergence"], rtol=1e-5, atol=1e-5)
        for name in ("dhidden", "dweight", "dbias"):
            error = (actual[name].double() - exact[name]).abs().max()
            assert error < 4 * torch.finfo(torch.bfloat16).eps * max(1.0, exact[name].abs().max())


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("needs", NAMES[:3])
def test_only_needed_gradients_are_computed(device, monkeypatch, needs, token_weights):
    """Two GEMMs compute the logits of both sides, and one more each gradient."""
    operands = small(device, rows=(6,), vocab=50)
    expected = run(operands)[f"d{needs}"]
    operands[needs].requires_grad_()
    shapes = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=product, **o: shapes.append(tuple((r := f(*a, **o)).shape)) or r)
    options = {"token_weights": ramp(torch.empty(6, device=device))} if token_weights else {}
    result = linear_kl(**operands, **options)
    (gradient,) = torch.autograd.grad(result, operands[needs], None if token_weights else ramp(result))
    torch.testing.assert_close(gradient, expected)
    assert shapes == [(6, 50), (6, 50), *{"hidden": [(6, 4)], "weight": [(50, 4)], "bias": []}[needs]]


def test_top_k_backward_needs_no_logits_of_the_teacher(device, monkeypatch):
    operands = small(device, rows=(6,), vocab=50)
    operands["hidden"].requires_grad_()
    result = linear_kl(**operands, top_k=3, chunk_bytes=4 * 50 * 4)
    widths = []
    monkeypatch.setattr(torch, "addmm", lambda *a, f=torch.addmm, **o: widths.append(a[1].shape[1]) or f(*a, **o))
    torch.autograd.grad(result.sum(), operands["hidden"])
    assert widths == [4, 4]  # only the student's logits are computed again


def test_the_upstream_gradient_of_a_weighted_sum(device):
    """It multiplies the gradients, which can be computed once."""
    operands = small(device)
    operands["hidden"].requires_grad_()
    weights = ramp(torch.empty(2, 3, device=device))
    (once,) = torch.autograd.grad(linear_kl(**operands, token_weights=weights), operands["hidden"])
    total = linear_kl(**operands, token_weights=weights)
    (scaled,) = torch.autograd.grad(-2.5 * total, operands["hidden"], retain_graph=True)
    torch.testing.assert_close(scaled, -2.5 * once)
    with pytest.raises(RuntimeError, match="linear_kl with token_weights supports one backward pass"):
        torch.autograd.grad(total, operands["hidden"])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_small_weights_of_fp16(need, device, backend):
    """A mean over a million tokens: without a scale, gradients of 1e-8 would be 0 in fp16."""
    operands = small(device, torch.float16, rows=(5,), vocab=64)
    need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    loss_scale = 2.0**16
    weights = torch.full((5,), 1e-6, device=device)
    operands["hidden"].requires_grad_()
    total = linear_kl(**operands, token_weights=weights, backend=backend)
    (actual,) = torch.autograd.grad(loss_scale * total, operands["hidden"])
    exact = doubled(operands)
    exact["hidden"] = exact["hidden"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss_scale * 1e-6 * linear_kl(**exact).sum(), exact["hidden"])
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), expected, rtol=0.01, atol=2e-4)


def test_without_gradients(device):
    operands = small(device)
    operands["hidden"].requires_grad_()
    weights = ramp(torch.empty(2, 3, device=device))
    with torch.no_grad():
        divergence, total = linear_kl(**operands), linear_kl(**operands, token_weights=weights)
    assert not divergence.requires_grad
    torch.testing.assert_close(total, (weights * divergence).sum())
    teacher = {name: x.requires_grad_(name.startswith("teacher")) for name, x in small(device).items()}
    assert not linear_kl(**teacher).requires_grad  # the teacher gets no gradients


def test_gradcheck_of_the_reference(device):
    operands = small(device, torch.float64, rows=(3,), vocab=7)
    rows = torch.tensor([0, 2, 2], device=device)
    leaves = [operands.pop(name).requires_grad_() for name in NAMES[:3]]
    for beta, top_k in ((0, None), (0.3, None), (1, 4)):

        def function(hidden, weight, bias, beta=beta, top_k=top_k):
            options = {"rows": rows, "teacher_rows": rows, "softcap": 3.0, "chunk_bytes": 8 * 7 * 2, "backend": "reference"}
            return linear_kl(hidden, weight, bias=bias, beta=beta, top_k=top_k, **operands, **options)

        assert torch.autograd.gradcheck(function, leaves)


def test_twice_backward(device):
    """The gradient is written over the kept logits; a second pass computes them again."""
    for top_k in (None, 3):
        operands = small(device)
        operands["weight"].requires_grad_()
        total = linear_kl(**operands, top_k=top_k).sum()
        first = torch.autograd.grad(total, operands["weight"], retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(total, operands["weight"]), first)


def test_dtypes_of_gradients(device):
    """An fp32 master copy of a 16-bit weight gets an fp32 gradient; autocast casts as for a linear layer."""
    operands = small(device, torch.bfloat16)
    master = {
        name: x.float() if name in ("weight", "bias", "teacher_weight", "teacher_bias") else x for name, x in operands.items()
    }
    actual, expected = run(master), run(operands)
    assert torch.equal(actual["divergence"], expected["divergence"])
    assert actual["dweight"].dtype == actual["dbias"].dtype == torch.float32
    assert actual["dhidden"].dtype == torch.bfloat16
    wide = {name: x.float().requires_grad_(name == "hidden") for name, x in operands.items()}
    with torch.autocast(device, torch.bfloat16):
        divergence = linear_kl(**wide)
    assert torch.equal(divergence, expected["divergence"])
    divergence.sum().backward()
    assert wide["hidden"].grad.dtype == torch.float32


def test_strides(device):
    """Hidden states without their last position, and transposed weights."""
    operands = small(device, torch.bfloat16)
    expected = linear_kl(**operands | {name: operands[name][:, :-1].contiguous() for name in ("hidden", "teacher_hidden")})
    views = {name: operands[name].mT.contiguous().mT[:, :-1] for name in ("hidden", "teacher_hidden")}
    views |= {name: operands[name].T.contiguous().T for name in ("weight", "teacher_weight")}
    torch.testing.assert_close(linear_kl(**operands | views), expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_empty(need, device, shape, top_k, backend):
    operands = make(shape, 5, (4, 3), (torch.float32,) * 2, device)
    need("linear_kl", backend, operands["hidden"], operands["teacher_hidden"])
    result = run(operands, top_k=top_k, backend=backend)
    assert result["divergence"].shape == shape
    assert result["dhidden"].shape == (*shape, 4)
    assert result["dweight"].eq(0).all()
    assert run_sum(operands, torch.zeros(shape, device=device), top_k=top_k, backend=backend)["total"] == 0


def test_one_position(device):
    operands = small(device, rows=())
    for top_k in (None, 3):
        assert run(operands, top_k=top_k)["divergence"].shape == ()


@pytest.mark.parametrize("top_k", [0, 3])
def test_opcheck(device, top_k):
    operands = tuple(small(device).values())
    inputs = (*operands, None, None, None)
    settings = (0.4, 0.7, 1.0, None, 1.0, None, top_k, 2**20, True, 0, "auto")
    outputs = torch.ops.vlmkernels.linear_kl_fwd(*inputs, *settings)
    torch.library.opcheck(torch.ops.vlmkernels.linear_kl_fwd, (*inputs, *settings))
    gradient = (torch.ones_like(outputs[0]), *outputs[1:], [True, True, True])
    torch.library.opcheck(torch.ops.vlmkernels.linear_kl_bwd, (*gradient, *inputs, *settings))
    weights = (ramp(outputs[0]), [True, True, False])
    torch.library.opcheck(torch.ops.vlmkernels.linear_kl_sum, (*inputs, *weights, *settings))


@pytest.mark.parametrize("token_weights", [False, True])
def test_compile(device, token_weights):
    operands = small(device)
    leaves = [operands.pop(name).requires_grad_() for name in NAMES[:3]]
    weights = ramp(torch.empty(2, 3, device=device))

    def loss(hidden, weight, bias):
        options = {"mask": weights > 0, "top_k": None if token_weights else 3}
        if token_weights:
            return linear_kl(hidden * 1.5, weight, bias=bias, **operands, **options, token_weights=weights) * 2
        return (linear_kl(hidden * 1.5, weight, bias=bias, **operands, **options) * weights).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves))


GOOD = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(10, 4)}
GOOD |= {"teacher_hidden": torch.zeros(2, 3, 5), "teacher_weight": torch.zeros(10, 5)}
IDS = torch.zeros(2, 3, dtype=torch.long)
BAD = {
    "vocabulary": (
        {"teacher_weight": torch.zeros(11, 5)},
        ValueError,
        "teacher_weight must have the vocabulary of weight, 10 tokens, got 11",
    ),
    "width": ({"teacher_weight": torch.zeros(10, 4)}, ValueError, r"teacher_weight must be .* width of teacher_hidden, H = 5"),
    "teacher's tokens": (
        {"teacher_hidden": torch.zeros(6, 5)},
        ValueError,
        r"teacher_hidden must have the shape of hidden without its width, \(2, 3\), before its width, got \(6, 5\)",
    ),
    "only rows": ({"rows": IDS[0]}, ValueError, r"teacher_hidden must have the shape of rows, \(3,\), .* got \(2, 3, 5\)"),
    "teacher_rows": ({"teacher_rows": IDS[0]}, ValueError, r"teacher_rows must have the shape of hidden .* got \(3,\)"),
    "row": ({"rows": IDS + 6}, ValueError, r"rows must be in \[0, 6\), the rows of hidden \(2, 3\), got 6"),
    "teacher row": ({"teacher_rows": IDS - 1}, ValueError, r"teacher_rows must be in \[0, 6\), the rows of teacher_hidden"),
    "mask": ({"mask": IDS[0] == 0}, ValueError, r"mask must have the shape of hidden without its width, \(2, 3\), got \(3,\)"),
    "token_weights": ({"token_weights": torch.ones(5)}, ValueError, r"token_weights must have the shape .* got \(5,\)"),
    "differentiable token_weights": (
        {"token_weights": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        "token_weights must not require gradients",
    ),
    "beta": ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
    "beta next to 1": ({"beta": 1 - 1e-9}, ValueError, r"beta must be 0, 1 or in \[1e-06, 1 - 1e-06\], got 0.999999999"),
    "beta next to 0": ({"beta": 1e-50}, ValueError, r"beta must be 0, 1 or in \[1e-06, 1 - 1e-06\], got 1e-50"),
    "text as beta": ({"beta": "forward"}, TypeError, r"beta must be in \[0, 1\], got 'forward'"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be a positive integer or None, got 0"),
    "fractional top_k": ({"top_k": 2.5}, TypeError, "top_k must be a positive integer or None, got 2.5"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    "softcap": ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be a finite number > 0, got -1.0"),
    "bias": ({"teacher_bias": torch.zeros(9)}, ValueError, "teacher_bias must have the shape of the rows of teacher_weight"),
    "integers": ({"teacher_hidden": torch.zeros(2, 3, 5).int()}, TypeError, "teacher_hidden must have dtype .* got int32"),
    "no tensor": ({"teacher_weight": None}, TypeError, "teacher_weight must be a tensor, got NoneType"),
    "chunk_bytes": ({"chunk_bytes": 39}, ValueError, "chunk_bytes must hold one row of logits, 40 bytes, got 39"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_kl(**GOOD | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="logits are fp32 there")
@pytest.mark.parametrize("side", ["", "teacher_"])
def test_logits_beyond_fp16_are_named(side):
    operands = {name: x.half() for name, x in GOOD.items()}
    operands |= {f"{side}hidden": torch.full_like(operands[f"{side}hidden"], 300)}
    operands |= {f"{side}weight": torch.full_like(operands[f"{side}weight"], 300)}
    for options in ({}, {"token_weights": torch.ones(2, 3)}):
        with pytest.raises(ValueError, match=rf"^{side}hidden must have logits within fp16's range, up to 65504, got inf"):
            linear_kl(**operands | {"hidden": operands["hidden"].requires_grad_()}, **options)


def test_the_backend_serves_both_sides(device):
    operands = small(device) | {"teacher_hidden": torch.zeros(2, 3, 6, dtype=torch.float64, device=device)}
    operands |= {"teacher_weight": torch.zeros(20, 6, dtype=torch.float64, device=device), "teacher_bias": None}
    assert linear_kl(**operands).dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"no backend serves linear_kl: .*supports float32, bfloat16, float16, got"):
        linear_kl(**operands, backend="cuda" if device == "cuda" else "cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_does_not_wait_for_the_device(backend, top_k):
    operands = make((2, 3), 301, (8, 16), (torch.bfloat16, torch.bfloat16), "cuda")
    hidden, token_weights = operands.pop("hidden").requires_grad_(), torch.rand(2, 3, device="cuda")

    def step():
        results = [linear_kl(hidden, **operands, top_k=top_k, token_weights=x, backend=backend) for x in (None, token_weights)]
        return torch.autograd.grad(results[0].sum() + results[1], hidden)[0]

    expected = step()  # loads libraries and compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)
