"""decode_attention: every backend against attention of each slot over its own copy of its path, in fp64."""

from itertools import product

import pytest
import torch
from support.budget import assert_within_budget

from vlmkernels import KeyValues, decode_attention
from vlmkernels import backend as backends

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def buffers(shape, dtype, rng, value_width):
    return [torch.randn(*shape, width, generator=rng).to(dtype) for width in (shape[-1], value_width)]


class Case:
    """Levels with random contents, NaN beyond the lengths, and the path of each slot as plain lists of (level, segment).

    Args:
        sizes: for each level the capacity of its segments and their lengths.
        segments: for each level the segment of each slot, or None.
        heads: Hq, Hkv, D, Dv.
        page_size: of the levels whose index is in ``paged``.
    """

    def __init__(self, sizes, segments, heads, dtype=torch.float32, paged=(), page_size=4, appends=True, window=None, seed=0):
        rng = torch.Generator().manual_seed(seed)
        query_heads, key_heads, width, value_width = heads
        self.slots = next(len(x) for x in [*segments, sizes[-1][1]] if x is not None)
        self.segments, self.window, self.appends = segments, window, appends

        def randn(*shape):
            return (2 * torch.randn(*shape, generator=rng)).to(dtype)

        self.query = randn(self.slots, query_heads, width)
        self.key, self.value = (randn(self.slots, key_heads, x) if appends else None for x in (width, value_width))
        self.levels, self.contents = [], []
        for index, (capacity, lengths) in enumerate(sizes):
            contents = [[randn(key_heads, length, x) for length in lengths] for x in (width, value_width)]
            table = None
            if index in paged:
                pages = -(-capacity // page_size)
                table = torch.randperm(len(lengths) * pages, generator=rng).view(len(lengths), pages)
            packed = []
            for of, x in zip(contents, (width, value_width), strict=True):
                if table is None:
                    buffer = torch.full((len(lengths), key_heads, capacity, x), NAN, dtype=dtype)
                    for n, tokens in enumerate(of):
                        buffer[n, :, : lengths[n]] = tokens
                else:
                    buffer = torch.full((table.numel(), key_heads, page_size, x), NAN, dtype=dtype)
                    for n, tokens in enumerate(of):
                        for j in range(lengths[n]):
                            buffer[table[n, j // page_size], :, j % page_size] = tokens[:, j]
                packed.append(buffer)
            if table is not None:  # what is never read may be anything
                for n, length in enumerate(lengths):
                    table[n, length // page_size + 1 :] = -7
            segment = None if segments[index] is None else torch.tensor(segments[index], dtype=torch.int32)
            table = None if table is None else table.int()
            self.levels.append(KeyValues(*packed, torch.tensor(lengths, dtype=torch.int32), segment, table))
            self.contents.append(contents)

    def exact(self):
        """Output, log-sum-exp in fp64."""
        outs, totals = [], []
        for s in range(self.slots):
            path = []
            for index, (segment, of) in enumerate(zip(self.segments, self.contents, strict=True)):
                n = s if segment is None else segment[s]
                if n < 0:
                    continue
                path.append([x[n].double() for x in of])
                if self.appends and index == len(self.levels) - 1:
                    path.append([x[s].double().unsqueeze(1) for x in (self.key, self.value)])
            q = self.query[s].double()
            if not path:
                path = [[torch.zeros(x.shape[1], 0, x.shape[3]).double() for x in self.levels[0][:2]]]
            k, v = (torch.cat(x, 1) for x in zip(*path, strict=True))
            if self.window is not None:
                k, v = k[:, -self.window :], v[:, -self.window :]
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            scores = (k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
            totals.append(scores.logsumexp(-1))
            outs.append((scores.softmax(-1).unsqueeze(1) @ v).squeeze(1))
        return torch.stack(outs), torch.stack(totals)

    def run(self, backend, device, change=lambda level: level):
        """Output, log-sum-exp and the buffers after the call."""
        levels = [change(on(device, level)) for level in self.levels]
        query, key, value = (x if x is None else x.to(device) for x in (self.query, self.key, self.value))
        out, lse = decode_attention(query, levels, key=key, value=value, window=self.window, return_lse=True, backend=backend)
        return out.cpu(), lse.cpu(), levels


def on(device, level):
    return KeyValues(*(x if x is None else x.to(device).clone() for x in level))


def place(backend, device):
    return "cpu" if backends.device_type(backend) == "cpu" else device


def check(case, backend, device, change=lambda level: level):
    exact, exact_lse = case.exact()
    eager, eager_lse, expected = case.run("reference", place(backend, device))
    out, lse, levels = case.run(backend, place(backend, device), change)
    assert_within_budget("out", out, eager, exact)
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert_within_budget("lse", lse[finite], eager_lse[finite], exact_lse[finite])
    for level, other in zip(levels, expected, strict=True):  # only the new tokens are written
        for x, y in zip(level[:2], other[:2], strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


GROUPS = [0, 2, 1, 0, 1]  # slots in no order; segment 3 has none

CASES = {
    "groups": ([(40, [40, 7, 33, 5]), (9, [3, 0, 8, 1, 8])], [GROUPS, None], (4, 2, 16, 16)),
    "several blocks and parts": ([(1100, [1100, 513]), (70, [64, 69])], [[1, 0], None], (2, 1, 8, 8)),
    "depth 4": (
        [(20, [17, 20, 3]), (6, [0, 6, 5]), (300, [280, 0]), (5, [4, 0, 1])],
        [[2, 0, 0], [1, 0, 2], [-1, 0, 1], None],
        (6, 3, 24, 24),
    ),
    "own tokens in any segment": ([(12, [12, 9]), (6, [1, 5, 0, 2, 4])], [[0, 1, 1], [4, 0, 2]], (7, 1, 40, 40)),
    "unused slots": ([(12, [12, 9]), (6, [1, 5, 0, 2])], [[0, -1, 1, -1], [2, -1, -1, 0]], (2, 2, 16, 16)),
    "only the new token": ([(4, [0, 0, 0])], [None], (3, 1, 16, 16)),
    "values of another width": ([(70, [70, 66]), (9, [3, 8, 0])], [[0, 1, 1], None], (8, 1, 72, 40)),
    "wide heads": ([(70, [70]), (9, [3, 8])], [[0, 0], None], (2, 1, 256, 256)),
    "many rows": ([(80, [75]), (9, [3] * 11)], [[0] * 11, None], (7, 1, 16, 16)),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("dtype", "name"), [*product(DTYPES[:2], CASES), (torch.float16, "groups")], ids=str)
def test_matches_fp64(need, device, nan_filled, backend, dtype, name):
    case = Case(*CASES[name], dtype)
    need("decode_attention", backend, *(x.to(place(backend, device)) for x in (case.query, *case.levels[0][:2])))
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("window", [1, 6, 30, 70])
def test_window(need, device, nan_filled, backend, window):
    sizes = [(104, [104, 7, 33, 5]), (9, [3, 0, 8, 1, 8])]
    case = Case(sizes, [GROUPS, None], (4, 2, 16, 16), window=window)
    need("decode_attention", backend, case.query.to(place(backend, device)))
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("paged", [(0,), (1,), (0, 1)], ids=["prompts", "own tokens", "both"])
@pytest.mark.parametrize("window", [None, 11])
def test_pages(need, device, nan_filled, backend, paged, window):
    sizes = [(40, [40, 7, 33, 5]), (12, [3, 0, 8, 1, 11])]
    case = Case(sizes, [GROUPS, None], (4, 2, 16, 16), paged=paged, window=window)
    need("decode_attention", backend, case.query.to(place(backend, device)))
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_without_new_tokens(need, device, nan_filled, backend):
    """Slots that see nothing get 0 and -inf."""
    case = Case([(12, [12, 0]), (6, [1, 5, 0])], [[0, -1, 1], None], (4, 2, 16, 16), appends=False)
    need("decode_attention", backend, case.query.to(place(backend, device)))
    check(case, backend, device)
    out, lse, _ = case.run(backend, place(backend, device))
    assert not out[2].any()
    assert lse[2].tolist() == [-torch.inf] * 4


def padded(x):
    """A part of a larger buffer whose other elements are NaN, at an odd offset from 16 bytes on the token axis."""
    buffer = x.new_full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 3, x.shape[3] + 8), NAN)
    part = buffer[: x.shape[0], : x.shape[1], 2 : x.shape[2] + 2, : x.shape[3]]
    return part.copy_(x)


def odd(x):
    buffer = x.new_full((x.numel() + 1,), NAN)
    return buffer[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "part of a larger buffer": padded,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "odd offset": odd,
}


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("dtype", "layout"), [*zip([torch.float32, *DTYPES[:2]], LAYOUTS, strict=True)], ids=str)
def test_any_strides(need, device, nan_filled, backend, dtype, layout):
    """Buffers are neither copied nor written outside."""
    case = Case([(12, [12, 9]), (6, [1, 5, 0])], [[0, 1, 1], None], (4, 2, 16, 16), dtype)
    need("decode_attention", backend, case.query.to(place(backend, device)))
    change = LAYOUTS[layout]
    check(case, backend, device, lambda level: level._replace(key=change(level.key), value=change(level.value)))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_strides_of_new_tokens(need, device, backend):
    """Queries, keys and values as parts of a fused qkv, and tables of larger buffers."""
    case = Case([(40, [40, 7]), (12, [3, 0, 8])], [[0, 1, 1], None], (4, 2, 16, 16), paged=(0,))
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    expected = case.run("reference", where)[0]
    qkv = torch.cat([case.query, case.key, case.value], 1).to(where)
    query, key, value = qkv.split([4, 2, 2], 1)
    levels = [on(where, level) for level in case.levels]
    table = levels[0].block_table
    wide = table.new_full((4, 2 * table.shape[1]), -7)
    wide[::2, ::2] = table
    levels[0] = levels[0]._replace(block_table=wide[::2, ::2])
    levels[1] = levels[1]._replace(lengths=levels[1].lengths.repeat_interleave(2)[::2])
    out = decode_attention(query, levels, key=key, value=value, backend=backend)
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_slot_does_not_depend_on_the_others(need, device, backend, dtype):
    """Bitwise: alone, in its group of more rows than a tile of tensor cores has, and in a group in another order."""
    case = Case([(530, [530, 520]), (70, [66, 0, 8, 1] + [2] * 8)], [[0, 0, 1] + [0] * 9, None], (2, 1, 16, 16), dtype)
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    out, lse, _ = case.run(backend, where)

    def some(slots, segment):
        shared, own = (on(where, level) for level in case.levels)
        own = KeyValues(*(x[slots] for x in own[:3]))
        levels = [shared._replace(segment=torch.tensor(segment, dtype=torch.int32, device=where)), own]
        query, key, value = (x[slots].to(where) for x in (case.query, case.key, case.value))
        some_out, some_lse = decode_attention(query, levels, key=key, value=value, return_lse=True, backend=backend)
        assert torch.equal(some_out.cpu(), out[slots])
        assert torch.equal(some_lse.cpu(), lse[slots])

    some([0], [0])
    some([2], [1])
    some([3, 2, 0], [0, 1, 0])


@pytest.mark.parametrize("backend", KERNELS)
def test_default_dtype(need, device, backend):
    """The memory of partial results does not depend on torch's default dtype."""
    case = Case([(300, [300]), (9, [3, 8])], [[0, 0], None], (2, 1, 16, 16))
    need("decode_attention", backend, case.query.to(place(backend, device)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(case, backend, device)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_grouped_once(need, device, backend):
    """A level that ``grouped`` returns gives the same result, and lists the slots of each segment."""
    case = Case([(9, [9, 3]), (3, [0, 2]), (3, [2, 1, 0])], [[1, 0, 1], [-1, 1, 0], None], (2, 2, 16, 16))
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    out, lse, _ = case.run(backend, where)
    again, again_lse, levels = case.run(backend, where, KeyValues.grouped)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    assert levels[0].order.tolist() == [1, 0, 2]
    assert levels[0].rank.tolist() == [0, 0, 1]
    assert levels[1].order.tolist() == [0, 2, 1]
    assert levels[1].rank.tolist() == [-1, 0, 0]
    assert levels[2].order is None

    def strided(level):
        level = level.grouped()
        columns = [x if x is None else torch.stack([x, -x], 1)[:, 0] for x in (level.order, level.rank)]
        return level._replace(order=columns[0], rank=columns[1])

    assert torch.equal(case.run(backend, where, strided)[0], out)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_extreme_scores(need, device, backend):
    """Scores of 10^4, -inf for a key of infinity, and NaN for a key of NaN."""
    case = Case([(70, [70]), (4, [1, 2, 3])], [[0, 0, -1], None], (2, 1, 16, 16))
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    case.query *= 1e4
    check(case, backend, device)
    case.key[0, 0, 0], case.value[2, 0, 5] = NAN, NAN
    out, _, _ = case.run(backend, where)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert out[2].isnan().any()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_empty(need, device, backend):
    where = place(backend, device)
    own = KeyValues(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 4), torch.zeros(2, dtype=torch.int32))
    none = KeyValues(
        torch.zeros(0, 1, 3, 8), torch.zeros(0, 1, 3, 4), torch.zeros(0, dtype=torch.int32), torch.tensor([-1, -1])
    )
    narrow = KeyValues(torch.zeros(2, 1, 0, 8), torch.zeros(2, 1, 0, 4), torch.zeros(2, dtype=torch.int32))
    need("decode_attention", backend, own.key.to(where))
    query = torch.zeros(2, 2, 8, device=where)
    for level in (own, none, narrow):
        assert not decode_attention(query, [on(where, level)], backend=backend).any()
    assert not decode_attention(query, [on(where, x) for x in (narrow, none, own)], backend=backend).any()
    assert decode_attention(query[:0], [on(where, own)], backend=backend).shape == (0, 2, 4)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_opcheck(need, device, backend):
    case = Case([(12, [12, 9]), (6, [1, 5, 0])], [[0, 1, 1], None], (2, 1, 16, 16))
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    shared, own = (level.grouped() for level in (on(where, level) for level in case.levels))
    query, key, value = (x.to(where) for x in (case.query, case.key, case.value))
    buffers = [own.key.nan_to_num(), own.value.nan_to_num()]
    fields = [list(x) for x in list(zip(shared, own, strict=True))[2:]]
    arguments = (query, key, value, *buffers, [shared.key], [shared.value], *fields, 7, 0.25, backend)
    torch.library.opcheck(torch.ops.vlmkernels.decode_attention.default, arguments)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_compiles_whole(need, device, backend):
    case = Case([(12, [12, 9]), (6, [1, 5, 0])], [[0, 1, 1], None], (2, 1, 16, 16))
    where = place(backend, device)
    need("decode_attention", backend, case.query.to(where))
    query, key, value = (x.to(where) for x in (case.query, case.key, case.value))

    def step(levels):
        out = decode_attention(query * 2, levels, key=key + 1, value=value, backend=backend)
        return out + 1, levels[-1].key[:, :, -1]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        levels = [on(where, level) for level in case.levels]
        results.append([*function(levels), levels[-1].key, levels[-1].value])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def small(**changes):
    fields = {
        "key": torch.zeros(2, 1, 3, 8),
        "value": torch.zeros(2, 1, 3, 4),
        "lengths": torch.zeros(2, dtype=torch.int32),
    }
    return KeyValues(**{**fields, **changes})


def error_cases():
    q, k, v = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.zeros(2, 1, 4)
    new = {"key": k, "value": v}
    yield "query shape", (q[0], [small()]), {}, ValueError, r"query must be \(S, Hq, D\) with .*, got \(2, 8\)"
    yield "query dtype", (q.int(), [small()]), {}, TypeError, "query must be floating point, got int32"
    yield "no level", (q, []), {}, ValueError, "levels must be 1 to 8, got 0"
    yield "tuple", (q, [tuple(small())]), {}, TypeError, r"levels\[0\] must be KeyValues, got tuple"
    yield (
        "key dtype",
        (q, [small(key=small().key.half())]),
        {},
        TypeError,
        r"levels\[0\].key must have dtype float32, got float16",
    )
    yield (
        "key width",
        (q, [small(key=torch.zeros(2, 1, 3, 4))]),
        {},
        ValueError,
        r"levels\[0\].key must be .* D = 8 .*\(2, 1, 3, 4\)",
    )
    three = small(key=torch.zeros(2, 3, 3, 8), value=torch.zeros(2, 3, 3, 4))
    yield "heads", (q, [three]), {}, ValueError, r"Hkv a divisor of 2, got \(2, 3, 3, 8\)"
    yield (
        "value",
        (q, [small(value=torch.zeros(2, 1, 4, 4))]),
        {},
        ValueError,
        r"levels\[0\].value must be \(\*\(2, 1, 3\), Dv\)",
    )
    wide = small(value=torch.zeros(2, 1, 3, 5))
    yield (
        "value widths",
        (q, [small(), wide]),
        {},
        ValueError,
        r"levels\[1\] must have the heads .* of levels\[0\], 1 and 4, got 1 and 5",
    )
    yield (
        "lengths",
        (q, [small(lengths=torch.zeros(3).int())]),
        {},
        ValueError,
        r"levels\[0\].lengths must have the shape .*\(3,\)",
    )
    yield (
        "lengths dtype",
        (q, [small(lengths=torch.zeros(2))]),
        {},
        TypeError,
        r"levels\[0\].lengths must be integers, got float32",
    )
    yield (
        "too few",
        (torch.zeros(3, 2, 8), [small()]),
        {},
        ValueError,
        r"levels\[0\] must have a segment for every slot .* got 2 for 3",
    )
    yield (
        "segment shape",
        (q, [small(segment=[0])]),
        {},
        ValueError,
        r"levels\[0\].segment must have the shape of the slots .*\(1,\)",
    )
    yield (
        "table",
        (q, [small(block_table=[0, 1])]),
        {},
        ValueError,
        r"levels\[0\].block_table must be \(N, max_pages\) .*\(2,\)",
    )
    yield "only a key", (q, [small()]), {"key": k}, ValueError, "key and value must be given together, got key only"
    yield (
        "key shape",
        (q, [small()]),
        {"key": v, "value": v},
        ValueError,
        r"key must have the shape of .*\(2, 1, 8\), got \(2, 1, 4\)",
    )
    yield "window", (q, [small()]), {"window": 0}, ValueError, "window must be an integer >= 1, got 0"
    yield "window type", (q, [small()]), {"window": 1.5}, TypeError, "window must be an integer >= 1, got 1.5"
    yield "scale", (q, [small()]), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"
    yield "gradient", (q.clone().requires_grad_(), [small()]), {}, ValueError, "must not require gradients"
    yield "too long", (q, [small(lengths=[1, 4])]), {}, ValueError, r"levels\[0\].lengths must be in \[0, 3\], .*, got 4 at 1"
    yield "negative", (q, [small(lengths=[-1, 2])]), {}, ValueError, r"levels\[0\].lengths must be in \[0, 3\], .*, got -1 at 0"
    yield "full", (q, [small(lengths=[2, 3])]), new, ValueError, r"levels\[0\].lengths must leave room .* below 3, got 3 at 1"
    yield (
        "segment",
        (q, [small(segment=[0, 2])]),
        {},
        ValueError,
        r"levels\[0\].segment must be in \[0, 2\), .*, got 2 for slot 1",
    )
    yield (
        "shared",
        (q, [small(segment=[1, 1])]),
        new,
        ValueError,
        r"levels\[0\].segment must be a different one .*, got 1 for slots 0 and 1",
    )
    pages = small(block_table=[[0, 1], [2, 0]], lengths=[4, 3])
    yield "page", (q, [pages]), {}, ValueError, r"levels\[0\].block_table must be in \[0, 2\), the pages, got 2 at \(1, 0\)"
    yield "new page", (q, [small(block_table=[[0, 9], [1, 1]], lengths=[3, 2])]), new, ValueError, r"got 9 at \(0, 1\)"
    double = small(key=small().key.double(), value=small().value.double())
    yield "fp64", (q.double(), [double]), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, .* float64"
    crosswise = small(key=torch.zeros(2, 1, 8, 3).transpose(2, 3))
    yield "last axis", (q, [crosswise]), {"backend": "cpp"}, NotImplementedError, "cpp: supports a contiguous last axis, got"


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    before = [x.clone() for level in args[1] for x in level[:2]]
    with pytest.raises(error, match=message):
        decode_attention(*args, **options)
    after = [x for level in args[1] for x in level[:2]]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))  # nothing has been written


@torch.no_grad()
def test_checks_after_a_valid_call():
    """A call whose shapes are known is still checked: its values, and what must be converted."""
    query = torch.ones(2, 2, 8)

    def run(level, **options):
        return decode_attention(query, [level], return_lse=True, **options)

    _, expected = run(small(lengths=torch.tensor([1, 2], dtype=torch.int32)), window=1)
    for lengths in (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2]), [1, 2]):
        assert torch.equal(run(small(lengths=lengths), window=1)[1], expected)
    with pytest.raises(ValueError, match=r"levels\[0\].lengths must be in"):
        run(small(lengths=torch.tensor([1, 4], dtype=torch.int32)))
    with pytest.raises(TypeError, match=r"levels\[0\].lengths must be integers"):
        run(small(lengths=torch.zeros(2)))
    with pytest.raises(TypeError, match=r"levels\[0\] must be KeyValues"):
        run(tuple(small()))
    with pytest.raises(TypeError, match="window must be an integer"):
        run(small(), window=True)
    crosswise = small(key=torch.zeros(2, 1, 8, 3).transpose(2, 3))
    with pytest.raises(NotImplementedError, match="cpp: supports a contiguous last axis"):
        run(crosswise, backend="cpp")


def test_lists_and_other_integers():
    level = small(lengths=[1, 2], segment=torch.tensor([1, 0]))
    assert decode_attention(torch.ones(2, 2, 8), [level]).shape == (2, 2, 4)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_values_that_a_gpu_does_not_check(need, device, monkeypatch, backend):
    """Segments, lengths and pages that do not exist give NaN for the slots that read them, and nothing is written outside."""
    where = place(backend, device)
    monkeypatch.setattr("vlmkernels.ops.decode_attention.require_values", lambda *args: None)
    case = Case([(40, [40, 7]), (12, [3, 0, 8, 2, 12, 5])], [[0, 1, 0, 1, 0, 1], None], (4, 2, 16, 16), paged=(0,))
    need("decode_attention", backend, case.query.to(where))
    for name in ("reference", backend):
        shared, own = (on(where, level) for level in case.levels)
        shared.segment[0], shared.segment[1] = 2, -3
        own.lengths[2], own.lengths[3] = 13, -5
        shared.block_table[1, 1] = 100
        filled = own.key.clone()
        query, key, value = (x.to(where) for x in (case.query, case.key, case.value))
        out, lse = decode_attention(query, [shared, own], key=key, value=value, return_lse=True, backend=name)
        # 0, 1: segment; 2, 3: length; 4: no room for the new token; 5: page
        assert out.isnan().flatten(1).all(1).tolist() == [True] * 6, name
        assert lse.isnan().all(), name
        changed = (own.key.nan_to_num() != filled.nan_to_num()).flatten(2).any(2).any(1)
        assert changed.tolist() == [True, True, False, False, False, True], name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph(backend):
    """The next step of a captured call: longer segments and another query."""
    case = Case([(40, [40, 7]), (12, [3, 0, 8])], [[0, 1, 1], None], (4, 2, 64, 64), torch.bfloat16)
    levels = [on("cuda", level).grouped() for level in case.levels]
    query, key, value = (x.cuda() for x in (case.query, case.key, case.value))

    def step():
        return decode_attention(query, levels, key=key, value=value, window=30, return_lse=True, backend=backend)

    step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    levels[-1].lengths.add_(1)
    query.mul_(0.5)
    graph.replay()
    for actual, expected in zip(results, step(), strict=True):
        assert torch.equal(actual, expected)
