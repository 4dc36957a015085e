"""Products of a fixed number of rows by torch's GEMM.

Tiles have SMALL rows. Where the check shows that a product of LARGE rows has the same bits, most rows are in large tiles.
"""

import torch
from torch.nn.functional import pad

SMALL, LARGE = 16, 128
MIN_COLUMNS = 16  # narrower products run as matrix-vector products, in which a row depends on its place

_checked: dict[tuple, tuple[int, ...]] = {}  # product -> the sizes of tiles that have the same bits, largest first


def unsupported(a: torch.Tensor) -> str | None:
    return None if a.is_floating_point() else f"supports floating point tensors, got {a.dtype}"


def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    if out_dtype != a.dtype:
        a, b, bias = a.to(out_dtype), b.to(out_dtype), None if bias is None else bias.to(out_dtype)
    columns = b.shape[1]
    if columns < MIN_COLUMNS:
        b = pad(b, (0, MIN_COLUMNS - columns)).contiguous()
        bias = None if bias is None else pad(bias, (0, MIN_COLUMNS - columns))
    out = a.new_empty(len(a), b.shape[1])
    if not out.numel() or not a.shape[1]:
        return (out.zero_() if bias is None else out.copy_(bias))[:, :columns]
    a = a.contiguous()
    if a.data_ptr() % 64:
        a = a.clone()  # kernels may depend on the alignment
    sizes, start = _sizes(b, bias), 0
    for size in sizes:
        while len(a) - start >= size:
            _product(a[start : start + size], b, bias, out[start : start + size])
            start += size
    if start < len(a):
        rest = len(a) - start
        room = a.new_empty(sizes[-1], b.shape[1])
        _product(pad(a[start:], (0, 0, 0, sizes[-1] - rest)), b, bias, room)
        out[start:] = room[:rest]
    return out[:, :columns]


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _sizes(b: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    key = (b.shape, b.stride(), b.dtype, b.device, bias is None, torch.get_num_threads())
    if key not in _checked:
        _checked[key] = _check(b, bias)
    return _checked[key]


def _check(b: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    """Return the sizes of tiles with which a row has the same bits at all places."""
    width = b.shape[0]
    # Not random numbers: these must not change the random state. Values of all sizes, with rounding in every sum.
    rows = torch.arange(LARGE * width, device=b.device, dtype=torch.float32).view(LARGE, width)
    rows = ((rows * 0.6180339887).frac() - 0.5).to(b.dtype)

    def product(a: torch.Tensor, size: int) -> torch.Tensor:
        out = b.new_empty(len(a), b.shape[1])
        for tile, place in zip(a.split(size), out.split(size), strict=True):
            _product(tile, b, bias, place)
        return out.nan_to_num_()

    def moved(a: torch.Tensor, by: int) -> torch.Tensor:
        return torch.cat([tile.roll(by, 0) for tile in a.split(SMALL)])

    expected = product(rows, SMALL)
    for by in (1, 5):
        if not torch.equal(product(moved(rows, by), SMALL), moved(expected, by)):
            return (1,)
    alone = torch.zeros_like(rows)
    alone[3::SMALL] = rows[3::SMALL]
    if not torch.equal(product(alone, SMALL)[3::SMALL], expected[3::SMALL]):
        return (1,)
    same = torch.equal(product(rows, LARGE), expected) and torch.equal(product(rows.flip(0), LARGE), expected.flip(0))
    return (LARGE, SMALL) if same else (SMALL,)
