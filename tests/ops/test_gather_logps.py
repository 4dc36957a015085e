"""gather_logps: every backend against the fp64 reference, values and gradients."""

import pytest
import torch
from support.gather_cases import assert_results_within_budget, check, run
from support.selections import SELECTIONS, select

from vlmkernels import backend as backends
from vlmkernels import gather_logps, use_backend

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(num, vocab, dtype, device, scale=3.0):
    rng = torch.Generator().manual_seed(num + vocab)
    logits = (scale * torch.randn(num, vocab, generator=rng)).to(device, dtype)  # rounded first: all see one input
    return logits, torch.randint(vocab, (num,), generator=rng).to(device), rng


@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_is_tested(backend, device):
    """A backend that this machine can run is not skipped below."""
    if device == "cuda" and backend == "cpp":
        assert "supports cpu tensors" in backends.why_not("gather_logps", backend, torch.zeros(1, 1, device=device))
    else:
        assert backends.why_not("gather_logps", backend, torch.zeros(1, 1, device=device)) is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num", "vocab"), [(1, 1), (1, 7), (33, 1000), (4, 5003), (2, 40000)])  # odd, > one block, split rows
def test_matches_fp64(need, device, nan_filled, backend, dtype, num, vocab):
    logits, targets, _ = make(num, vocab, dtype, device)
    need("gather_logps", backend, logits)
    check(logits, targets, backend, temperature=0.7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_selected_results_are_computed(need, device, nan_filled, backend, inplace_backward, selection):
    """Logits without a result are not read (they are NaN here) and get gradient 0; gradients of repeated rows are added."""
    num, vocab = 12, 301
    logits, targets, _ = make(num, vocab, torch.float32, device)
    need("gather_logps", backend, logits)
    options, targets, used = select(selection, targets)
    logits[~used.to(device)] = torch.nan
    check(logits, targets, backend, inplace_backward=inplace_backward, **options)
    result = run(logits, targets, backend, inplace_backward=inplace_backward, **options)
    assert result["dlogits"][~used].eq(0).all()
    if "mask" in options:
        assert result["logp"][~options["mask"].cpu()].eq(0).all()
        assert result["entropy"][~options["mask"].cpu()].eq(0).all()


def shifted(x):
    """The same values at an odd storage offset: rows are not aligned to 16 bytes."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "block without its last position": lambda x: x.view(3, 4, -1)[:, :-1],
    "every other row": lambda x: x[::2],
    "axes swapped": lambda x: x.view(3, 4, -1).transpose(0, 1),
    "odd offset": shifted,
    "one row repeated": lambda x: x[:1].expand(5, -1),
    "four axes": lambda x: x.view(3, 2, 2, -1),
    "no leading axis": lambda x: x[0],
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_leading_strides(need, device, nan_filled, backend, layout, dtype):
    logits, _, rng = make(12, 333, dtype, device)
    need("gather_logps", backend, logits)
    view = LAYOUTS[layout](logits)
    targets = torch.randint(333, view.shape[:-1], generator=rng).to(device)
    exact = run(view.contiguous().double(), targets, "reference")
    eager = run(view.contiguous(), targets, "reference")
    actual = run(view.detach(), targets, backend)
    assert_results_within_budget(actual, eager, exact, 333)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(need, device, backend, dtype):
    """Banned tokens (-inf), a token with probability 1, equal logits, strongly negative logits, the largest finite values."""
    logits, targets, _ = make(6, 50, dtype, device)
    need("gather_logps", backend, logits)
    logits[0, 10:] = -torch.inf
    logits[1, 3] = 300.0
    logits[2] = 0.0
    logits[3] -= 30000.0
    logits[4] = torch.linspace(-1, 1, 50).to(device) * torch.finfo(dtype).max
    targets[:2] = 3
    check(logits, targets, backend)
    actual = run(logits, targets, backend)
    assert all(value.isfinite().all() for value in actual.values())
    assert actual["dlogits"][0, 10:].eq(0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_logits_give_nan(need, device, backend):
    """NaN logits make the result NaN."""
    logits, targets, _ = make(2, 50, torch.float32, device)
    need("gather_logps", backend, logits)
    logits[0, 20] = torch.nan
    logp = gather_logps(logits, targets, backend=backend)
    assert logp[0].isnan()
    assert logp[1].isfinite()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("shape", "rows"), [((0, 5), None), ((2, 0, 5), None), ((3, 5), 0)])
def test_empty(need, device, backend, shape, rows):
    logits = torch.randn(shape, device=device, requires_grad=True)
    need("gather_logps", backend, logits)
    rows = None if rows is None else torch.zeros(rows, dtype=torch.int64, device=device)
    targets = torch.zeros(shape[:-1] if rows is None else rows.shape, dtype=torch.int64, device=device)
    logp = gather_logps(logits, targets, rows=rows, backend=backend)
    assert logp.shape == targets.shape
    logp.sum().backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_inplace_backward_returns_the_memory_of_the_logits(need, device, backend):
    logits, targets, _ = make(3, 40, torch.bfloat16, device)
    need("gather_logps", backend, logits)
    logits.requires_grad_()
    logp = gather_logps(logits, targets, inplace_backward=True, backend=backend)
    (dlogits,) = torch.autograd.grad(logp.sum(), logits)
    assert dlogits.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_only_the_entropy_or_only_the_logp_is_used(need, device, backend):
    logits, targets, _ = make(3, 40, torch.float32, device)
    need("gather_logps", backend, logits)
    logits.requires_grad_()
    logp, entropy = gather_logps(logits, targets, return_entropy=True, backend=backend)
    (from_logp,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    (from_entropy,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
    (from_both,) = torch.autograd.grad((logp + entropy).sum(), logits)
    torch.testing.assert_close(from_logp + from_entropy, from_both)
    (alone,) = torch.autograd.grad(gather_logps(logits, targets, backend=backend).sum(), logits)
    torch.testing.assert_close(alone, from_logp)


@pytest.mark.parametrize("options", [{}, {"mask": True}, {"rows": True}, {"rows": True, "mask": True}], ids=str)
def test_gradcheck_of_the_reference(options):
    logits, targets, _ = make(5, 7, torch.float64, "cpu")
    options = dict(options)
    if "rows" in options:
        options["rows"] = torch.tensor([3, 3, 0, 4, 3])
    if "mask" in options:
        options["mask"] = torch.tensor([True, True, False, True, True])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: gather_logps(x, targets, temperature=0.7, return_entropy=True, backend="reference", **options), logits
    )


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(need, device, backend, with_rows):
    logits, targets, _ = make(4, 20, torch.float32, device)
    need("gather_logps", backend, logits)
    rows = torch.tensor([1, 1, 0, 3], device=device) if with_rows else None
    mask = torch.tensor([True, False, True, True], device=device)
    logits.requires_grad_()
    args = (logits, targets, mask, rows, 0.7, True, False, backend)
    torch.library.opcheck(torch.ops.vlmkernels.gather_logps_fwd.default, args)
    _, entropy, stats = torch.ops.vlmkernels.gather_logps_fwd(*args)
    gradient = (torch.ones_like(entropy), None, targets, entropy.detach(), stats.detach(), mask, rows, 0.7, backend)
    torch.library.opcheck(torch.ops.vlmkernels.gather_logps_bwd.default, (logits.detach(), *gradient))
    torch.library.opcheck(torch.ops.vlmkernels.gather_logps_bwd_.default, (logits.detach().clone(), *gradient))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_compiles_whole(need, device, backend):
    logits, targets, _ = make(4, 20, torch.float32, device)
    need("gather_logps", backend, logits)
    logits.requires_grad_()

    def loss(x):
        logp, entropy = gather_logps(x * 2, targets, temperature=0.7, return_entropy=True, backend=backend)
        return (logp + 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))
    torch.testing.assert_close(*(torch.autograd.grad(f(logits), logits)[0] for f in (compiled, loss)))


def test_result_does_not_depend_on_threads():
    logits, targets, _ = make(9, 3001, torch.bfloat16, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(logits, targets, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for name in results[0]:
        assert results[0][name].equal(results[1][name])


def error_cases():
    x, t = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    m = torch.ones(2, 3, dtype=torch.bool)
    yield "targets shape", (x, t[:1]), {}, ValueError, r"targets must have the shape of logits .* \(2, 3\), got \(1, 3\)"
    yield "targets dtype", (x, t.float()), {}, TypeError, "targets must be integers, got float32"
    yield "logits dtype", (x.int(), t), {}, TypeError, "logits must be floating point, got torch.int32"
    yield "no vocabulary", (x[..., :0], t), {}, ValueError, r"logits must be \(..., V\) with V >= 1, got \(2, 3, 0\)"
    for value in (0.0, -1.0, float("nan"), float("inf")):
        yield f"temperature {value}", (x, t), {"temperature": value}, ValueError, f"temperature must be .* > 0, got {value}"
    yield "mask shape", (x, t), {"mask": m[0]}, ValueError, r"mask must have the shape of targets, \(2, 3\), got \(3,\)"
    yield "mask dtype", (x, t), {"mask": 2 * m.int()}, ValueError, "mask must hold only 0 and 1, got 2"
    yield "rows dtype", (x, t[0]), {"rows": m[0]}, TypeError, "rows must be integers, got bool"
    yield "rows shape", (x, t), {"rows": t[0]}, ValueError, r"targets must have the shape of rows, \(3,\), got \(2, 3\)"
    yield "backend", (x, t), {"backend": "tpu"}, ValueError, "backend must be one of auto, reference, .* got 'tpu'"
    yield "fp64", (x.double(), t), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, bfloat16, .* got float64"
    yield "expanded", (x[:1].expand(2, -1, -1), t), {"inplace_backward": True}, ValueError, "inplace_backward must .* stride 0"


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        gather_logps(*args, **options)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_index_out_of_range_on_the_cpu(backend, bad):
    x, t = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    t[1, 2] = bad
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 5\), .* got {bad} at index \(1, 2\)"):
        gather_logps(x, t, backend=backend)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert gather_logps(x, t, mask=mask, backend=backend)[1, 2] == 0
    with pytest.raises(ValueError, match=rf"rows must be in \[0, 6\), .* got {bad + 1 if bad > 0 else bad} at index \(0,\)"):
        gather_logps(x, t[0, :1], rows=torch.tensor([bad + 1 if bad > 0 else bad]), backend=backend)


@pytest.mark.device
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_index_out_of_range_gives_nan(monkeypatch, need, device, backend):
    """Where the indices are not checked: on a GPU."""
    logits, targets, _ = make(4, 100, torch.float32, device)
    need("gather_logps", backend, logits)
    monkeypatch.setattr("vlmkernels.ops.gather_logps.require_indices", lambda *args: None)
    targets[1], targets[2] = 100, -1
    wrong = [False, True, True, False]
    for result in gather_logps(logits, targets, return_entropy=True, backend=backend):
        assert result.isnan().tolist() == wrong
    rows = torch.tensor([0, 4, -1, 3], device=device)
    for result in gather_logps(logits, targets.clamp(0, 99), rows=rows, return_entropy=True, backend=backend):
        assert result.isnan().tolist() == wrong


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph(backend):
    logits, targets, _ = make(16, 4000, torch.bfloat16, "cuda")
    gather_logps(logits, targets, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp = gather_logps(logits, targets, backend=backend)
    logits.copy_(logits.flip(0))
    graph.replay()
    torch.testing.assert_close(logp, gather_logps(logits, targets, backend="reference"))


def test_use_backend(monkeypatch):
    x, t = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    assert gather_logps(x, t).dtype == torch.float64  # auto: the reference serves fp64
    with use_backend("cpp"), pytest.raises(NotImplementedError, match="no backend serves gather_logps: cpp: supports float32"):
        gather_logps(x, t)
    with use_backend("cpp"):
        gather_logps(x, t, backend="reference")  # the call's own name wins
    gather_logps(x, t)
    with (
        pytest.raises(ValueError, match=r"backend must be one of auto, reference, cpp, triton, cuda, parts, .*; got 'fast'"),
        use_backend("fast"),
    ):
        pass
