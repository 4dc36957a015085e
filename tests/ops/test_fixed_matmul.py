"""fixed_matmul: every backend against fp64, and bit for bit against itself with other numbers of rows."""

import pytest
import torch
from support.budget import assert_within_budget

from vlmkernels import backend as backends
from vlmkernels.ops.fixed_matmul import fixed_matmul, fixed_rows, is_fixed, tiles

pytestmark = pytest.mark.device
BACKENDS = ["tiles", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {
    "head": (140, 40, 130),
    "one column": (21, 48, 1),
    "odd": (19, 33, 50),
    "one row": (1, 128, 24),
    "one product": (3, 1, 5),
}


@pytest.fixture
def place(device):
    """The device of a backend's tensors."""

    def place_of(backend):
        if reason := backends.missing(backend):
            pytest.skip(reason)
        return torch.device("cpu") if backends.device_type(backend) == "cpu" else device

    return place_of


def make(size, dtype, device):
    """a, b as a transposed weight, and bias."""
    rows, inner, columns = SIZES[size]
    rng = torch.Generator().manual_seed(rows)
    a, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((rows, inner), (columns, inner), (columns,)))
    return a.to(device, dtype), weight.to(device, dtype).T, bias.to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_rows(place, nan_filled, backend, dtype, size):
    """Rows in other places, of other numbers of rows, and of strided and shifted tensors have the same bits."""
    a, b, bias = make(size, dtype, place(backend))
    for add in (None, bias):
        for out_dtype in {dtype, torch.float32}:
            out = fixed_matmul(a, b, bias=add, out_dtype=out_dtype, backend=backend)
            assert out.dtype == out_dtype
            wide = [x.double() for x in (a, b, bias)]
            exact = wide[0] @ wide[1] + (0 if add is None else wide[2])
            eager = a.to(out_dtype) @ b.to(out_dtype) + (0 if add is None else add.to(out_dtype))
            assert_within_budget("out", out.cpu(), eager.cpu(), exact.cpu())
            options = {"bias": add, "out_dtype": out_dtype, "backend": backend}
            for start, stop in ((0, 1), (0, 7), (1, 2), (2, len(a)), (5, 150)):
                assert torch.equal(fixed_matmul(a[start:stop], b, **options), out[start:stop])
            shuffled = torch.randperm(len(a), generator=torch.Generator().manual_seed(0)).to(a.device)
            assert torch.equal(fixed_matmul(a[shuffled], b, **options), out[shuffled])
            assert torch.equal(fixed_matmul(a.T.contiguous().T, b, **options), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_do_not_matter(place, backend):
    a, b, bias = make("head", torch.float32, place(backend))
    out = fixed_matmul(a, b, bias=bias, backend=backend)
    changed = a.clone()
    changed[1::2] = torch.nan
    assert torch.equal(fixed_matmul(changed, b, bias=bias, backend=backend)[::2], out[::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(place, backend):
    device = place(backend)
    for rows, inner, columns in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        out = fixed_matmul(torch.ones(rows, inner, device=device), torch.ones(inner, columns, device=device), backend=backend)
        assert torch.equal(out, torch.zeros(rows, columns, device=device))


def test_tiles_that_depend_on_places_are_not_used(monkeypatch):
    """With products in which a row depends on its place, rows are computed one by one."""

    def product(a, b, bias, out):
        torch.mm(a, b, out=out)
        if len(a) > 1:
            out.add_(torch.arange(len(a)).unsqueeze(1))

    monkeypatch.setattr(tiles, "_product", product)
    monkeypatch.setattr(tiles, "_checked", {})
    a, b, _ = make("head", torch.float32, "cpu")
    assert tiles._sizes(b, None) == (1,)
    torch.testing.assert_close(fixed_matmul(a, b, backend="tiles"), a @ b)


def test_fixed_rows_nests_and_is_per_thread():
    assert not is_fixed()
    with fixed_rows(), fixed_rows():
        assert is_fixed()
    assert not is_fixed()


def test_errors():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    cases = [
        (ValueError, r"a and b must be \(M, K\) and \(K, N\), got \(2, 3\) and \(2, 3\)", (a, a), {}),
        (ValueError, r"bias must be \(4,\), got \(3,\)", (a, b), {"bias": torch.ones(3)}),
        (TypeError, "b must be like a, float32 on cpu, got bfloat16 on cpu", (a, b.bfloat16()), {}),
        (ValueError, "out_dtype must be None, float32 or float32, got float16", (a, b), {"out_dtype": torch.float16}),
        (ValueError, "backend must be one of auto, tiles, triton; got 'cpp'", (a, b), {"backend": "cpp"}),
        (NotImplementedError, "tiles: supports floating point tensors, got torch.int64", (a.long(), b.long()), {}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            fixed_matmul(*args, **options)
