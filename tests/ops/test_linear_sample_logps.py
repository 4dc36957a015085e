"""linear_sample_logps: the tokens of sample_logps on the logits, with the log-probabilities of linear_logps."""

import pytest
import torch
from support.sampling_cases import assert_inverts_the_cdf, plain

from vlmkernels import linear_logps, linear_sample_logps, sample_logps
from vlmkernels.ops.linear_logps import sweep

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
ALL = ["reference", *KERNELS]
VOCAB, WIDTH = 1300, 24
ROW = 4 * VOCAB  # bytes of a row of fp32 logits
HEADS = {"plain": {}, "scaled": {"logit_scale": 0.5}, "capped": {"softcap": 4.0, "logit_scale": 0.7}}
FILTERED = {"top_k": 40, "top_p": 0.9, "min_p": 0.01}


def make(num, dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(num)
    hidden, weight = torch.randn(num, WIDTH, generator=rng), torch.randn(VOCAB, WIDTH, generator=rng) * 3 / WIDTH**0.5
    bias, uniform = torch.randn(VOCAB, generator=rng), torch.rand(num, dtype=torch.float64, generator=rng)
    return [x.to(device, dtype) for x in (hidden, weight, bias)], uniform.to(device), rng


def logits_of(hidden, weight, bias, logit_scale=1.0, softcap=None):
    logits = (hidden.double() @ weight.double().t() + bias.double()) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.fixture
def needed(need, device):
    return lambda backend, dtype=torch.float32: need("sample_logps", backend, torch.zeros(1, 1, device=device, dtype=dtype))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("head", HEADS)
def test_samples_from_the_logits(needed, device, nan_filled, backend, head):
    """Over chunks of rows, with banned tokens, a penalty and filters."""
    needed(backend)
    num = 3
    (hidden, weight, bias), uniform, rng = make(num)
    options = {
        "temperature": 0.8,
        "banned": torch.rand(2, VOCAB, generator=rng) < 0.3,
        "banned_rows": torch.tensor([1, 0, 1]),
        "seen": torch.rand(num, VOCAB, generator=rng) < 0.3,
        "repetition_penalty": 1.2,
        **FILTERED,
    }

    def moved(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    result = linear_sample_logps(
        *(moved(x) for x in (hidden, weight, uniform)),
        bias=moved(bias),
        chunk_bytes=2 * ROW,
        backend=backend,
        **HEADS[head],
        **{name: moved(x) for name, x in options.items()},
    )
    exact = plain(logits_of(hidden, weight, bias, **HEADS[head]), **options)
    ids = result.ids.cpu()
    assert_inverts_the_cdf(ids, exact.probabilities, uniform)
    for name, value in exact.results(ids).items():
        torch.testing.assert_close(getattr(result, name).cpu().double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logps_are_those_of_linear_logps(needed, device, backend, head, dtype):
    """Bit by bit if both compute the logit of a token again, else up to the rounding of the sums."""
    needed(backend, dtype)
    (hidden, weight, bias), uniform, _ = make(2, dtype, device)
    options = {"bias": bias, "temperature": 0.9, "backend": backend, **HEADS[head]}
    result = linear_sample_logps(hidden, weight, uniform, **options)
    logps, entropy = linear_logps(hidden, weight, result.ids, return_entropy=True, **options)
    exact = dtype != torch.float32 and device == "cpu"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 3e-6}
    torch.testing.assert_close(result.logps, logps, **tolerance)
    torch.testing.assert_close(result.entropy, entropy, **tolerance)
    assert result.log_kept_mass.abs().max() < 1e-5


def test_fp32_logits_of_16_bit_operands(fp32_results, device):
    """As in CUDA, where the GEMM returns fp32: the tokens and results of sample_logps on these logits."""
    if device == "cuda":
        pytest.skip("the other tests use fp32 logits there")
    (hidden, weight, _), uniform, _ = make(4, torch.bfloat16)
    result = linear_sample_logps(hidden, weight, uniform, top_p=0.9)
    expected = sample_logps(hidden.float() @ weight.float().t(), uniform, top_p=0.9)
    assert result.ids.equal(expected.ids)
    torch.testing.assert_close(result.logps, expected.logps)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy(needed, device, backend, dtype):
    needed(backend, dtype)
    (hidden, weight, bias), _, _ = make(3, dtype, device)
    result = linear_sample_logps(hidden, weight, None, bias=bias, backend=backend)
    logits = torch.addmm(bias, hidden, weight.t())
    assert result.ids.equal(logits.float().argmax(1))
    assert result.log_kept_mass.equal(result.logps)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_token(needed, device, backend, dtype):
    needed(backend, dtype)
    (hidden, weight, _), uniform, _ = make(3, dtype, device)
    hidden[1, 3] = torch.nan
    tables = torch.zeros(2, VOCAB, dtype=torch.bool, device=device)
    tables[1] = True
    rows = torch.tensor([0, 0, 1], device=device)
    result = linear_sample_logps(hidden, weight, uniform, banned=tables, banned_rows=rows, backend=backend)
    assert result.ids.tolist()[1:] == [-1, -2]
    assert result.ids[0] >= 0
    for values in result[1:]:
        assert values.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_logits(monkeypatch, dtype):
    """At most chunk_bytes of logits exist, and the tokens do not depend on it."""
    (hidden, weight, _), uniform, _ = make(64, dtype)
    shapes = []
    logits = sweep.Sweep.logits

    def watched(self, states, out):
        shapes.append(out.shape[0])
        return logits(self, states, out)

    monkeypatch.setattr(sweep.Sweep, "logits", watched)
    whole = linear_sample_logps(hidden, weight, uniform, **FILTERED)
    row = VOCAB * dtype.itemsize
    parts = linear_sample_logps(hidden, weight, uniform, chunk_bytes=16 * row + 1, **FILTERED)
    assert shapes == [64, 16, 16, 16, 16]
    assert parts.ids.equal(whole.ids)


def test_what_a_linear_layer_accepts():
    """Autocast, an fp32 master copy of the weight, strided hidden states, no rows."""
    (hidden, weight, bias), uniform, _ = make(4)
    expected = linear_sample_logps(hidden.bfloat16(), weight.bfloat16(), uniform, bias=bias.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_sample_logps(hidden, weight, uniform, bias=bias).ids.equal(expected.ids)
    assert linear_sample_logps(hidden.bfloat16(), weight, uniform, bias=bias).ids.equal(expected.ids)
    strided = torch.stack([hidden, hidden], 1)[:, 0]
    assert linear_sample_logps(strided, weight, uniform).ids.equal(linear_sample_logps(hidden, weight, uniform).ids)
    assert [x.shape for x in linear_sample_logps(hidden[:0], weight, uniform[:0])] == [(0,)] * 4


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_opcheck_and_compile(needed, device, backend):
    needed(backend)
    (hidden, weight, bias), uniform, _ = make(2, device=device)
    args = (weight, bias, 0.5, 4.0, 2**20, hidden, uniform, None, None, None, 0.7, 5, 0.9, 0.01, 1.0, backend)
    torch.library.opcheck(torch.ops.vlmkernels.linear_sample_logps.default, args)

    def step(x):
        return linear_sample_logps(2 * x, weight, uniform, top_k=5, backend=backend).ids + 1

    assert torch.compile(step, fullgraph=True, backend="aot_eager")(hidden).equal(step(hidden))


def error_cases():
    (h, w, b), u, _ = make(2)
    yield "hidden", (h[0], w, u), {}, ValueError, r"hidden must be \(N, H\), got \(24,\)"
    yield "weight", (h, w[:, :3], u), {}, ValueError, r"weight must be \(V, H\) .* H = 24, got \(1300, 3\)"
    yield (
        "bias",
        (h, w, u),
        {"bias": b[:3]},
        ValueError,
        r"bias must have the shape of the rows of weight, \(1300,\), got \(3,\)",
    )
    yield "softcap", (h, w, u), {"softcap": 0.0}, ValueError, "softcap must be a finite number > 0, got 0.0"
    yield "uniform", (h, w, u + 1), {}, ValueError, r"uniform must be in \[0, 1\), got 1.* at index \(0,\)"
    yield (
        "uniform shape",
        (h, w, u[:1]),
        {},
        ValueError,
        r"uniform must have the shape of the rows of hidden, \(2,\), got \(1,\)",
    )
    yield "chunk", (h, w, u), {"chunk_bytes": 9}, ValueError, "chunk_bytes must hold one row of logits, 5200 bytes, got 9"
    yield "chunk type", (h, w, u), {"chunk_bytes": 1e9}, ValueError, r"chunk_bytes must be an integer in .* got 1000000000.0"
    yield "top_p", (h, w, u), {"top_p": 2}, ValueError, r"top_p must be None or in \(0, 1\], got 2"
    yield "backend", (h, w, u), {"backend": "tpu"}, ValueError, "backend must be one of auto, reference, .* got 'tpu'"


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        linear_sample_logps(*args, **options)
