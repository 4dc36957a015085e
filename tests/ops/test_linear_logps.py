"""linear_logps: every backend against the fp64 reference, values and gradients; memory budgets, accumulation, wrappers."""

import subprocess
import sys

import pytest
import torch
from support.budget import assert_within_budget
from support.linear_cases import KERNELS, ROW, make
from support.paths import environment
from support.selections import SELECTIONS, select

from vlmkernels import VocabParallel, gather_logps, linear_grpo_loss, linear_logps
from vlmkernels import backend as backends
from vlmkernels.ops import linear_logps as linear_logps_module
from vlmkernels.ops.linear_logps import sweep
from vlmkernels.ops.linear_logps.inputs import SelectedRows
from vlmkernels.ops.linear_logps.sweep import Head, narrowed

pytestmark = pytest.mark.device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(operands, targets, backend, **options):
    """logp, entropy and the gradients of a weighted sum of both."""
    operands = [x if x is None else x.clone().requires_grad_() for x in operands]
    hidden, weight, bias = operands
    logp, entropy = linear_logps(hidden, weight, targets, bias=bias, return_entropy=True, backend=backend, **options)
    of_logp = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype, device=logp.device).view_as(logp)
    wanted = {name: x for name, x in zip(("dhidden", "dweight", "dbias"), operands, strict=True) if x is not None}
    gradients = torch.autograd.grad([logp, entropy], list(wanted.values()), [of_logp, of_logp.flip(0) / 2])
    return {"logp": logp.detach(), "entropy": entropy.detach(), **dict(zip(wanted, gradients, strict=True))}


def check(operands, targets, backend, **options):
    """Compare a backend with the fp64 reference, within the error of the reference in the same dtype."""
    double = [x if x is None else x.double() for x in operands]
    exact = run(double, targets, "reference", **options | {"chunk_bytes": None})
    eager = run(operands, targets, "reference", **options)
    actual = run(operands, targets, backend, **options)
    # Terms cancel in the gradient of the bias, which sums a column of the logits' gradient, and in logp close to 0.
    scales = {"dbias": torch.linspace(-1, 2, targets.numel()).abs().sum().item()}
    scales["logp"] = scales["entropy"] = max(1.0, exact["logp"].abs().max().item())
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name], scale=scales.get(name))
    return actual


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [((1,), 2, 1), ((2, 3), 7, 5), ((21,), 1003, 33), ((3,), 9001, 9), ((3,), 10, 1030)],  # odd; longer than a block, both ways
)
def test_matches_fp64(need, device, nan_filled, backend, dtype, rows, vocab, width):
    operands, targets = make(rows, vocab, width, dtype, device)
    need("linear_logps", backend, operands[0])
    check(operands, targets, backend, temperature=0.7)
    check(operands, targets, backend, temperature=1.3, logit_scale=0.5, softcap=4.0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_rows", [None, 0, 5, 100])
def test_chunks_and_kept_logits(need, device, nan_filled, backend, dtype, keep_rows):
    """A chunk of 7 rows, the last one shorter; none, some or all logits kept."""
    vocab = 301
    operands, targets = make((4, 5), vocab, 16, dtype, device)
    need("linear_logps", backend, operands[0])
    itemsize = 4 if device == "cuda" else operands[0].element_size()
    keep = None if keep_rows is None else keep_rows * vocab * itemsize
    check(operands, targets, backend, chunk_bytes=7 * vocab * itemsize, keep_logits_bytes=keep)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_selected_results_are_computed(need, device, nan_filled, backend, dtype, selection):
    """Rows without a result are not multiplied (they are NaN here) and get gradient 0; gradients of repeated rows are added."""
    num, vocab = 12, 301
    operands, targets = make((num,), vocab, 16, dtype, device)
    need("linear_logps", backend, operands[0])
    options, targets, used = select(selection, targets)
    options["chunk_bytes"] = 5 * vocab * ROW
    operands[0][~used.to(device)] = torch.nan
    result = check(operands, targets, backend, **options)
    assert result["dhidden"][~used.to(device)].eq(0).all()
    if "mask" in options:
        assert result["logp"][~options["mask"]].eq(0).all()
        assert result["entropy"][~options["mask"]].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda", "without logits"])
def test_a_target_that_is_no_token_is_nan(need, device, monkeypatch, backend):
    """On a GPU no check waits for the device: a target outside of the vocabulary makes the result NaN."""
    monkeypatch.setattr(linear_logps_module, "require_indices", lambda *args: None)
    (hidden, weight, _), targets = make((3,), 20, 8, torch.float32, device, bias=False)
    targets[1:] = torch.tensor([20, -1])
    if backend == "without logits":
        need("linear_logps_fused", "triton", hidden)
        logps, entropy = linear_logps(hidden, weight, targets, return_entropy=True, chunk_bytes=0, backend="triton")
        rows = torch.tensor([0, 3, -1], device=device)
        of_rows = linear_logps(hidden, weight, targets.clamp(0, 19), rows=rows, chunk_bytes=0, backend="triton")
        assert of_rows.isnan().tolist() == [False, True, True]
        assert entropy.isfinite().all()
    else:
        need("linear_logps", backend, hidden)
        logps = linear_logps(hidden.requires_grad_(), weight, targets, backend=backend)
        (gradient,) = torch.autograd.grad(logps.sum(), hidden)
        assert gradient.isnan().all(1).tolist() == [False, True, True]
    assert logps.isnan().tolist() == [False, True, True]


def test_equals_gather_logps(device):
    """The formula of the docstring, computed by other code."""
    (hidden, weight, bias), targets = make((3, 4), 50, 8, torch.float64, device)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    mask = torch.arange(12, device=device).view(3, 4) % 5 > 0

    def gradients(results):
        return torch.autograd.grad([r.sum() * factor for r, factor in zip(results, (1.0, 0.3), strict=True)], inputs)

    logits = 2 * torch.tanh((hidden @ weight.T + bias) * 0.6 / 2)
    expected = gather_logps(logits, targets, temperature=0.8, mask=mask, return_entropy=True)
    options = {"temperature": 0.8, "logit_scale": 0.6, "softcap": 2.0, "mask": mask, "return_entropy": True}
    actual = linear_logps(hidden, weight, targets, bias=bias, **options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual), gradients(expected))


def test_gradcheck_of_the_reference(device):
    (hidden, weight, bias), targets = make((5,), 11, 3, torch.float64, device)
    rows = torch.tensor([0, 4, 4, 2], device=device)

    def function(hidden, weight, bias):
        options = {"rows": rows, "softcap": 3.0, "return_entropy": True, "chunk_bytes": 8 * 11 * 3}
        return linear_logps(hidden, weight, targets[:4], bias=bias, backend="reference", **options)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="logits are fp32 there")
@pytest.mark.parametrize("backend", KERNELS)
def test_the_target_of_rounded_logits_is_exact(need, device, backend):
    """16-bit logits are rounded by up to 2^-9 of their size, but the logit of the target is computed again in fp32."""
    (hidden, weight, bias), _ = make((128,), 300, 64, torch.bfloat16, device)
    need("linear_logps", backend, hidden)
    logits = hidden.double() @ weight.double().T + bias.double()
    targets = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    exact = linear_logps(hidden.double(), weight.double(), targets, bias=bias.double(), backend="reference")
    errors = [
        (logp.double() - exact).abs().mean()
        for logp in (
            linear_logps(hidden, weight, targets, bias=bias, backend=backend),
            gather_logps(torch.nn.functional.linear(hidden, weight, bias), targets),
        )
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [4, 1003, 1004, 9001])  # rows at every offset from an aligned address; several groups
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_fp32_logits_are_narrowed_in_place(need, device, backend, half, vocab, softcap):
    """As on a GPU, the logits of 16-bit operands are fp32, and their 16-bit gradient is written over them."""
    need("linear_logps", backend, torch.zeros(1, 1, dtype=half, device=device))
    rng = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(5, vocab, generator=rng)).to(device)
    targets = torch.tensor([0, vocab - 1, vocab // 2, 1, 2], device=device)
    dlogp = torch.linspace(-1, 2, 5, device=device)
    head = Head(torch.zeros(vocab, 1, dtype=half, device=device), None, 0.7, 1.0, softcap)
    results = {}
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        kernels = backends.load("linear_logps", name)
        x = logits.to(dtype)
        gradients = {"dlogp": dlogp.to(dtype), "dentropy": dlogp.flip(0).to(dtype)}
        selected = SelectedRows(targets, x.new_empty(5), x.new_empty(5), x.new_empty(5, 2), **gradients)
        kernels.fwd(x, torch.zeros(5, 1, dtype=half, device=device), selected, head)
        out = torch.empty_like(x) if name == "reference" else narrowed(x, half)
        kernels.bwd(x, selected, head, out)
        results[name] = selected.logp, selected.entropy, out
    for actual, exact in zip(results[backend][:2], results["reference"][:2], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    actual, exact = results[backend][2], results["reference"][2]
    assert actual.dtype == half
    assert ((actual.double() - exact).abs() <= torch.finfo(half).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_gemms_with_fp32_results(need, device, nan_filled, fp32_results, backend, half):
    """The logits are not rounded: values are as exact as in fp32; only gradients have the precision of the operands."""
    operands, targets = make((4, 5), 301, 16, half, device)
    need("linear_logps", backend, operands[0])
    exact = run([x.double() for x in operands], targets, "reference", temperature=0.8)
    for options in ({}, {"chunk_bytes": 7 * 301 * ROW}, {"chunk_bytes": 7 * 301 * ROW, "keep_logits_bytes": 5 * 301 * ROW}):
        actual = run(operands, targets, backend, temperature=0.8, **options)
        for name in ("logp", "entropy"):
            torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-5, atol=1e-5)
        for name in ("dhidden", "dweight", "dbias"):
            error = (actual[name].double() - exact[name]).abs().max()
            # Every term and the sum are rounded; the interpreter of Triton truncates instead.
            assert error < 4 * torch.finfo(half).eps * max(1.0, exact[name].abs().max())


# Views of a matrix in a buffer that is NaN elsewhere.
PLACES = {
    "rows of a wider buffer": lambda x, nan: nan(len(x), 2 * x.shape[1])[:, : x.shape[1]],
    "at an odd offset": lambda x, nan: nan(len(x), x.shape[1] + 2)[:, 1:-1],
    "columns of a longer buffer": lambda x, nan: nan(x.shape[1], len(x) + 3)[:, : len(x)].t(),
    "every second element": lambda x, nan: nan(len(x), 2 * x.shape[1])[:, ::2],
    "before other rows": lambda x, nan: nan(len(x) + 3, x.shape[1])[: len(x)],
}


def placed(matrix, place):
    view = PLACES[place](matrix, lambda *shape: torch.full(shape, torch.nan, dtype=matrix.dtype))
    return view.copy_(matrix).detach()


@pytest.fixture
def gemm_operands(monkeypatch):
    """The matrices that torch.mm and torch.addmm are called with."""
    seen = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)

        def recorded(*operands, product=product, **options):
            seen.extend(operands[-2:])
            return product(*operands, **options)

        monkeypatch.setattr(torch, name, recorded)
    return seen


def grpo_gradients(hidden, weight, bias, targets, **options):
    advantages = torch.linspace(-1, 2, len(targets))
    loss = linear_grpo_loss(hidden[None], weight, targets[None], advantages[None], bias=bias, **options).loss
    return torch.autograd.grad(loss, [hidden, weight])


def logps_gradients(hidden, weight, bias, targets, **options):
    logps = linear_logps(hidden, weight, targets, bias=bias, **options)
    return torch.autograd.grad(logps, [hidden, weight], torch.linspace(-1, 2, len(targets)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="oneDNN is on the CPU")
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "fp32 results"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradients", [logps_gradients, grpo_gradients])
def test_no_operand_with_gaps_reaches_a_gemm_on_the_cpu(request, monkeypatch, nan_filled, gradients, dtype, wide):
    """With AMX, oneDNN reads past the rows of such an operand."""
    if wide:
        request.getfixturevalue("fp32_results")
    gemm_operands = request.getfixturevalue("gemm_operands")
    monkeypatch.setattr(sweep, "VOCAB_BLOCK", 128)
    (hidden, weight, bias), targets = make((20,), 301, 33, dtype, "cpu")
    for options in ({}, {"chunk_bytes": 7 * 301 * ROW, "keep_logits_bytes": 0}):
        expected = gradients(hidden.requires_grad_(), weight.requires_grad_(), bias, targets, **options)
        for place in PLACES:
            views = [placed(x.detach(), place).requires_grad_() for x in (hidden, weight)]
            gemm_operands.clear()
            actual = gradients(*views, bias, targets, **options)
            assert len(gemm_operands) >= 6
            assert all(0 in x.shape or x.is_contiguous() or x.mT.is_contiguous() for x in gemm_operands)
            for ours, right in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_only_needed_gradients_are_computed(device, monkeypatch, needs):
    (hidden, weight, bias), targets = make((6,), 50, 8, torch.float32, device)
    operands = {"hidden": hidden, "weight": weight, "bias": bias}
    every = {name: x.clone().requires_grad_() for name, x in operands.items()}
    expected = torch.autograd.grad(linear_logps(**every, targets=targets).sum(), every[needs])[0]
    operands[needs].requires_grad_()
    shapes = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=product, **o: shapes.append(tuple((r := f(*a, **o)).shape)) or r)
    linear_logps(**operands, targets=targets).sum().backward()
    torch.testing.assert_close(operands[needs].grad, expected)
    assert shapes == {"hidden": [(6, 50), (6, 8)], "weight": [(6, 50), (50, 8)], "bias": [(6, 50)]}[needs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_weight_grad(device, dtype):
    """The gradient is added to weight.grad, and autograd sees none."""
    (hidden, weight, _), targets = make((9,), 40, 8, dtype, device, bias=False)
    weight.requires_grad_()
    options = {"chunk_bytes": 4 * 40 * ROW}
    linear_logps(hidden, weight, targets, **options).sum().backward()
    once, weight.grad = weight.grad, None
    calls = []
    weight.register_hook(calls.append)
    for _ in range(2):
        linear_logps(hidden, weight, targets, accumulate_weight_grad=True, **options).sum().backward()
    assert all(gradient is None for gradient in calls)
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad, 2 * once, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.03)


def test_accumulation_reaches_the_leaf_whatever_is_saved(device):
    """Checkpointing and offloading unpack saved tensors as other tensors."""
    (hidden, weight, _), targets = make((5,), 20, 4, torch.float32, device, bias=False)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(linear_logps(hidden, weight, targets).sum(), weight)

    def function(h):
        return linear_logps(h, weight, targets, accumulate_weight_grad=True)

    for run in (lambda: torch.utils.checkpoint.checkpoint(function, hidden, use_reentrant=False), lambda: function(hidden)):
        weight.grad = None
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            run().sum().backward()
        torch.testing.assert_close(weight.grad, expected)


def test_double_backward_is_refused(device):
    (hidden, weight, _), targets = make((5,), 20, 4, torch.float32, device, bias=False)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_logps(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("softcap", [300.0, 1e5, 1e20])
def test_wide_softcaps(need, device, backend, softcap):
    (hidden, weight, bias), targets = make((64,), 100, 16, torch.float32, device)
    need("linear_logps", backend, hidden)
    exact = linear_logps(hidden.double(), weight.double(), targets, bias=bias.double(), softcap=softcap, backend="reference")
    actual = linear_logps(hidden, weight, targets, bias=bias, softcap=softcap, backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-5)


def test_one_position(device):
    (hidden, weight, _), targets = make((1,), 20, 4, torch.float32, device, bias=False)
    assert linear_logps(hidden[0], weight, targets[0]).shape == ()


def test_fp32_master_weight(device):
    """The GEMM runs in 16 bits, and the gradients of weight and bias are fp32."""
    (hidden, weight, bias), targets = make((33,), 301, 16, torch.bfloat16, device)
    master = weight.float().requires_grad_()
    offset = bias.float().requires_grad_()
    linear_logps(hidden, master, targets, bias=offset, chunk_bytes=9 * 301 * ROW).sum().backward()
    exact = run([hidden.double(), weight.double(), bias.double()], targets, "reference")
    assert master.grad.dtype == offset.grad.dtype == torch.float32
    assert exact["dweight"].shape == master.grad.shape


def test_autocast(device):
    """Like a linear layer: operands are cast, and gradients have the dtype of the parameter."""
    (hidden, weight, _), targets = make((6,), 50, 8, torch.float32, device, bias=False)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        logp = linear_logps(hidden, weight, targets)
    expected = linear_logps(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(logp, expected)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_twice_backward(device):
    """The gradient is written over the kept logits; a second pass computes them again."""
    (hidden, weight, _), targets = make((6,), 50, 8, torch.float32, device, bias=False)
    weight.requires_grad_()
    logp = linear_logps(hidden, weight, targets).sum()
    first = torch.autograd.grad(logp, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logp, weight), first)


@pytest.mark.parametrize("backend", KERNELS)
def test_strides(need, device, backend):
    """Hidden states without their last position, and transposed; a transposed weight."""
    (hidden, weight, bias), targets = make((3, 5), 50, 8, torch.bfloat16, device)
    need("linear_logps", backend, hidden)

    def logps(hidden, weight):
        return linear_logps(hidden, weight, targets[:, :-1], bias=bias, backend=backend)

    expected = logps(hidden[:, :-1].contiguous(), weight)
    for view in (hidden, hidden.transpose(0, 1).contiguous().transpose(0, 1), hidden.mT.contiguous().mT):
        assert torch.equal(logps(view[:, :-1], weight), expected)
    torch.testing.assert_close(logps(hidden[:, :-1], weight.T.contiguous().T), expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty(device, shape):
    hidden = torch.zeros(*shape, 4, device=device, requires_grad=True)
    weight = torch.ones(5, 4, device=device, requires_grad=True)
    logp, entropy = linear_logps(hidden, weight, torch.zeros(shape, dtype=torch.long, device=device), return_entropy=True)
    assert logp.shape == entropy.shape == shape
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (*shape, 4)
    assert weight.grad.eq(0).all()


def test_opcheck(device):
    (hidden, weight, bias), targets = make((2, 3), 20, 4, torch.float32, device)
    inputs = (hidden, weight, bias, targets, targets > 3, None, 0.7, 1.0, None, 0, 20, 2**20, 80 * 4, 2**20, "auto")
    outputs = torch.ops.vlmkernels.linear_logps_fwd(*inputs)
    torch.library.opcheck(torch.ops.vlmkernels.linear_logps_fwd, inputs)
    gradients = (torch.ones_like(outputs[0]), None, *outputs, None, [True, True, True])
    torch.library.opcheck(torch.ops.vlmkernels.linear_logps_bwd, (*gradients, *inputs))


@pytest.mark.parametrize("chunk_bytes", [None, 3 * 50 * ROW])
def test_compile(device, chunk_bytes):
    (hidden, weight, bias), targets = make((2, 3), 50, 4, torch.float32, device)
    operands = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        options = {"mask": targets > 9, "return_entropy": True, "chunk_bytes": chunk_bytes}
        logp, entropy = linear_logps(hidden * 1.5, weight, targets, bias=bias, **options)
        return (logp + entropy.square()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*operands), operands), torch.autograd.grad(loss(*operands), operands)
    )


def test_compile_with_transposed_operands(device):
    """The gradients have the strides that the compiler expects, which only its default backend asserts."""
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=rng).to(device).requires_grad_() for s in ((5, 3, 8), (8, 40))]
    targets = torch.randint(40, (3, 5), generator=rng).to(device)

    def function(hidden, weight):
        return linear_logps(hidden.transpose(0, 1), weight.t(), targets).sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(function, fullgraph=True)(*leaves), leaves), expected)


def test_checkpointing(device):
    (hidden, weight, _), targets = make((6,), 50, 8, torch.float32, device, bias=False)
    operands = [x.requires_grad_() for x in (hidden, weight)]

    def function(hidden, weight):
        return linear_logps(hidden.tanh(), weight, targets).sum()

    expected = torch.autograd.grad(function(*operands), operands)
    loss = torch.utils.checkpoint.checkpoint(function, *operands, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, operands), expected)


def test_tied_embedding(device):
    """One parameter is embedding and head: its gradient is the sum of both."""
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    ids = torch.arange(6, device=device)

    def loss(logps):
        return logps(weight[ids].tanh(), weight, ids + 1).sum()

    (actual,) = torch.autograd.grad(loss(linear_logps), weight)

    def by_logits(hidden, weight, targets):
        return gather_logps(hidden @ weight.T, targets)

    torch.testing.assert_close(actual, torch.autograd.grad(loss(by_logits), weight)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU")
def test_several_processes():
    """Vocabulary-parallel with shards of unequal size, and FSDP2, on three processes: equal to one process."""
    processes = 3
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run([*command, "support.head_processes"], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal to one process") == processes


H = torch.zeros(2, 3, 4)
W = torch.zeros(10, 4)
T = torch.zeros(2, 3, dtype=torch.long)
BAD = {
    "width": ({"weight": torch.zeros(10, 5)}, ValueError, r"weight must be \(V, H\) .*H = 4, got \(10, 5\)"),
    "empty vocabulary": ({"weight": torch.zeros(0, 4)}, ValueError, "weight must be .*V >= 1"),
    "integer weight": ({"weight": W.int()}, TypeError, "weight must have dtype float32, got int32"),
    "fp8 weight": ({"weight": W.to(torch.float8_e4m3fn)}, TypeError, "weight must have dtype float32, got float8_e4m3fn"),
    "narrow weight": ({"weight": W.bfloat16()}, TypeError, "weight must have dtype float32, got bfloat16"),
    "integer hidden": ({"hidden": H.int()}, TypeError, "hidden must have dtype .* got int32"),
    "bias": ({"bias": torch.zeros(9)}, ValueError, r"bias must have the shape of the rows of weight, \(10,\), got \(9,\)"),
    "targets": (
        {"targets": T[0]},
        ValueError,
        r"targets must have the shape of hidden without its width, \(2, 3\), got \(3,\)",
    ),
    "targets of rows": ({"rows": T.flatten()[:2]}, ValueError, r"targets must have the shape of rows, \(2,\), got \(2, 3\)"),
    "dtype of targets": ({"targets": T.float()}, TypeError, "targets must be integers, got float32"),
    "mask": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must have the shape of targets"),
    "target": ({"targets": T + 10}, ValueError, r"targets must be in \[0, 10\), the vocabulary, got 10 at index \(0, 0\)"),
    "negative target": ({"targets": T - 1}, ValueError, r"targets must be in \[0, 10\)"),
    "row": ({"rows": T + 6}, ValueError, r"rows must be in \[0, 6\), the rows of hidden \(2, 3\), got 6"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be a finite number > 0, got -1.0"),
    "logit_scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must be a finite number > 0, got 0.0"),
    "temperature beyond fp32": (
        {"temperature": 1e-60},
        ValueError,
        r"temperature must be within \[1.2e-38, 1.7e\+38\], .* 1e-60",
    ),
    "softcap beyond fp32": ({"softcap": 1e39}, ValueError, r"softcap must be within .*, the range of fp32, got 1e\+39"),
    "quotient": ({"logit_scale": 1e20, "temperature": 1e-20}, ValueError, "logit_scale / temperature must be within .* got 1e"),
    "capped quotient": (
        {"logit_scale": 1e-20, "softcap": 1e20},
        ValueError,
        "logit_scale / softcap must be within .* got 1e-40",
    ),
    "chunk_bytes": ({"chunk_bytes": 39}, ValueError, "chunk_bytes must hold one row of logits, 40 bytes, got 39"),
    "keep_logits_bytes": (
        {"keep_logits_bytes": -1, "weight": W.clone().requires_grad_()},
        ValueError,
        r"keep_logits_bytes must be an integer in \[0, 2\*\*63\), got -1",
    ),
    "fractional chunk_bytes": ({"chunk_bytes": 1e6}, ValueError, "chunk_bytes must be an integer in .*, got 1000000.0"),
    "no tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "list of targets": ({"targets": ["a"]}, TypeError, "targets must be a tensor, an array or a list of numbers, got .*a"),
    "parallel": ({"vocab_parallel": VocabParallel(None, 0, 10)}, TypeError, "vocab_parallel must be None or a VocabParallel"),
    "parallel number": ({"vocab_parallel": 3}, TypeError, "vocab_parallel must be None or a VocabParallel with a group, got 3"),
    "shard": ({"vocab_parallel": VocabParallel("group", 5, 12)}, ValueError, "place the 10 rows .* got start 5, size 12"),
    "accumulated": (
        {"accumulate_weight_grad": True, "weight": W.clone().requires_grad_() * 1},
        ValueError,
        "accumulate_weight_grad must be False unless weight is a leaf",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_logps(**{"hidden": H, "weight": W, "targets": T} | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="logits are fp32 there")
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_logits_beyond_fp16_are_named(need, backend):
    """Logits that are inf in fp16, which would make the results NaN, raise an error. A softcap makes them finite."""
    hidden, weight = torch.tensor([[1.0], [300.0]]).half(), torch.full((5, 1), 300.0).half()
    need("linear_logps", backend, hidden)
    targets = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden must have logits within fp16's range, up to 65504, got inf at index \(1,\)"):
        linear_logps(hidden, weight, targets, backend=backend)
    assert linear_logps(hidden, weight, targets, softcap=30.0, backend=backend).isfinite().all()


def test_masked_targets_may_be_anything(device):
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    targets = T.to(device).masked_fill(~mask, 10**9)
    assert linear_logps(H.to(device), W.to(device), targets, mask=mask)[~mask].eq(0).all()
