"""The gated delta rule of trees, against its recurrence on a copy of each path."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import assert_within_budget
from support.layouts import layouts
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_5 import modeling_qwen3_5

from vlmkernels import backend as backends
from vlmkernels.ops.gated_delta_rule import chunks, fla, gated_delta_rule
from vlmkernels.ops.tree_attention import TreeLayout

pytestmark = pytest.mark.device

NAMES = ("query", "key", "value", "g", "beta", "initial_state")
LAYOUTS = {
    "one sequence": TreeLayout((150,), (-1,)),
    "a group": TreeLayout.groups((70,), ((33, 5, 0, 64),)),
    "a deep tree": TreeLayout((3, 1, 0, 2, 37, 0, 7, 1, 1, 40, 0, 2), (-1, 0, 1, 2, 0, -1, 5, 6, 7, 8, -1, 10)),
    "one token each": TreeLayout((1,) * 5, (-1,) * 5),
    "one token and an empty child": TreeLayout((1, 0), (-1, 0)),
    "one token per path": TreeLayout((0, 1, 1, 0, 1), (-1, 0, 0, -1, -1)),
    "empty paths": TreeLayout((0, 0, 3), (-1, 0, -1)),
}


def make(layout, heads=(2, 4), widths=(8, 6), decay=1.0, dtype=torch.float64, with_state=True):
    """Random inputs: query, key, value, g, beta, and the initial state or None."""
    rng, num, (hk, hv), (dk, dv) = torch.Generator().manual_seed(0), layout.num_tokens, heads, widths

    def random(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    g, beta = torch.rand(2, num, hv, generator=rng, dtype=torch.float64)
    query, key, value = random(num, hk, dk), random(num, hk, dk), random(num, hv, dv)
    state = random(layout.parents.count(-1), hv, dk, dv) if with_state else None
    return [query, key, value, (-decay * (0.5 + g)).to(dtype), beta.to(dtype), state]


def recurrence(query, key, value, g, beta, state, scale=None, normalize=True):
    """The rule for one sequence, as products of transition matrices: S = a (I - beta k k^T) S + beta k v^T."""
    if normalize:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))
    outputs = [value[:0]]
    for q, k, v, log_a, b in zip(query, key, value, g, beta, strict=True):
        transition = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - b[:, None, None] * k[:, :, None] * k[:, None, :]
        state = log_a.exp()[:, None, None] * transition @ state + b[:, None, None] * k[:, :, None] * v[:, None, :]
        outputs.append((q[:, :, None] * state).sum(1)[None] * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.cat(outputs), state


def chunked(query, key, value, g, beta, state, normalize=True):
    """The function of transformers."""
    function = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))  # transformers 5.17 needs it
    inputs = [x.unsqueeze(0) for x in (query, key, value, g, beta)]
    settings = {"output_final_state": True, "use_qk_l2norm_in_kernel": normalize}
    out, state = function(*inputs, initial_state=state.unsqueeze(0), **settings)
    return out.squeeze(0), state.squeeze(0)


def on_paths(rule, inputs, layout, **settings):
    """Apply the rule for one sequence to a copy of the path of each segment; keep its own tokens and the final state."""
    *inputs, initial = inputs
    if initial is None:
        initial = inputs[2].new_zeros(layout.parents.count(-1), inputs[2].shape[1], inputs[1].shape[2], inputs[2].shape[2])
    outputs, states = [inputs[2][:0]], []
    for segment, length in enumerate(layout.lengths):
        path = layout.path(segment)
        tokens = torch.cat([torch.arange(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in path])
        root = layout.parents[: path[0]].count(-1)
        if not len(tokens):
            states.append(initial[root])
            continue
        out, state = rule(*(x[tokens.to(x.device)] for x in inputs), initial[root], **settings)
        outputs.append(out[len(tokens) - length :])
        states.append(state)
    return torch.cat(outputs), torch.stack(states) if states else initial


def ours(backend):
    def rule(inputs, layout, **settings):
        *inputs, initial = inputs
        return gated_delta_rule(*inputs, layout, initial_state=initial, return_state=True, backend=backend, **settings)

    return rule


def run(rule, inputs, layout, used=("out", "state"), **settings):
    """The output, the states, and the gradients of all inputs through those that are ``used``."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = dict(zip(("out", "state"), rule(leaves, layout, **settings), strict=True))
    rng = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for name, x in results.items()}
    names = [name for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    outputs, upstream = ([x[name] for name in used] for x in (results, weights))
    required = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, required, upstream, materialize_grads=True)
    return {**{name: x.detach() for name, x in results.items()}, **{f"d{n}": x for n, x in zip(names, gradients, strict=True)}}


def assert_close(actual, exact, tolerance, least=0.0):
    """Each tensor within ``tolerance`` times the largest element, or times ``least`` if that is larger."""
    assert actual.keys() == exact.keys()
    for name, x in exact.items():
        assert actual[name].shape == x.shape, name
        size = max(x.abs().max().item(), least) if x.numel() else 0.0
        error = (actual[name].to(x.dtype) - x).abs().max().item() if x.numel() else 0.0
        assert error <= tolerance * size, f"{name}: error {error:.1e} with values up to {size:.1e}"


any_layout = layouts(lengths=st.one_of(st.integers(0, 5), st.integers(0, 70)), max_segments=6).filter(lambda x: x.num_tokens)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@settings(max_examples=25, deadline=None)
@given(
    layout=any_layout,
    heads=st.sampled_from([(1, 1), (2, 2), (2, 4), (1, 3)]),
    used=st.sampled_from([("out",), ("state",), ("out", "state")]),
    with_state=st.booleans(),
    normalize=st.booleans(),
)
def test_matches_paths(backend, layout, heads, used, with_state, normalize):
    inputs = make(layout, heads, with_state=with_state)
    if not normalize:  # keys that are not much longer than 1, so that the states do not grow
        inputs[1] = inputs[1] / 3
    how = {"used": used, "normalize": normalize, "scale": 0.7}
    exact = run(lambda *x, **y: on_paths(recurrence, *x, **y), inputs, layout, **how)
    assert_close(run(ours(backend), inputs, layout, **how), exact, 1e-10)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
@pytest.mark.parametrize("sizes", [(1, 4, 8, 16, 32), (1, 4, 8, 16, 32, 64), (1, 16, 64), (2,)], ids=str)
def test_chunk_sizes(monkeypatch, device, name, heads, sizes):
    monkeypatch.setattr(chunks, "chunk_sizes", lambda device, width: sizes)
    layout = LAYOUTS[name]
    inputs = [x.to(device) for x in make(layout, heads)]
    assert_close(run(ours("torch"), inputs, layout), run(ours("reference"), inputs, layout), 1e-10)


@settings(max_examples=15, deadline=None)
@given(layout=any_layout, with_state=st.booleans(), heads=st.sampled_from([(2, 2), (2, 4)]))
def test_matches_transformers(layout, with_state, heads):
    inputs = make(layout, heads, widths=(16, 12), dtype=torch.float32, with_state=with_state)
    theirs = run(lambda *x: on_paths(chunked, *x), inputs, layout)
    # Where the exact gradient of g is 0, as at a first token without a state, that of transformers is rounding.
    assert_close(run(ours("torch"), inputs, layout), theirs, 1e-5, least=0.1)


@pytest.mark.parametrize("backend", backends.backends_of("gated_delta_rule").modules)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.num_tokens > 1])
@pytest.mark.parametrize("decay", [0.01, 1.0, 8.0])
def test_within_budget(device, need, backend, dtype, name, decay):
    """At most twice the error of the function of transformers on copies."""
    layout, width = LAYOUTS[name], 64 if backend == "fla" else 16
    inputs = [x.to(device) for x in make(layout, widths=(width, width), decay=decay, dtype=dtype)]
    need("gated_delta_rule", backend, inputs[0])
    exact = run(lambda *x: on_paths(recurrence, *x), [x.double() for x in inputs], layout)
    eager = run(lambda *x: on_paths(chunked, *x), inputs, layout)
    actual = run(ours(backend), inputs, layout)
    assert actual["state"].dtype == torch.float32
    for what in exact:
        assert_within_budget(what, actual[what], eager[what], exact[what])


def test_gradient_of_strong_decays():
    """It is far smaller than the terms of the gradient of the cumulative decay, which cancel."""
    layout = LAYOUTS["one sequence"]
    inputs = make(layout, widths=(16, 16), decay=10.0, dtype=torch.float32)
    exact = run(ours("reference"), [x.double() for x in inputs], layout)["dg"]
    error = (run(ours("torch"), inputs, layout)["dg"] - exact).abs().max() / exact.abs().max()
    assert error < 3e-5


@pytest.mark.parametrize("name", ["a deep tree", "one token per path", "empty paths"])
def test_gradcheck(name):
    layout = LAYOUTS[name]
    inputs = [x.requires_grad_() for x in make(layout, (1, 2), widths=(3, 2))]
    torch.autograd.gradcheck(lambda *x: ours("torch")(x, layout), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_decoding(device, backend):
    """Tokens one after another, each from the states after the one before."""
    layout = TreeLayout.groups((9, 4), ((3, 3), (3,)))
    inputs = [x.to(device) for x in make(layout)]
    whole, states = ours(backend)(inputs, layout)
    prompts = TreeLayout((9, 4), (-1, -1))
    tokens = [*range(9), *range(15, 19)]
    out, state = ours(backend)([*(x[tokens] for x in inputs[:5]), inputs[5]], prompts)
    torch.testing.assert_close(out, whole[tokens], rtol=1e-12, atol=1e-12)
    state = state[[0, 0, 1]]
    for step in range(3):
        tokens = [9 + step, 12 + step, 19 + step]
        with torch.no_grad():
            out, state = ours(backend)([*(x[tokens] for x in inputs[:5]), state], TreeLayout((1, 1, 1), (-1, -1, -1)))
        torch.testing.assert_close(out, whole[tokens], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, states[[1, 2, 4]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", [TreeLayout((), ()), TreeLayout((0, 0, 0, 0), (-1, 0, -1, 2))], ids=["nothing", "empty"])
@pytest.mark.parametrize("with_state", [True, False])
def test_without_tokens(device, backend, layout, with_state):
    inputs = [None if x is None else x.to(device) for x in make(layout, with_state=with_state)]
    results = run(ours(backend), inputs, layout, used=("out", "state") if with_state else ("out",))
    assert results["out"].shape == (0, 4, 6)
    initial = inputs[5] if with_state else results["state"].new_zeros(2, 4, 8, 6)
    expected = initial[[0, 0, 1, 1][: len(layout.lengths)]]
    torch.testing.assert_close(results["state"], expected)
    for name, x in zip(NAMES, inputs, strict=True):
        assert x is None or results[f"d{name}"].shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_strides_and_dtypes(device, backend):
    """Views of one projection, as in the models, with g in fp32."""
    layout = LAYOUTS["a group"]
    rng, num = torch.Generator().manual_seed(0), layout.num_tokens
    mixed = torch.randn(num, 2 * 16 + 2 * 16 + 4 * 8, generator=rng).to(device, torch.bfloat16)
    query, key, value = (x.unflatten(1, (-1, w)) for x, w in zip(mixed.split([32, 32, 32], 1), (16, 16, 8), strict=True))
    g = -torch.rand(4, num, generator=rng).to(device).T
    beta = torch.rand(num, 8, generator=rng).to(device, torch.bfloat16)[:, ::2]
    inputs = [query, key, value, g, beta, None]
    out, state = ours(backend)(inputs, layout)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = on_paths(recurrence, [None if x is None else x.double() for x in inputs], layout)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)


def test_autocast(device):
    layout = LAYOUTS["a group"]
    inputs = [x.to(device) for x in make(layout, dtype=torch.float32)]
    expected = run(ours("torch"), inputs, layout)
    with torch.autocast(device, torch.bfloat16):  # also in the backward pass
        assert_close(run(ours("torch"), inputs, layout), expected, 0)


def test_checkpointing(device):
    layout = LAYOUTS["a group"]
    inputs = [x.to(device) for x in make(layout)]

    def checkpointed(inputs, layout):
        return checkpoint(ours("torch"), inputs, layout, use_reentrant=False)

    assert_close(run(checkpointed, inputs, layout), run(ours("torch"), inputs, layout), 0)


@pytest.mark.parametrize("name", ["a group", "one token each"])
def test_inference_mode_before_training(name):
    """What is cached for a layout serves both."""
    layout = LAYOUTS[name]
    inputs = make(layout)
    chunks.plan.cache_clear()
    with torch.inference_mode():
        inferred = ours("torch")(inputs, layout)
    trained = run(ours("torch"), inputs, layout)
    assert_close(dict(zip(("out", "state"), inferred, strict=True)), {name: trained[name] for name in ("out", "state")}, 1e-15)


def test_writes_all_elements(nan_filled):
    for layout in LAYOUTS.values():
        for with_state in (True, False):
            for name, x in run(ours("torch"), make(layout, with_state=with_state), layout).items():
                assert x.isfinite().all(), name


def test_leaves_gradients_alone():
    """The backward pass reuses the memory of its own gradients only."""
    layout = LAYOUTS["one sequence"]
    inputs = [x.requires_grad_() for x in make(layout, (2, 2))]
    results = ours("torch")(inputs, layout)
    upstream = [torch.ones_like(x) for x in results]
    torch.autograd.grad(results, inputs, upstream)
    assert all((x == 1).all() for x in upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_does_not_wait_for_the_device(name):
    inputs = [x.cuda().requires_grad_() for x in make(LAYOUTS[name], dtype=torch.float32)]
    gated_delta_rule(*inputs[:5], LAYOUTS[name], backend="torch")  # loads libraries
    chunks.plan.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, state = ours("torch")(inputs, LAYOUTS[name])
        gradients = torch.autograd.grad((out, state), inputs, (torch.ones_like(out), torch.ones_like(state)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)


class FakeFla:
    """flash-linear-attention with its kernels replaced by the recurrence; it checks what they need."""

    def __init__(self):
        self.calls = []

    def chunk_gated_delta_rule(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
        chunk_indices=None, cp_context=None, **kwargs,
    ):  # fmt: skip
        assert not kwargs
        assert not any((use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first))
        assert chunk_indices is cp_context is None
        assert {len(x) for x in (q, k, v, g, beta)} == {1}
        assert cu_seqlens.dtype == torch.int64
        assert cu_seqlens_cpu.device.type == "cpu"
        assert torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        assert cu_seqlens_cpu.diff().min() > 0
        assert cu_seqlens_cpu[-1] == q.shape[1]
        assert initial_state is None or (len(initial_state) == len(cu_seqlens) - 1 and initial_state.dtype == torch.float32)
        self.calls.append(("chunk", len(cu_seqlens) - 1, output_final_state))
        parts = [x[0].split(cu_seqlens_cpu.diff().tolist()) for x in (q, k, v, g, beta)]
        return self._sequences(zip(*parts, strict=True), initial_state, scale, use_qk_l2norm_in_kernel, output_final_state, 0)

    def fused_recurrent_gated_delta_rule(
        self, q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **kwargs,
    ):  # fmt: skip
        assert not kwargs
        assert gk is gv is A_log is dt_bias is cu_seqlens is None
        assert not any((use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first))
        assert not torch.is_grad_enabled() or not q.requires_grad
        self.calls.append(("recurrent", len(q), output_final_state))
        batch = zip(q, k, v, g, beta, strict=True)
        return self._sequences(batch, initial_state, scale, use_qk_l2norm_in_kernel, output_final_state, 1)

    def _sequences(self, sequences, states, scale, normalize, output_final_state, batched):
        outputs, finals = [], []
        for i, inputs in enumerate(sequences):
            value, key = inputs[2], inputs[1]
            state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2]) if states is None else states[i]
            out, state = recurrence(*inputs, state, scale, normalize)
            outputs.append(out)
            finals.append(state)
        out = torch.stack(outputs) if batched else torch.cat(outputs).unsqueeze(0)
        return out, torch.stack(finals) if output_final_state else None


@pytest.fixture
def fake_fla(monkeypatch):
    """Run the backend "fla" on the CPU, on ``FakeFla``."""
    fake = FakeFla()
    packages = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule")}
    packages["fla"].ops = packages["fla.ops"]
    packages["fla.ops"].gated_delta_rule = packages["fla.ops.gated_delta_rule"]
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        setattr(packages["fla.ops.gated_delta_rule"], name, getattr(fake, name))
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fla, "unless_half_on_cuda", lambda query: None)
    fla._module.cache_clear()
    yield fake
    fla._module.cache_clear()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("with_state", [True, False])
def test_fla_calls(fake_fla, name, with_state):
    layout = LAYOUTS[name]
    inputs = make(layout, dtype=torch.float32, with_state=with_state)
    exact = run(ours("reference"), [None if x is None else x.double() for x in inputs], layout)
    assert_close(run(ours("fla"), inputs, layout), exact, 1e-5)
    levels = {sum(layout.lengths[s] > 0 for s in layout.path(segment)) for segment in range(len(layout.lengths))} - {0}
    assert [call[0] for call in fake_fla.calls] == ["chunk"] * len(levels)
    assert sum(call[1] for call in fake_fla.calls) == sum(length > 0 for length in layout.lengths)


def test_fla_returns_states_only_where_they_are_used(fake_fla):
    layout = LAYOUTS["a group"]
    gated_delta_rule(*make(layout, dtype=torch.float32)[:5], layout, backend="fla")
    assert fake_fla.calls == [("chunk", 1, True), ("chunk", 3, False)]


@pytest.mark.parametrize("name", ["one token each", "one token per path"])
def test_fla_decodes_with_the_recurrent_kernel(fake_fla, name):
    layout = LAYOUTS[name]
    inputs = make(layout, dtype=torch.float32)
    out, state = ours("fla")(inputs, layout)
    exact = ours("reference")([x.double() for x in inputs], layout)
    assert fake_fla.calls == [("recurrent", layout.num_tokens, True)]
    for a, b in zip((out, state), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_fla_unsupported(monkeypatch, fake_fla):
    query = torch.zeros(4, 2, 64)
    assert fla.unsupported(query) is None
    assert fla.unsupported(torch.zeros(4, 2, 288)) == "supports head dimensions up to 256, got 288"
    module = sys.modules["fla.ops.gated_delta_rule"]
    monkeypatch.setattr(module, "chunk_gated_delta_rule", lambda q, k, v, cu_seqlens=None: None)
    assert fla.unsupported(query) == "needs flash-linear-attention 0.5 or later"
    monkeypatch.setitem(sys.modules, "fla", None)
    fla._module.cache_clear()
    assert fla.unsupported(query).startswith("flash-linear-attention did not load (")


def test_fla_needs_a_gpu():
    assert backends.choose("gated_delta_rule", "auto", torch.zeros(4, 2, 64)) == "torch"
    with pytest.raises(NotImplementedError, match="no backend serves gated_delta_rule: fla: supports CUDA tensors, got cpu"):
        gated_delta_rule(*make(LAYOUTS["a group"])[:5], LAYOUTS["a group"], backend="fla")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(9, 2, 8)}, ValueError, r"query must be \(N, H, D\) of the 10 tokens of layout, got \(9, 2, 8\)"),
        ({"query": torch.zeros(10, 16)}, ValueError, r"query must be \(N, H, D\) of the 10 tokens of layout, got \(10, 16\)"),
        ({"key": torch.zeros(10, 2, 4)}, ValueError, r"key must have the shape of query, \(10, 2, 8\), got \(10, 2, 4\)"),
        ({"key": torch.zeros(10, 2, 8).half()}, TypeError, "key must have dtype float32, got float16"),
        ({"value": torch.zeros(10, 3, 6)}, ValueError, "value must have a multiple of the 2 heads of key, got 3"),
        ({"value": torch.zeros(10, 4, 6).long()}, TypeError, "value must be floating point, got int64"),
        ({"g": torch.zeros(10, 2)}, ValueError, r"g must have the shape of \(N, Hv\), \(10, 4\), got \(10, 2\)"),
        ({"beta": torch.zeros(4, 10)}, ValueError, r"beta must have the shape of \(N, Hv\), \(10, 4\), got \(4, 10\)"),
        ({"beta": None}, TypeError, "beta must be a tensor, got NoneType"),
        (
            {"initial_state": torch.zeros(1, 4, 8, 6)},
            ValueError,
            r"initial_state must have the shape of \(roots of layout, Hv, Dk, Dv\), \(2, 4, 8, 6\), got \(1, 4, 8, 6\)",
        ),
        ({"initial_state": torch.zeros(2, 4, 8, 6).int()}, TypeError, "initial_state must be floating point, got int32"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        ({"backend": "cpp"}, ValueError, "backend must be one of auto, reference, torch, fla; got 'cpp'"),
    ],
)
def test_bad_arguments(changes, error, message):
    layout = TreeLayout((4, 2, 3, 1), (-1, 0, 0, -1))
    arguments = dict(zip(NAMES, make(layout, dtype=torch.float32), strict=True)) | changes
    with pytest.raises(error, match=message):
        gated_delta_rule(**arguments, layout=layout)
