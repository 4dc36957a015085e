"""sample_logps: every backend against the distribution of transformers' logits processors, by enumeration of uniforms."""

import itertools

import pytest
import torch
from support.sampling_cases import ROUNDING, assert_inverts_the_cdf, assert_samples, plain

from vlmkernels import backend as backends
from vlmkernels import sample_logps

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
ALL = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.cuda.is_available()
LAST = 1 - 2**-53  # the greatest number below 1


def make(num, vocab, dtype=torch.float32, scale=3.0):
    rng = torch.Generator().manual_seed(num + vocab)
    logits = (scale * torch.randn(num, vocab, generator=rng)).to(dtype)
    return logits, torch.rand(num, dtype=torch.float64, generator=rng), rng


def on_every_backend(names, few):
    """Parametrize (backend, name): all names, but only ``few`` where kernels of a GPU run slowly, on the CPU."""
    pairs = [(b, n) for b in ALL for n in (names if GPU or b in ("reference", "cpp") else few)]
    return pytest.mark.parametrize(("backend", "name"), pairs)


def some(values, backend):
    """``values``, or three of them where kernels of a GPU run slowly."""
    return values if GPU or backend in ("reference", "cpp") else values[len(values) // 6 :: max(1, len(values) // 3)]


def sample(logits, uniform, backend, device, **options):
    """The results on the CPU."""

    def moved(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    options = {name: moved(value) for name, value in options.items()}
    result = sample_logps(moved(logits), moved(uniform), backend=backend, **options)
    return type(result)(*(x.cpu() for x in result))


@pytest.fixture
def needed(need, device):
    """needed(backend): skip the test if the backend does not support this machine."""
    return lambda backend, dtype=torch.float32: need("sample_logps", backend, torch.zeros(1, 1, device=device, dtype=dtype))


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8, "temperature": 0.8},
    "top_p": {"top_p": 0.9, "temperature": 1.3},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2},
}


def bans(num, vocab, rng):
    """A table without and one with many banned tokens, among them the first and the last."""
    banned = torch.zeros(2, vocab, dtype=torch.bool)
    banned[1] = torch.rand(vocab, generator=rng) < 0.5
    banned[1, [0, -1]] = True
    banned[1, vocab // 2] = False
    return {"banned": banned, "banned_rows": torch.arange(num) % 2}


@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_is_tested(backend, device):
    """A backend that this machine can run is not skipped below."""
    if device == "cuda" and backend == "cpp":
        assert "supports cpu tensors" in backends.why_not("sample_logps", backend, torch.zeros(1, 1, device=device))
    else:
        assert backends.why_not("sample_logps", backend, torch.zeros(1, 1, device=device)) is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "num", "vocab"),  # one token, one block, short last blocks
    [(DTYPES[0], 1, 1), (DTYPES[0], 3, 7), (DTYPES[0], 3, 9003), (DTYPES[1], 3, 1025), (DTYPES[2], 3, 5001)],
)
def test_matches_fp64(needed, device, nan_filled, backend, dtype, num, vocab):
    needed(backend, dtype)
    logits, uniform, rng = make(num, vocab, dtype)
    seen = torch.rand(num, vocab, generator=rng) < 0.3
    for options in (
        {"temperature": 0.7},
        {"banned": torch.arange(vocab) == vocab + 3 * (vocab > 1) - 5},
        {"temperature": 1.3, "repetition_penalty": 1.2, "seen": seen, **(bans(num, vocab, rng) if vocab > 2 else {})},
    ):
        assert_samples(sample(logits, uniform, backend, device, **options), logits, uniform, **options)


@on_every_backend(FILTERS, ["all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filters(needed, device, nan_filled, backend, dtype, name):
    """Filters of random logits over several blocks, with and without banned tokens and a penalty."""
    needed(backend, dtype)
    num, vocab, options = 2, 3500, FILTERS[name]
    logits, uniform, rng = make(num, vocab, torch.float32)
    logits = distinct(logits).to(dtype)
    seen = torch.rand(num, vocab, generator=rng) < 0.3
    for more in ({"repetition_penalty": 1.2, "seen": seen, **bans(num, vocab, rng)}, {})[: 1 + (name != "all")]:
        result = sample(logits, uniform, backend, device, **options, **more)
        assert_samples(result, logits, uniform, **options, **more)


def distinct(logits):
    """The same order of the scores, but bf16 does not round two of the greatest to the same number."""
    order = logits.argsort(1).argsort(1)
    return torch.where(order >= logits.shape[1] - 100, (order - logits.shape[1] + 400) / 32, (logits / 4).clamp(max=4))


@on_every_backend(FILTERS, FILTERS)
def test_every_part_of_the_cdf(needed, device, backend, name):
    """A grid of uniforms samples the tokens in the order and with the shares of transformers' distribution."""
    needed(backend)
    grid = some((torch.arange(400, dtype=torch.float64) + 0.5) / 400, backend)
    fast = len(grid) == 400
    logits = make(1, 40)[0]
    logits[0, 7] = logits[0, 21] = logits[0, 33] = logits.sort().values[0, -5]  # ties at the boundary of top_k
    seen = torch.zeros(1, 40, dtype=torch.bool)
    seen[0, [3, 17, 30]] = True
    for banned, penalty in itertools.product((None, torch.arange(40) % 9 == 0)[not fast :], (1.0, 1.4)[not fast :]):
        options = {**FILTERS[name], "banned": banned, "repetition_penalty": penalty}
        expected = plain(logits.double(), seen=seen, **options).probabilities
        rows = {"seen": seen.expand(len(grid), -1)} if penalty != 1 else {}
        ids = sample(logits.expand(len(grid), -1), grid, backend, device, **options, **rows).ids
        cdf = expected[0].cumsum(0)
        interior = (grid.unsqueeze(1) - cdf).abs().amin(1) > ROUNDING
        assert ids[interior].equal(torch.searchsorted(cdf, grid.contiguous(), right=True)[interior])
        assert interior.sum() > 0.97 * len(grid)
        assert_inverts_the_cdf(ids, expected.expand(len(grid), -1), grid)


@on_every_backend([0.25, 0.5, 0.9], [0.5])
def test_equal_scores_at_the_boundary_of_top_p(needed, device, backend, name):
    """Of equal scores, as many are kept as by transformers, of the smallest ids; a sum of exactly top_p is enough."""
    needed(backend)
    logits = torch.zeros(1, 16)
    logits[0, 4] = -1e4
    expected = plain(logits, top_p=name).probabilities[0] > 0
    grid = some((torch.arange(64, dtype=torch.float64) + 0.5) / 64, backend)
    ids = sample(logits.expand(len(grid), -1), grid, backend, device, top_p=name).ids
    kept = expected.nonzero()[:, 0]
    assert ids.equal(kept[(grid * len(kept)).long()])


@pytest.mark.parametrize("backend", ALL if GPU else ["reference", "cpp"])
def test_chi_square(needed, device, backend):
    needed(backend)
    num, vocab = 5000, 12
    options = {"temperature": 1.5, "top_k": 10, "top_p": 0.95}
    logits, _, rng = make(1, vocab, scale=1.0)
    uniform = torch.rand(num, dtype=torch.float64, generator=rng)
    ids = sample(logits.expand(num, -1), uniform, backend, device, **options).ids
    expected = num * plain(logits.double(), **options).probabilities[0]
    counts = ids.bincount(minlength=vocab)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < 27.9  # of chi-square with at most 9 degrees of freedom, one in 1000 is greater
    assert len(counts[kept]) == 9


@on_every_backend(FILTERS, ["none", "all"])
def test_never_a_token_of_probability_0(needed, device, backend, name):
    """At both ends of the uniforms: banned, filtered, impossible and underflowing tokens are first and last in the row."""
    needed(backend)
    vocab = 2100
    logits = make(4, vocab)[0]
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[:500], banned[-500:] = True, True
    logits[:, 500:505], logits[:, -505:-500] = -torch.inf, -torch.inf
    logits[:, 505:1100], logits[:, -1030:-505] = -1000.0, -1000.0
    logits[:, 1] = 200.0  # the greatest logit is banned
    uniform = torch.tensor([0.0, LAST, 5e-324, 0.5], dtype=torch.float64)
    options = {**FILTERS[name], "banned": banned, "repetition_penalty": 1.1, "seen": torch.arange(vocab).expand(4, -1) % 3 == 0}
    result = sample(logits, uniform, backend, device, **options)
    q = plain(logits, **options).probabilities
    assert_inverts_the_cdf(result.ids, q, uniform)
    possible = (q > 0).float()
    assert result.ids[0] == possible[0].argmax()
    assert result.ids[1] == vocab - 1 - possible[1].flip(0).argmax()
    assert result.logps.isfinite().all()
    assert result.log_kept_mass.isfinite().all()
    assert result.log_kept_mass[0] < -100


@pytest.mark.parametrize("backend", ALL)
def test_tokens_of_tiny_probability_keep_their_share(needed, device, backend):
    """Within a block every token is sampled in its own part of [0, 1), though fp32 cannot tell its sum from that before it."""
    needed(backend)
    logits = torch.full((1, 1000), -20.0)
    logits[0, 3] = 0.0
    cdf = logits.double().softmax(1).cumsum(1)[0]
    tokens = some(torch.arange(5, 1000, 7), backend)
    uniform = (cdf[tokens - 1] + cdf[tokens]) / 2
    ids = sample(logits.expand(len(tokens), -1), uniform, backend, device).ids
    assert ids.equal(tokens)
    # Behind other blocks, the part is shifted by rounding of their sums, but each token has one.
    logits = torch.cat([logits.flip(1), torch.full((1, 2000), -20.0)], 1)
    cdf = logits.double().softmax(1).cumsum(1)[0]
    tokens = some(torch.arange(2100, 3000, 9), backend)
    ids = sample(logits.expand(len(tokens), -1), cdf[tokens], backend, device).ids
    assert (ids - tokens).abs().max() < 60
    assert len(ids.unique()) >= 0.95 * len(ids)


@pytest.mark.parametrize("backend", ALL)
def test_greedy(needed, device, nan_filled, backend):
    """The greatest score, of equal ones the first; log_kept_mass equals logps."""
    needed(backend)
    num, vocab = 5, 2500
    logits, _, rng = make(num, vocab)
    logits[1, [900, 2000]] = 50.0
    logits[2, [0, 2499]] = 50.0
    seen = torch.zeros(num, vocab, dtype=torch.bool)
    seen[1, 900] = True
    options = bans(num, vocab, rng)
    options["banned"][1, [900, 2000]] = False
    options["banned"][1] |= logits[3] > 8
    result = sample(logits, None, backend, device, top_k=3, repetition_penalty=1.5, seen=seen, **options)
    scores = torch.where(seen, logits / 1.5, logits).masked_fill(options["banned"][options["banned_rows"]], -torch.inf)
    assert result.ids.equal(scores.argmax(1))
    assert result.ids[:3].tolist()[1:] == [2000, 0]
    assert result.log_kept_mass.equal(result.logps)
    exact = logits.double().log_softmax(1).gather(1, result.ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(result.logps.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("greedy", "filters"), [(True, {}), (False, {}), (False, {"top_k": 3, "top_p": 0.9})], ids=str)
def test_rows_without_a_token(needed, device, nan_filled, backend, greedy, filters):
    """-1 for NaN or +inf, also of a banned token; -2 if all tokens are banned or -inf. Other rows are not affected."""
    needed(backend)
    num, vocab = 8, 1500
    logits, uniform, _ = make(num, vocab)
    banned = torch.zeros(3, vocab, dtype=torch.bool)
    banned[1, :10], banned[2] = True, True
    tables = torch.tensor([0, 0, 0, 1, 2, 0, 1, 0])
    logits[0, 1200], logits[2, 3], logits[3, 4] = torch.nan, torch.inf, torch.nan
    logits[5], logits[6, 10:] = -torch.inf, -torch.inf
    options = {**filters, "banned": banned, "banned_rows": tables}
    result = sample(logits, None if greedy else uniform, backend, device, **options)
    assert result.ids[[0, 2, 3, 4, 5, 6]].tolist() == [-1, -1, -1, -2, -2, -2]
    for values in result[1:]:
        assert values[[0, 2, 3, 4, 5, 6]].isnan().all()
        assert values[[1, 7]].isfinite().all()
    alone = sample(logits[[1, 7]], None if greedy else uniform[[1, 7]], backend, device, **filters)
    for values, expected in zip(result, alone, strict=True):
        assert values[[1, 7]].equal(expected)


@on_every_backend(FILTERS, ["none", "all"])
def test_extreme_logits(needed, device, backend, name):
    """A token with probability 1, equal logits, strongly negative logits, huge finite values, both zeros."""
    needed(backend)
    logits, uniform, _ = make(6, 50)
    logits[0, 10:] = -torch.inf
    logits[1, 3] = 300.0
    logits[2] = 0.0
    logits[3] -= 30000.0
    logits[4] = torch.linspace(-1, 1, 50) * torch.finfo(torch.float32).max / 2
    logits[5] = torch.where(torch.arange(50) % 2 == 0, 0.0, -0.0)
    result = sample(logits, uniform, backend, device, **FILTERS[name])
    assert_inverts_the_cdf(result.ids, plain(logits, **FILTERS[name]).probabilities, uniform)
    assert all(values.isfinite().all() for values in result)
    assert result.ids[1] == 3
    assert result.ids[4] == 49


@pytest.mark.parametrize("backend", ALL)
def test_limits_of_the_filters(needed, device, backend):
    """top_k of V or more, and every value that keeps all tokens, change nothing; the least keeps one token."""
    needed(backend)
    logits, uniform, _ = make(1, 30)
    free = sample(logits, uniform, backend, device)
    all_kept = [{"top_k": 10**12}, {"top_k": 30}, {"top_k": 0}, {"top_p": None}, {"min_p": 0.0}, {"top_p": 1 - 1e-9}]
    for options in some(all_kept, backend):
        assert sample(logits, uniform, backend, device, **options).ids.equal(free.ids)
    for options in some([{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}, {"top_k": 2, "top_p": 1e-3}], backend)[:4]:
        result = sample(logits, uniform, backend, device, **options)
        assert result.ids.equal(logits.argmax(1))
        torch.testing.assert_close(result.logps, result.log_kept_mass)


def shifted(x):
    """The same values at an odd storage offset: rows are not aligned to 16 bytes."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
    return buffer[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "every other row": lambda x: x[::2],
    "odd offset": shifted,
    "one row repeated": lambda x: x[:1].expand(5, -1),
    "part of a wider row": lambda x: x[:, 3:-9],
    "reversed axes": lambda x: x.t().contiguous().t()[:3],
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(need, device, backend, layout, dtype):
    """Results equal those of contiguous tensors bit by bit, also where a mask is strided."""
    logits, uniform, rng = make(8, 1333, dtype)
    seen = torch.rand(8, 1333, generator=rng) < 0.5
    view, seen = LAYOUTS[layout](logits.to(device)), LAYOUTS[layout](seen.to(device))
    need("sample_logps", backend, view)
    options = {"repetition_penalty": 1.3, "backend": backend}
    uniform = uniform[: len(view)].to(device)
    actual = sample_logps(view, uniform, seen=seen, **options)
    expected = sample_logps(view.contiguous(), uniform, seen=seen.contiguous(), **options)
    for values, others in zip(actual, expected, strict=True):
        assert values.equal(others)


@pytest.mark.parametrize("backend", ALL)
def test_accepts_what_people_have(needed, device, backend):
    """Uniforms in fp32 or as a list, integer masks, lists of table rows."""
    needed(backend)
    logits = make(2, 9)[0].to(device)
    mask = torch.tensor([[0, 1] * 4 + [0]] * 2, device=device)
    expected = sample_logps(
        logits,
        torch.tensor([0.25, 0.5], dtype=torch.float64, device=device),
        seen=mask.bool(),
        repetition_penalty=2,
        banned=mask.bool(),
        banned_rows=torch.tensor([1, 0], device=device),
        backend=backend,
    )
    actual = sample_logps(
        logits, [0.25, 0.5], seen=mask, repetition_penalty=2.0, banned=mask.int(), banned_rows=[1, 0], backend=backend
    )
    for values, others in zip(actual, expected, strict=True):
        assert values.equal(others)


@pytest.mark.parametrize("backend", ALL)
def test_empty(needed, device, backend):
    needed(backend)
    result = sample(torch.zeros(0, 5), torch.zeros(0), backend, device, top_k=2)
    assert [x.shape for x in result] == [(0,)] * 4
    assert sample(torch.zeros(0, 5), None, backend, device).ids.dtype == torch.int64


@on_every_backend(FILTERS, ["all"])
def test_a_row_does_not_depend_on_the_others(needed, device, backend, name):
    """Bit by bit."""
    needed(backend)
    logits, uniform, _ = make(3, 2100)
    together = sample(logits, uniform, backend, device, **FILTERS[name])
    for row in (0, 2):
        alone = sample(logits[row : row + 1], uniform[row : row + 1], backend, device, **FILTERS[name])
        for values, others in zip(together, alone, strict=True):
            assert values[row : row + 1].equal(others)


def test_result_does_not_depend_on_threads():
    logits, uniform, _ = make(9, 3001, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(sample_logps(logits, uniform, top_p=0.9, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(needed, device, backend):
    needed(backend)
    logits, uniform, rng = (x if isinstance(x, torch.Generator) else x.to(device) for x in make(1, 20))
    mask = (torch.rand(1, 20, generator=rng) < 0.3).to(device)
    rows = torch.tensor([0], device=device)
    args = (logits, uniform, mask, mask, rows, 0.7, 5, 0.9, 0.01, 1.2, backend)
    torch.library.opcheck(torch.ops.vlmkernels.sample_logps.default, args)
    args = (logits, None, None, None, None, 1.0, 0, 1.0, 0.0, 1.0, backend)
    torch.library.opcheck(torch.ops.vlmkernels.sample_logps.default, args)


@pytest.mark.parametrize("backend", ALL)
def test_compiles_whole(needed, device, backend):
    needed(backend)
    logits, uniform, _ = make(1, 20)
    logits, uniform = logits.to(device), uniform.to(device)

    def step(x):
        result = sample_logps(2 * x, uniform, top_k=5, backend=backend)
        return result.ids + 1, result.logps

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(logits), step(logits), strict=True):
        assert actual.equal(expected)


def error_cases():
    x, u, m = torch.zeros(2, 5), torch.tensor([0.1, 0.2], dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    yield "logits shape", (x[0], u), {}, ValueError, r"logits must be \(N, V\) with V >= 1, got \(5,\)"
    yield "no vocabulary", (x[:, :0], u), {}, ValueError, r"logits must be \(N, V\) with V >= 1, got \(2, 0\)"
    yield "logits dtype", (x.int(), u), {}, TypeError, "logits must be floating point, got torch.int32"
    yield "uniform shape", (x, u[:1]), {}, ValueError, r"uniform must have the shape of the rows of logits, \(2,\), got \(1,\)"
    yield "uniform dtype", (x, u.int()), {}, TypeError, "uniform must be floating point, got torch.int32"
    for value in (1.0, -0.5, float("nan"), float("inf")):
        at = torch.tensor([0.1, value], dtype=torch.float64)
        yield f"uniform {value}", (x, at), {}, ValueError, rf"uniform must be in \[0, 1\), got {value} at index \(1,\)"
    for value in (0, -1.0, float("nan")):
        yield f"temperature {value}", (x, u), {"temperature": value}, ValueError, "temperature must be a finite number > 0, got"
    yield "top_k", (x, u), {"top_k": -1}, ValueError, "top_k must be None or an integer in .* got -1"
    yield "top_k type", (x, u), {"top_k": 2.5}, TypeError, "top_k must be None or an integer >= 0, got 2.5"
    yield "top_p", (x, u), {"top_p": 0.0}, ValueError, r"top_p must be None or in \(0, 1\], got 0.0"
    yield "min_p", (x, u), {"min_p": 1.5}, ValueError, r"min_p must be None or in \[0, 1\], got 1.5"
    yield (
        "penalty",
        (x, u),
        {"repetition_penalty": 0.0, "seen": m},
        ValueError,
        "repetition_penalty must be a finite number > 0",
    )
    yield "no seen", (x, u), {"repetition_penalty": 1.2}, ValueError, "seen must be given with a repetition_penalty, got None"
    yield "seen", (x, u), {"repetition_penalty": 1.2, "seen": m[:1]}, ValueError, r"seen must have .* \(2, 5\), got \(1, 5\)"
    yield "banned", (x, u), {"banned": m[0, :4]}, ValueError, r"banned must be \(V,\) or \(A, V\) .* V = 5, got \(4,\)"
    yield "tables", (x, u), {"banned": m}, ValueError, r"banned_rows must be given exactly if .* got None with \(2, 5\)"
    yield "rows", (x, u), {"banned_rows": [0, 1]}, ValueError, "banned_rows must be None without banned"
    bad = {"banned": m, "banned_rows": [0, 2]}
    yield "row", (x, u), bad, ValueError, r"banned_rows must be in \[0, 2\), the rows of banned, got 2 at index \(1,\)"
    yield "fp64", (x.double(), u), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, .* got float64"
    yield "backend", (x, u), {"backend": "tpu"}, ValueError, "backend must be one of auto, reference, .* got 'tpu'"


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        sample_logps(*args, **options)


def test_default_device():
    """Filters are numbers on the host: torch's default device does not matter."""
    logits, uniform, _ = make(2, 50)
    expected = sample_logps(logits, uniform, top_p=0.9)
    with torch.device("meta"):
        actual = sample_logps(logits, uniform, top_p=0.9)
    assert actual.ids.equal(expected.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_bad_uniforms_on_a_gpu_are_clamped(backend):
    logits = make(5, 3000)[0].cuda()
    uniform = torch.tensor([-1.0, float("nan"), 1.0, float("inf"), 0.5], dtype=torch.float64, device="cuda")
    clamped = torch.tensor([0.0, 0.0, LAST, LAST, 0.5], dtype=torch.float64, device="cuda")
    actual, expected = (sample_logps(logits, u, backend=backend) for u in (uniform, clamped))
    assert actual.ids.equal(expected.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_wrong_table_on_a_gpu(backend):
    logits, uniform, _ = (x.cuda() if isinstance(x, torch.Tensor) else x for x in make(3, 3000))
    banned = torch.zeros(2, 3000, dtype=torch.bool, device="cuda")
    ids = sample_logps(logits, uniform, banned=banned, banned_rows=torch.tensor([0, 2, -1]).cuda(), backend=backend).ids
    assert ids[0] >= 0
    assert ids[1:].tolist() == [-1, -1]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", FILTERS)
def test_cuda_graph(backend, name):
    logits, uniform, _ = (x.cuda() if isinstance(x, torch.Tensor) else x for x in make(16, 20000, torch.bfloat16))
    sample_logps(logits, uniform, backend=backend, **FILTERS[name])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sample_logps(logits, uniform, backend=backend, **FILTERS[name])
    logits.copy_(logits.flip(0))
    uniform.copy_(uniform.flip(0))
    graph.replay()
    for values, expected in zip(result, sample_logps(logits, uniform, backend=backend, **FILTERS[name]), strict=True):
        assert values.equal(expected)
