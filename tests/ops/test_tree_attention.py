"""Attention of trees of segments, against a mask over all tokens."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import assert_within_budget
from support.layouts import layouts
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels import backend as backends
from vlmkernels.ops import flash4 as package
from vlmkernels.ops.tree_attention import TreeLayout, chosen_backend, flash, flash4, flex, parts, tree_attention
from vlmkernels.ops.tree_attention.merge import merge_

pytestmark = pytest.mark.device

LAYOUTS = {
    "one group": TreeLayout.groups((5,), ((3, 3, 3, 3),)),
    "unequal": TreeLayout.groups((7, 2, 4), ((3, 1, 6), (2, 2), (5,))),
    "empty completions": TreeLayout.groups((3, 4), ((0, 2, 0), (0, 0))),
    "no completions": TreeLayout.groups((6,), ((),)),
    "long": TreeLayout.groups((130,), ((40, 70),)),
    "long, three groups": TreeLayout.groups((300, 1, 128), ((40, 257), (0,), (128, 5, 64))),
    "one token each": TreeLayout.groups((1, 1), ((1, 1, 1), (1,))),
    "chain": TreeLayout((3, 4, 2, 5), (-1, 0, 1, 2)),
    "forks": TreeLayout((4, 3, 0, 5, 2, 6, 3, 3), (-1, 0, 1, 2, 2, 1, 0, -1)),
    "long forks": TreeLayout((140, 60, 130, 3, 257, 40), (-1, 0, 1, 1, 0, 4)),
    "spans": TreeLayout((9, 5, 4, 7), (-1, 0, 0, -1), ((2, 6), (6, 8), (9, 14), (17, 18), (20, 25))),
    "long spans": TreeLayout((300, 60, 70), (-1, 0, 0), ((10, 170), (180, 300), (370, 400))),
    "linked spans": TreeLayout((12, 5, 9), (-1, 0, 0), ((1, 4), (4, 6), (8, 11), (12, 14), (20, 22), (23, 26)), linked=True),
    "nothing": TreeLayout((), ()),
}
# (layout, window), by name; the windows are shorter than, as long as or longer than segments and paths.
CASES = {name: (layout, None) for name, layout in LAYOUTS.items()} | {
    f"{name}, window {window}": (LAYOUTS[name], window)
    for name, windows in {
        "one group": (2, 4, 8, 99),
        "unequal": (3,),
        "long, three groups": (64, 301),
        "forks": (2, 5, 9),
        "long forks": (100, 200),
        "spans": (2, 3, 8),
        "linked spans": (4,),
        "long spans": (90,),
    }.items()
    for window in windows
}


def in_turns(*settings):
    """Each case by name with one of the settings. Cases with the same layout get different ones."""
    return [(name, *settings[index % len(settings)]) for index, name in enumerate(sorted(CASES))]


def run(inputs, case, weight, attention, forward_only):
    inputs = [x.detach().clone().requires_grad_(not forward_only) for x in inputs]
    out = attention(*inputs, *case)
    if forward_only:
        return {"out": out}
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
    return dict(zip(("out", "dquery", "dkey", "dvalue"), (out.detach(), *gradients), strict=True))


def formula(query, key, value, layout, window=None, scale=0.3):
    """Attention by the scores of all pairs of tokens."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) * scale
    scores = scores.masked_fill(~layout.mask(window).to(query.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def eager_formula(query, key, value, layout, window=None):
    """The formula of the docstring."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask = layout.mask(window).to(query.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)


def effective(layout, window):
    """The window that backends get: None if it hides nothing."""
    return None if window is None or window >= layout.longest_path else window


def skip_unless_supported(backend, query, layout=None, window=None):
    try:
        backends.choose("tree_attention", backend, query, layout=layout, window=window)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def many_variants():
    """Raise the recompile limit: these tests compile FlexAttention for many dtypes and shapes."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


# Both dtypes and both numbers of heads with every case, and their four combinations with every second one. Tests that share
# kernels follow one another: on a GPU, each process compiles FlexAttention for what it runs.
MIXED = [
    (name, dtype, heads)
    for dtype, odd in ((torch.float32, 0), (torch.bfloat16, 1))
    for heads in (4, 2)
    for index, name in enumerate(CASES)
    if (heads == 2) ^ (index % 2) == odd
]


@cache  # for all backends
def problem(name, dtype, heads, width, device):
    """The inputs of a case, the factors of its loss, and the results in fp64 and of the eager formula."""
    layout, _ = case = CASES[name]
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(layout.num_tokens, h, width, generator=rng).to(device, dtype) for h in (4, heads, heads)]
    weight = torch.randn(layout.num_tokens, 4, width, generator=rng).to(device)
    exact = run([x.double() for x in inputs], case, weight.double(), formula, False)
    return inputs, weight, exact, run(inputs, case, weight, eager_formula, False)


@pytest.mark.parametrize(("name", "dtype", "heads"), MIXED, ids=str)
@pytest.mark.parametrize("backend", backends.backends_of("tree_attention").modules)
def test_matches_fp64(device, backend, dtype, name, heads):
    layout, window = case = CASES[name]
    width = 64 if backend == "flash4" else 16
    skip_unless_supported(backend, torch.zeros(1, 4, width, dtype=dtype, device=device), layout, window)
    inputs, weight, exact, eager = problem(name, dtype, heads, width, device)
    actual = run(inputs, case, weight, with_scale(backend), forward_only=backend == "flex" and device == "cpu")
    for what in actual:
        # FlexAttention in fp32 on a GPU was up to 1.05 times over the budget of one eps.
        size = 4 * exact[what].abs().max().item() if backend == "flex" and layout.num_tokens else None
        assert_within_budget(what, actual[what], eager[what], exact[what], scale=size)


def reference_scores(query, key, queries, keys, causal, window, scale):
    """(Hq, N, M) scores of packed sequences, -inf between different sequences."""
    length, length_k = queries.bounds.diff(), keys.bounds.diff()
    assert queries.bounds.dtype == keys.bounds.dtype == torch.int32
    assert (queries.longest, keys.longest) == (length.max(), length_k.max())
    assert (queries.bounds[-1], keys.bounds[-1]) == (len(query), len(key))
    assert min(length.min(), length_k.min()) > 0  # flash attention defines no log-sum-exp without keys
    sequence = [torch.arange(len(x)).repeat_interleave(x) for x in (length, length_k)]
    seen = sequence[0][:, None] == sequence[1]
    # The last query of a sequence is at the place of its last key.
    to_end = [x.bounds[1:].repeat_interleave(n) - torch.arange(sum(n)) for x, n in ((queries, length), (keys, length_k))]
    distance = to_end[1] - to_end[0][:, None]
    if causal:
        seen &= distance >= 0
    if window is not None:
        assert causal
        seen &= distance < window
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1)) * scale
    return scores.masked_fill(~seen, -torch.inf)


def reference_forward(query, key, value, queries, keys, causal, window, scale):
    """The results of torch's forward kernel, with the layout of its log-sum-exp, rounded once."""
    q, k, v = (x.double() for x in (query, key, value))
    scores = reference_scores(q, k, queries, keys, causal, window, scale)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    lse = scores.logsumexp(-1)
    return out.to(query.dtype).contiguous(), lse if query.dtype == torch.float64 else lse.float()


def reference_backward(dout, query, key, value, out, lse, queries, keys, causal, window, scale):
    """The results of torch's backward kernel from the given output and log-sum-exp, rounded once."""
    assert dout.is_contiguous()
    assert out.is_contiguous()
    assert lse.is_contiguous()
    q, k, v, do, o = (x.double() for x in (query, key, value, dout, out))
    probabilities = (reference_scores(q, k, queries, keys, causal, window, scale) - lse.double().unsqueeze(-1)).exp()
    k_expanded, v_expanded = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    inner = torch.einsum("qhd,khd->hqk", do, v_expanded) - (do * o).sum(-1).T.unsqueeze(-1)
    dscores = probabilities * inner * scale
    dkey, dvalue = torch.einsum("hqk,qhd->khd", dscores, q), torch.einsum("hqk,qhd->khd", probabilities, do)
    dkey, dvalue = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dkey, dvalue))
    gradients = torch.einsum("hqk,khd->qhd", dscores, k_expanded), dkey, dvalue
    return tuple(x.to(query.dtype) for x in gradients)


def no_limits_but(module):
    """Replace ``unsupported`` of a backend: only its rules about windows are left."""
    reasons = module.unsupported

    def unsupported(query, layout, window):
        reason = reasons(query, layout, window)
        return reason if reason is not None and "window" in reason else None

    return unsupported


def replace_kernels(patch):
    """Run flash.py with formulas instead of the kernels of torch."""
    patch.setattr(flash, "unsupported", no_limits_but(flash))
    patch.setattr(flash, "KERNELS", flash.Kernels(reference_forward, reference_backward))


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")


def replace_flash4_kernels(patch):
    """Run flash4.py with formulas instead of the functions of flash-attn-4."""

    def sequences(cu_seqlens, max_seqlen):
        assert cu_seqlens.data_ptr() % 16 == 0  # the package would copy others
        return flash.Sequences(cu_seqlens, max_seqlen)

    def forward(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse):
        assert return_lse
        queries, keys = sequences(cu_seqlens_q, max_seqlen_q), sequences(cu_seqlens_k, max_seqlen_k)
        return *reference_forward(q, k, v, queries, keys, causal, None, softmax_scale), None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale, causal, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic
    ):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        queries, keys = sequences(cu_seqlens_q, max_seqlen_q), sequences(cu_seqlens_k, max_seqlen_k)
        return reference_backward(dout, q, k, v, out, lse, queries, keys, causal, None, softmax_scale)

    patch.setattr(flash4, "unsupported", no_limits_but(flash4))
    patch.setattr(package, "module", lambda: SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))


# For each backend: the function that replaces its kernels by formulas.
REPLACED = {"flash": replace_kernels, "flash4": replace_flash4_kernels}


@pytest.fixture
def replaced(monkeypatch, backend):
    """The backend without its kernels. Merges have larger blocks: Triton's interpreter takes as long for a short block."""
    REPLACED[backend](monkeypatch)
    monkeypatch.setattr("vlmkernels.ops.tree_attention.merge.BLOCK_N", 128)


def with_scale(backend):
    return lambda q, k, v, layout, window=None: tree_attention(q, k, v, layout, window=window, scale=0.3, backend=backend)


@on_cpu
@pytest.mark.parametrize("backend", REPLACED)
@pytest.mark.parametrize(("name", "heads", "heads_first"), in_turns((4, True), (2, False), (1, True)))
def test_with_reference_kernels(replaced, backend, name, heads, heads_first):
    """The calls and their merge; only the merge is in fp32."""
    layout, window = case = CASES[name]
    skip_unless_supported(backend, torch.zeros(1, 1, 24), layout, effective(layout, window))
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(layout.num_tokens, h, 24, generator=rng, dtype=torch.float64) for h in (4, heads, heads)]
    if heads_first:
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    weight = torch.randn(layout.num_tokens, 4, 24, generator=rng, dtype=torch.float64)
    exact, actual = (run(inputs, case, weight, attention, False) for attention in (formula, with_scale(backend)))
    for what in exact:
        torch.testing.assert_close(actual[what], exact[what], rtol=1e-5, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("backend", REPLACED)
@pytest.mark.parametrize(("name", "dtype"), in_turns((torch.bfloat16,), (torch.float16,)), ids=str)
def test_rounding(replaced, backend, name, dtype):
    """Parts are rounded before they are merged or added."""
    layout, window = case = CASES[name]
    skip_unless_supported(backend, torch.zeros(1, 1, 16), layout, effective(layout, window))
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(layout.num_tokens, h, 16, generator=rng).to(dtype) for h in (4, 2, 2)]
    weight = torch.randn(layout.num_tokens, 4, 16, generator=rng)
    exact = run([x.double() for x in inputs], case, weight.double(), formula, False)
    eager, actual = (run(inputs, case, weight, attention, False) for attention in (eager_formula, with_scale(backend)))
    for what in exact:
        assert_within_budget(what, actual[what], eager[what], exact[what])


@on_cpu
@pytest.mark.parametrize("backend", REPLACED)
@settings(max_examples=60, deadline=None)
@given(layout=layouts(st.integers(0, 19), spans=True), window=st.none() | st.integers(1, 40))
def test_any_layout(backend, layout, window):
    if effective(layout, window) is not None and backend == "flash4":
        window = None
    case = layout, window
    inputs = [torch.randn(layout.num_tokens, h, 8, dtype=torch.float64) for h in (2, 1, 1)]
    weight = torch.randn_like(inputs[0])
    with pytest.MonkeyPatch.context() as patch:
        REPLACED[backend](patch)
        exact, actual = (run(inputs, case, weight, attention, False) for attention in (formula, with_scale(backend)))
    for what in exact:
        torch.testing.assert_close(actual[what], exact[what], rtol=1e-5, atol=1e-5)


WIDTHS = {"flash": (8, 64, 96, 128, 256), "flash4": package.WIDTHS}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "width"),
    [(name, x) for name in WIDTHS for x in WIDTHS[name]],
)
@pytest.mark.parametrize("how", ["contiguous", "heads first", "sliced", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strides_and_widths(backend, dtype, how, width):
    layout = TreeLayout.groups((300, 70), ((40, 257), (128, 5)))
    skip_unless_supported(backend, torch.empty(1, 1, width, device="cuda", dtype=dtype))
    attention = with_scale(backend)
    rng = torch.Generator().manual_seed(0)

    def make(heads):
        x = torch.randn(layout.num_tokens, heads, width, generator=rng).to("cuda", dtype)
        if how == "heads first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if how == "sliced":
            return torch.cat([x, x], 1)[:, heads:]
        if how == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
        return x

    inputs = [make(heads) for heads in (8, 2, 2)]
    weight = make(8)

    def differentiate(inputs, attention):
        inputs = [x.detach().requires_grad_() for x in inputs]  # as they lie in memory
        out = attention(*inputs, layout)
        gradients = torch.autograd.grad(out, inputs, weight.to(out.dtype))
        return dict(zip(("out", "dquery", "dkey", "dvalue"), (out.detach(), *gradients), strict=True))

    actual, eager = differentiate(inputs, attention), differentiate(inputs, eager_formula)
    exact = differentiate([x.double() for x in inputs], formula)
    for what in exact:
        assert_within_budget(what, actual[what], eager[what], exact[what])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "flash4"])
@pytest.mark.parametrize("layout", [TreeLayout.groups((133, 20), ((40, 7), (12, 5))), TreeLayout.groups((256,), ((128, 128),))])
def test_does_not_wait_for_the_device(backend, layout):
    flash._plan.cache_clear()
    q, k, v = (torch.randn(layout.num_tokens, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    skip_unless_supported(backend, q)
    weight = torch.randn_like(q)
    torch.cuda.set_sync_debug_mode("error")  # what waits raises
    try:
        gradients = torch.autograd.grad(tree_attention(q, k, v, layout, backend=backend), (q, k, v), weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float32, 64, "supports bfloat16 and float16, got float32"),
        (torch.bfloat16, 20, "supports head dimensions that are multiples of 8 up to 256, got 20"),
        (torch.bfloat16, 264, "supports head dimensions that are multiples of 8 up to 256, got 264"),
    ],
)
def test_flash_unsupported(device, dtype, width, reason):
    query = torch.zeros(4, 2, width, dtype=dtype, device=device)
    assert flash.unsupported(query) == (reason if device == "cuda" else "supports CUDA tensors, got cpu")
    if device == "cuda":
        assert backends.choose("tree_attention", "auto", query) == "flex"


@on_cpu
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, None),
        ({"width": 80}, "supports head dimensions of 64, 96, 128, 256, got 80"),
        ({"width": 72}, "supports head dimensions of 64, 96, 128, 256, got 72"),
        ({"dtype": torch.float32}, "supports bfloat16 and float16, got float32"),
        ({"capability": (8, 0)}, "was tested on compute capability 9.0 only, got 8.0"),
        ({"capability": (10, 0)}, "was tested on compute capability 9.0 only, got 10.0"),
        ({"module": ImportError("No module named 'flash_attn'")}, "flash-attn-4 did not load (No module named 'flash_attn')"),
    ],
)
def test_flash4_needs(monkeypatch, state, reason):
    width, dtype = state.get("width", 128), state.get("dtype", torch.bfloat16)
    query = SimpleNamespace(shape=(9, 16, width), dtype=dtype, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.get("capability", (9, 0)))
    monkeypatch.setattr(package, "module", lambda: state.get("module"))
    assert flash4.unsupported(query) == reason
    large, small = TreeLayout.groups((4096,), ((1024,) * 8,)), TreeLayout.groups((1024,), ((256,) * 8,))
    assert flash4.is_faster(query, large) == (reason is None)
    assert not flash4.is_faster(query, small)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not flash4.is_faster(query, large)


@on_cpu
def test_auto_selects_flash4_for_large_packs(monkeypatch):
    monkeypatch.setattr(flash4, "is_faster", lambda query, layout, window: layout.num_tokens > 100)
    monkeypatch.setattr(flash4, "unsupported", lambda query, layout, window: None)
    query = torch.zeros(1, 2, 64)
    large, small = TreeLayout.groups((101,), ((),)), TreeLayout.groups((100,), ((),))
    assert [chosen_backend(query, layout) for layout in (large, small)] == ["flash4", "parts"]
    assert chosen_backend(query, large, backend="parts") == "parts"
    with backends.use_backend("parts"):
        assert chosen_backend(query, large) == "parts"


@on_cpu
@pytest.mark.parametrize("window", [None, 7])
def test_many_spans_are_one_more_call(window):
    """The number of calls depends on the depth of the trees, not on the number of images."""
    layout = TreeLayout((60, 9, 9), (-1, 0, 0), tuple((3 * k, 3 * k + 3) for k in range(20)))
    assert len(flash._plan(layout, window, torch.device("cpu"))) == (3 if window is None else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 80, 128])
def test_merge(device, dtype, width):
    """Merged and untouched rows, in tensors with different strides; shares from 0 to 1."""
    rng = torch.Generator().manual_seed(0)
    num, heads = 50, 3
    rows = torch.randperm(num, generator=rng)[:37].to(torch.int32)
    out, part = (torch.randn(n, heads, width, generator=rng).to(dtype) for n in (num, len(rows)))
    lse, part_lse = (torch.randn(heads, n, generator=rng) * 60 for n in (num, len(rows)))
    expected, expected_lse = out.double(), lse.double()
    merged = torch.logaddexp(expected_lse[:, rows], part_lse.double())
    shares = [(x - merged).exp().T.unsqueeze(-1) for x in (expected_lse[:, rows], part_lse.double())]
    expected[rows] = expected[rows] * shares[0] + part.double() * shares[1]
    expected_lse[:, rows] = merged
    wide = torch.zeros(num, heads, 2 * width, dtype=dtype, device=device)
    target = wide[..., :width].copy_(out)
    target_lse = lse.to(device)
    merge_(target, target_lse, part.to(device), part_lse.to(device), rows.to(device))
    torch.testing.assert_close(target.cpu(), expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(target_lse.cpu(), expected_lse.float())
    assert not wide[..., width:].any()


LENGTHS = st.integers(0, 70) | st.integers(100, 300) | st.sampled_from([127, 128, 129, 255, 256, 257, 384])


@settings(max_examples=60, deadline=None)
@given(layouts(LENGTHS, 6, spans=True).filter(lambda x: x.num_tokens), st.none() | st.integers(1, 500))
def test_block_mask_is_that_of_the_mask(layout, window):
    window = effective(layout, window)
    mask, num = layout.mask(window), layout.num_tokens
    expected = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, num, num, device="cpu")
    actual = flex._block_mask(layout, window, torch.device("cpu"))
    assert actual.seq_lengths == expected.seq_lengths == (num, num)
    for direction in ("kv", "q", "full_kv", "full_q"):
        for what in ("num_blocks", "indices"):
            x, y = (getattr(block_mask, f"{direction}_{what}") for block_mask in (actual, expected))
            assert x.dtype == y.dtype
            assert torch.equal(x, y), f"{direction}_{what}"
    i, j = torch.meshgrid(torch.arange(num), torch.arange(num), indexing="ij")
    assert torch.equal(actual.mask_mod(0, 0, i, j), mask)


@on_cpu
def test_queries_of_any_strides():
    layout = LAYOUTS["forks"]
    q, k, v = (torch.randn(layout.num_tokens, 8, 2, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    weight = torch.randn(layout.num_tokens, 8, 2, dtype=torch.float64).transpose(1, 2)
    exact, actual = formula(q, k, v, layout, None, 8**-0.5), tree_attention(q, k, v, layout)
    torch.testing.assert_close(actual, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, (q, k, v), weight, retain_graph=True) for x in (actual, exact)))


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window):
    layout = TreeLayout((3, 2, 1, 0, 3), (-1, 0, 1, 0, 3), ((0, 2), (3, 5)))
    inputs = [torch.randn(layout.num_tokens, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, layout, window=window), inputs)


@settings(max_examples=40, deadline=None)
@given(layouts(), st.none() | st.integers(1, 20), st.integers(0, 99))
def test_each_path_is_as_if_alone(layout, window, seed):
    """The results of a path equal those of causal attention over it."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(layout.num_tokens, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    out = tree_attention(q, k, v, layout, window=window)
    for segment in range(len(layout.lengths)):
        tokens = [torch.arange(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in layout.path(segment)]
        path = torch.cat(tokens)
        alone = formula(q[path], k[path], v[path], TreeLayout((len(path),), (-1,)), window, 8**-0.5)
        torch.testing.assert_close(out[path], alone)


@pytest.mark.parametrize("name", ["long forks", "long spans, window 90", "long, three groups, window 64"])
def test_rows_of_masked_parts_are_bounded(monkeypatch, name):
    """Masks hold at most ROWS queries, and the results do not depend on ROWS."""
    layout, window = CASES[name]
    inputs = [torch.randn(layout.num_tokens, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    exact = formula(*inputs, layout, window, 8**-0.5)
    weight = torch.randn_like(exact)
    for rows in (7, 64):
        monkeypatch.setattr(parts, "ROWS", rows)
        parts._plan.cache_clear()
        masked = [part for group in parts._plan(layout, window) for part in group if part.band is not None]
        assert all(part.queries.stop - part.queries.start <= rows for part in masked)
        assert bool(masked) == (window is not None)
        actual = tree_attention(*inputs, layout, window=window)
        torch.testing.assert_close(actual, exact)
        gradients = [torch.autograd.grad(x, inputs, weight, retain_graph=True) for x in (actual, exact)]
        torch.testing.assert_close(*gradients)
    parts._plan.cache_clear()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(4, 2, 8)}, ValueError, "query must hold the 5 tokens of layout, got 4"),
        ({"query": torch.zeros(5, 16)}, ValueError, r"query must be \(N, Hq, D\), got \(5, 16\)"),
        ({"key": torch.zeros(5, 3, 8)}, ValueError, "key must be .* Hkv a divisor of 2"),
        ({"value": torch.zeros(5, 2, 8).bfloat16()}, TypeError, "value must have dtype float32, got bfloat16"),
        ({"window": 0}, ValueError, "window must be None or an integer >= 1, got 0"),
        ({"window": 2.5}, ValueError, "window must be None or an integer >= 1, got 2.5"),
        ({"scale": 0.0}, ValueError, "scale must be > 0, got 0.0"),
        ({"layout": (5,)}, TypeError, "layout must be a TreeLayout, got tuple"),
        ({"query": [[0.0]]}, TypeError, "query must be a tensor, got list"),
        ({"query": torch.zeros(5, 2, 8, dtype=torch.int64)}, TypeError, "query must be floating point, got int64"),
        ({"value": torch.zeros(5, 2, 4)}, ValueError, "key and value must have the width 8 of query, got 8, 4"),
        ({"query": torch.zeros(5, 0, 8)}, ValueError, "query must have at least one head of width 1"),
        ({"backend": "flex"}, NotImplementedError, "flex: FlexAttention has no backward pass on the CPU"),
        ({"backend": "flash"}, NotImplementedError, "flash: supports CUDA tensors, got cpu"),
        ({"backend": "math"}, ValueError, "backend must be one of auto, parts, flash, flash4, flex, paths; got 'math'"),
    ],
)
def test_bad_input(changes, error, message):
    inputs = {name: torch.zeros(5, 2, 8, requires_grad=True) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        tree_attention(**{**inputs, "layout": TreeLayout.groups((3,), ((1, 1),))} | changes)


def test_bad_groups():
    with pytest.raises(ValueError, match="completions must be of 2 groups, got 1"):
        TreeLayout.groups((3, 2), ((1,),))


def test_numbers_from_tensors():
    """Lengths and parents may be lists or tensors; layouts with equal numbers are equal, and hashable."""
    layout = TreeLayout(torch.tensor([3, 2]), [-1, 0], [[0, 2]])
    assert layout == TreeLayout((3, 2), (-1, 0), ((0, 2),))
    assert hash(layout) == hash(TreeLayout((3, 2), (-1, 0), ((0, 2),)))
