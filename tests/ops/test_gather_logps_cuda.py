"""gather_logps in CUDA: tests of its own kernels. Values on every backend are tested in test_gather_logps.py."""

import ctypes

import pytest
import torch
from support.gather_cases import check

from vlmkernels import backend as backends
from vlmkernels import gather_logps
from vlmkernels.ops.gather_logps import native

pytestmark = pytest.mark.device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FWD = torch.ops.vlmkernels.gather_logps_fwd
BWD = torch.ops.vlmkernels.gather_logps_bwd
BWD_INPLACE = torch.ops.vlmkernels.gather_logps_bwd_


@pytest.fixture(autouse=True)
def _needs_cuda(need, device):
    need("gather_logps", "cuda", torch.zeros(1, 1, device=device))


@pytest.fixture
def traffic():
    """traffic(tensor) starts counting; traffic() returns (bytes loaded, bytes stored) within the tensor since then."""
    if torch.cuda.is_available():
        pytest.skip("counted on the host")
    library = ctypes.CDLL(backends.NATIVE["cuda"]().__file__)
    library.simt_watch.argtypes = [ctypes.c_size_t, ctypes.c_int64]
    library.simt_loaded.restype = library.simt_stored.restype = ctypes.c_int64

    def count(tensor=None):
        if tensor is None:
            return library.simt_loaded(), library.simt_stored()
        storage = tensor.untyped_storage()
        library.simt_watch(tensor.data_ptr(), storage.nbytes() - tensor.storage_offset() * tensor.element_size())
        return None

    yield count
    library.simt_watch(0, 0)


def split(monkeypatch, num: int, splits: int) -> None:
    """Split each of `num` rows over `splits` blocks."""
    monkeypatch.setattr(native, "_BLOCKS", num * splits)
    monkeypatch.setattr(native, "_MIN_SPLIT", 1)


def rows_at(offset, num, vocab, dtype, device, stride=None):
    """Logits that start `offset` elements after an aligned address, with NaN before and after them."""
    stride = stride or vocab
    rng = torch.Generator().manual_seed(vocab + offset)
    storage = torch.full((offset + num * stride + 16,), torch.nan, dtype=dtype, device=device)
    logits = storage[offset : offset + num * stride].view(num, stride)[:, :vocab]
    logits.copy_((3 * torch.randn(num, vocab, generator=rng)).to(dtype))
    return logits, torch.randint(vocab, (num,), generator=rng).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5, 40])  # 40: more than a warp merges at once, and some parts are empty
def test_parts_of_a_row_are_merged(device, nan_filled, monkeypatch, dtype, splits):
    split(monkeypatch, 4, splits)
    check(*rows_at(1, 4, 1003, dtype, device), "cuda", temperature=1.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 5, 8, 23, 1003])
@pytest.mark.parametrize("offset", [0, 3])
def test_misaligned_rows(device, nan_filled, dtype, vocab, offset):
    """Rows of an odd length start at every offset from an aligned address."""
    check(*rows_at(offset, 16, vocab, dtype, device), "cuda", temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1008, 1011])
def test_gradient_aligned_unlike_the_logits(device, nan_filled, dtype, stride):
    """Logits with a row stride, a gradient without: the 16-byte vectors of their rows start at different elements."""
    check(*rows_at(3, 3, 1003, dtype, device, stride), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_with_many_results(device, nan_filled, dtype):
    """A block processes several groups of vectors. Targets are in all groups, at the edges, and twice at one element."""
    num, vocab = 33, 9001
    logits, _ = rows_at(1, num, vocab, dtype, device)
    rows = torch.tensor([4] * 40 + [0, 31]).to(device)
    targets = torch.tensor([0, 0, 9000, 9000, 7, 7, *range(2000, 9000, 206), 5, 8999])
    assert len(targets) == len(rows)
    check(logits, targets.to(device), "cuda", rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_in_place_touches_nothing_else(device, dtype, offset):
    num, vocab, stride = 5, 1003, 1010
    logits, targets = rows_at(offset, num, vocab, dtype, device, stride)
    mask = torch.tensor([True, False, True, True, False], device=device)
    whole = logits._base if logits._base is not None else logits
    before = whole.clone()
    logp, entropy, stats = FWD(logits, targets, mask, None, 0.9, True, True, "cuda")
    gradient = (torch.ones_like(logp), torch.ones_like(logp) / 2, targets, entropy, stats, mask, None, 0.9, "cuda")
    expected = BWD(logits, *gradient)
    BWD_INPLACE(logits, *gradient)
    assert torch.equal(logits, expected)
    assert not logits[~mask].any()
    logits.zero_()
    before.as_strided(logits.shape, logits.stride(), logits.storage_offset()).zero_()
    assert torch.equal(whole.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1003, 40000])  # 40000: split rows
def test_reads_once_and_writes_once(device, traffic, dtype, vocab):
    logits, targets = rows_at(1, 2, vocab, dtype, device)
    nbytes = logits.numel() * logits.element_size()
    traffic(logits)
    logp, entropy, stats = FWD(logits, targets, None, None, 1.0, True, False, "cuda")
    assert traffic() == (nbytes + 2 * logits.element_size(), 0)  # and each target once more
    gradient = (torch.ones_like(logp), torch.ones_like(logp), targets, entropy, stats, None, None, 1.0, "cuda")
    traffic(logits)
    BWD(logits, *gradient)
    assert traffic() == (nbytes, 0)
    traffic(logits)
    BWD_INPLACE(logits, *gradient)
    assert traffic() == (nbytes, nbytes)


@pytest.mark.parametrize("splits", [1, 3])
def test_masked_rows_are_not_read(device, traffic, monkeypatch, splits):
    split(monkeypatch, 2, splits)
    logits, targets = rows_at(1, 2, 1003, torch.bfloat16, device)
    mask = torch.tensor([True, False], device=device)
    targets[1] = -100
    traffic(logits[1])
    logp, entropy, stats = FWD(logits, targets, mask, None, 1.0, True, False, "cuda")
    dlogits = BWD(logits, torch.ones_like(logp), None, targets, entropy, stats, mask, None, 1.0, "cuda")
    assert traffic() == (0, 0)
    for result in (logp, entropy, stats, dlogits):
        assert not result[1].any()


@pytest.mark.parametrize("splits", [1, 3])
def test_what_does_not_exist_gives_nan(device, monkeypatch, splits):
    """On a GPU only the kernel checks targets and rows: a wrong one makes the result NaN."""
    monkeypatch.setattr("vlmkernels.ops.gather_logps.require_indices", lambda *_: None)
    split(monkeypatch, 4, splits)
    logits, targets = rows_at(0, 4, 1000, torch.float32, device)
    bad = targets.clone()
    bad[1:3] = torch.tensor([1000, -1], device=device)
    logits.requires_grad_()
    logp, entropy = gather_logps(logits, bad, return_entropy=True, backend="cuda")
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, True, False]
    (dlogits,) = torch.autograd.grad(logp.sum(), logits)
    assert dlogits.isnan().all(1).tolist() == dlogits.isnan().any(1).tolist() == [False, True, True, False]

    rows = torch.tensor([3, 4, -1, 0, 3], device=device)
    split(monkeypatch, 5, splits)
    logp = gather_logps(logits, targets[[3, 0, 0, 0, 1]], rows=rows, backend="cuda")
    assert logp.isnan().tolist() == [False, True, True, False, False]
    expected = gather_logps(logits, targets[[3, 0, 0, 0, 1]], rows=rows.clamp(0, 3), backend="reference")
    dlogp = torch.tensor([1.0, 0, 0, 2, 3], device=device)
    actual, expected = (torch.autograd.grad(t, logits, dlogp)[0] for t in (logp, expected))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_logits(device, monkeypatch, dtype, splits):
    """Impossible tokens have probability and gradient 0, also if a whole part of a row is impossible; NaN spreads."""
    split(monkeypatch, 3, splits)
    vocab = 1003
    logits, targets = rows_at(0, 3, vocab, dtype, device)
    targets[:] = vocab - 1
    logits[0, : vocab // 2] = -torch.inf
    logits[1, : vocab - 1] = torch.finfo(dtype).min
    logits[2, 77] = torch.nan
    logits.requires_grad_()
    logp, entropy = gather_logps(logits, targets, return_entropy=True, backend="cuda")
    (dlogits,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, False, True]
    possible = logits.detach()[0, vocab // 2 :].float()
    torch.testing.assert_close(logp[0].detach(), possible.log_softmax(0)[-1])
    assert (dlogits[0, : vocab // 2] == 0).all()
    assert dlogits[0].isfinite().all()
    assert logp[1] == entropy[1] == 0
    assert (dlogits[1] == 0).all()
    assert dlogits[2].isnan().all()


def test_launch_errors_name_what_failed(device):
    launcher = backends.load("gather_logps", "cuda")
    params = launcher.module.GatherLogps(num_results=1, splits=1, num_rows=1, vocab=1)
    many_rows = launcher.module.GatherLogps(num_results=1, splits=1, num_rows=2**31, vocab=1)
    many_blocks = launcher.module.GatherLogps(num_results=2**30, splits=4, num_rows=1, vocab=1)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice: .+"):
        launcher.module.gather_logps_fwd_cuda(params, 999, 0)
    with pytest.raises(
        RuntimeError, match=r"gather_logps: the numbers of rows and results .+ below 2\^31, got 2147483648, 1 and 1"
    ):
        launcher.module.gather_logps_bwd_cuda(many_rows, 0, 0)
    with pytest.raises(
        RuntimeError, match=r"gather_logps_fwd_kernel: the grid must have fewer than 2\^31 blocks, got 4294967296"
    ):
        launcher.module.gather_logps_fwd_cuda(many_blocks, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("num", [2, 600])  # with and without the kernel that merges parts
def test_in_a_cuda_graph_and_on_a_stream(num):
    logits = torch.randn(num, 40000, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(40000, (num,), device="cuda")

    def step():
        results = FWD(logits, targets, None, None, 1.0, True, False, "cuda")
        return *results, BWD(logits, results[0], results[1], targets, *results[1:], None, None, 1.0, "cuda")

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, on_stream, captured, strict=True):
        assert torch.equal(a, b)  # the same bits: the order of every sum is fixed
        assert torch.equal(a, c)
