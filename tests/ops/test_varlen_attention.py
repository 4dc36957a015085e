"""Packed attention against attention of each sequence, and in a vision tower."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.budget import assert_within_budget
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels import backend as backends
from vlmkernels.backend import installed
from vlmkernels.models.attention import use_varlen_vision
from vlmkernels.ops import flash4
from vlmkernels.ops.varlen_attention import flash4_varlen, flash_attn_varlen, varlen_attention

pytestmark = pytest.mark.device
LENGTHS = {"runs": [4, 4, 4, 7, 0, 3, 3, 1], "again": [4, 7, 7, 0, 4, 4, 1], "one": [9], "none": [], "empty ones": [0, 0]}
MODELS = {"qwen2.5-vl": tiny.vlm, "qwen3-vl": tiny.qwen3_vl_large_patches}


def formula(query, key, value, lengths, causal, scale):
    """Attention by a matrix of scores per sequence."""
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts) if parts else query.clone()


@pytest.mark.parametrize("backend", backends.backends_of("varlen_attention").modules)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize(("causal", "scale", "heads", "width"), [(False, None, 4, 16), (True, 0.3, 2, 80)])
def test_matches_the_formula(device, backend, case, causal, scale, heads, width):
    lengths, dtype = LENGTHS[case], torch.float32 if backend == "sdpa" else torch.bfloat16
    rng = torch.Generator().manual_seed(0)

    def make(h):
        return torch.randn(sum(lengths), h, width, generator=rng).to(device, dtype).requires_grad_()

    inputs = make(4), make(heads), make(heads)
    try:
        backends.choose("varlen_attention", backend, inputs[0])
    except NotImplementedError as error:
        pytest.skip(str(error))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32, device=device)
    out = varlen_attention(*inputs, cu_seqlens, causal=causal, scale=scale, backend=backend)
    assert out.shape == inputs[0].shape
    weight = torch.randn(out.shape, generator=rng).to(device)

    def with_gradients(out, inputs):
        gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
        return dict(zip(("out", "dquery", "dkey", "dvalue"), (out.detach(), *gradients), strict=True))

    actual = with_gradients(out, inputs)
    if not sum(lengths):
        assert [actual[name].shape for name in ("dquery", "dkey", "dvalue")] == [x.shape for x in inputs]
        return
    eager = with_gradients(formula(*inputs, lengths, causal, scale), inputs)
    double = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(formula(*double, lengths, causal, scale), double)
    for what in exact:
        if dtype == torch.float32:  # the kernels that SDPA selects for fp32 on a GPU have larger errors than the formula
            torch.testing.assert_close(actual[what].double(), exact[what], rtol=1e-5, atol=1e-5)
        else:
            assert_within_budget(what, actual[what], eager[what], exact[what])


@pytest.mark.parametrize("width", [16, 64, 72, 80, 100])
@pytest.mark.parametrize(("causal", "scale"), [(False, None), (True, 0.3)])
def test_flash4_pads_heads(monkeypatch, width, causal, scale):
    """The arguments of flash-attn-4, which the formula replaces here."""
    lengths = LENGTHS["runs"]

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic
    ):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == min(x for x in flash4.WIDTHS if x >= width)
        assert cu_seqlens_q.diff().tolist() == cu_seqlens_k.diff().tolist() == lengths
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        return formula(q, k, v, lengths, causal, softmax_scale), None

    monkeypatch.setattr(flash4, "module", lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(flash4_varlen, "unsupported", lambda query: None)
    inputs = [torch.randn(sum(lengths), h, width, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out = varlen_attention(*inputs, cu_seqlens, causal=causal, scale=scale, backend="flash4")
    expected = formula(*inputs, lengths, causal, scale)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    gradients = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "reason"),
    [
        (72, torch.bfloat16, (9, 0), None),
        (300, torch.bfloat16, (9, 0), "supports head dimensions up to 256, got 300"),
        (72, torch.float32, (9, 0), "supports bfloat16 and float16, got float32"),
        (72, torch.float16, (8, 0), "was tested on compute capability 9.0 only, got 8.0"),
    ],
)
def test_flash4_unsupported(monkeypatch, width, dtype, capability, reason):
    query = SimpleNamespace(shape=(9, 16, width), dtype=dtype, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash4, "module", lambda: None)
    assert flash4_varlen.unsupported(query) == reason


def test_an_installation_of_flash_attn_that_does_not_load(monkeypatch, tmp_path):
    """The error of the import is the reason: "auto" goes on to the next backend."""
    query = SimpleNamespace(shape=(9, 16, 64), dtype=torch.bfloat16, device=torch.device("cuda"))
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    flash_attn_varlen._function.cache_clear()
    try:
        assert flash_attn_varlen.unsupported(query) == "flash-attn did not load (undefined symbol: _ZN3c10)"
    finally:
        flash_attn_varlen._function.cache_clear()


@pytest.mark.skipif(installed("flash_attn"), reason="flash-attn is installed")
def test_flash_attn_4_is_not_flash_attn(monkeypatch, tmp_path):
    query = SimpleNamespace(shape=(9, 16, 64), dtype=torch.bfloat16, device=torch.device("cuda"))
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    flash_attn_varlen._function.cache_clear()
    try:
        expected = "flash-attn did not load (No module named 'flash_attn.flash_attn_interface')"
        assert flash_attn_varlen.unsupported(query) == expected
    finally:
        flash_attn_varlen._function.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]


@pytest.mark.parametrize("name", MODELS)
def test_in_a_vision_tower(monkeypatch, name):
    """Images of several sizes: the same features and gradients, in fewer calls."""
    model = MODELS[name]()
    tower = model.model.visual
    grid = torch.tensor([[1, 4, 6], [1, 4, 6], [1, 12, 12]])
    rows = torch.randn(int(grid.prod(1).sum()), tower.patch_embed.proj.weight[0].numel())
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("vlmkernels.ops.varlen_attention.sdpa_varlen.scaled_dot_product_attention", counted)
    results = []
    for change in (lambda m: m, use_varlen_vision):
        change(model)
        calls.clear()
        model.zero_grad()
        features = torch.cat(model.get_image_features(rows, image_grid_thw=grid).pooler_output)
        features.square().sum().backward()
        results.append((features.detach(), tower.patch_embed.proj.weight.grad.clone(), len(calls)))
    (before, gradient, many), (after, same, few) = results
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert few < many


def test_text_layers_are_untouched():
    model = use_varlen_vision(tiny.vlm())
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(5, 8)}, ValueError, r"query must be \(N, Hq, D\), got \(5, 8\)"),
        ({"key": torch.zeros(4, 2, 8)}, ValueError, "key must be .* with N = 5"),
        ({"value": torch.zeros(5, 3, 8)}, ValueError, "value must be .* Hkv a divisor of 2"),
        ({"key": torch.zeros(5, 2, 8).bfloat16()}, TypeError, "key must have dtype float32, got bfloat16"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be integers, got float32"),
        ({"cu_seqlens": torch.tensor([0, 4]).int()}, ValueError, "cu_seqlens must go from 0 to 5 without a step back, got"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5]).int()}, ValueError, "cu_seqlens must go from 0 to 5 without a step back"),
        ({"backend": "math"}, ValueError, "backend must be one of auto, flash_attn, flash4, torch, sdpa; got 'math'"),
        ({"backend": "flash_attn"}, NotImplementedError, "no backend serves varlen_attention: flash_attn: "),
        ({"backend": "torch"}, NotImplementedError, "torch: supports CUDA tensors, got cpu"),
    ],
)
def test_bad_input(changes, error, message):
    inputs = {name: torch.zeros(5, 2, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        varlen_attention(**{**inputs, "cu_seqlens": torch.tensor([0, 2, 5]).int()} | changes)
