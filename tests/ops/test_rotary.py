"""rotary: every backend against the fp64 reference and against the functions of transformers, values and gradients."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from support.budget import assert_within_budget

from vlmkernels import backend as backends
from vlmkernels import mrope_axes, rotary, rotary_table, vision_layout

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (leading axes), heads of query and key, features of a head, pairs
SIZES = {
    "vision tower": ((19,), 3, 3, 80, 40),
    "text": ((2, 5), 6, 2, 128, 64),
    "more heads than a block": ((3,), 18, 1, 8, 4),
    "a quarter of each head": ((2, 3), 2, 2, 64, 8),
    "odd": ((2, 3), 5, 3, 15, 5),
    "one pair": ((1,), 1, 1, 2, 1),
    "no pair": ((2,), 1, 2, 6, 0),
}


def make(leading, query_heads, key_heads, width, pairs, dtype, device, table_dtype=torch.float32):
    rng = torch.Generator().manual_seed(width + pairs)
    query, key = (torch.randn(*leading, heads, width, generator=rng).to(device, dtype) for heads in (query_heads, key_heads))
    angles = 50 * torch.randn(*leading, pairs, generator=rng)
    return query, key, angles.cos().to(device, table_dtype), angles.sin().to(device, table_dtype)


def run(query, key, cos, sin, backend):
    """The results and the gradients of a weighted sum of both."""
    device = "cpu" if backends.device_type(backend) == "cpu" else query.device
    query, key, cos, sin = (x.to(device) for x in (query, key, cos, sin))
    inputs = query.requires_grad_(), key.requires_grad_()
    outputs = rotary(*inputs, cos, sin, backend=backend)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=device).view_as(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    names = ("query", "key", "dquery", "dkey")
    return {name: x.detach().cpu() for name, x in zip(names, (*outputs, *gradients), strict=True)}


def check(query, key, cos, sin, backend):
    exact = run(query.double(), key.double(), cos.double(), sin.double(), "reference")
    eager = run(query, key, cos, sin, "reference")
    actual = run(query, key, cos, sin, backend)
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_matches_fp64(need, device, nan_filled, backend, dtype, size):
    inputs = make(*SIZES[size], dtype, device)
    need("rotary", backend, *inputs)
    check(*inputs, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("table_dtype", DTYPES[1:], ids=str)
def test_table_of_16_bits(need, device, backend, table_dtype):
    """Text models pass cos and sin in 16 bits: the results depend only on their values."""
    inputs = make((2, 5), 3, 1, 40, 20, torch.float32, device, table_dtype)
    need("rotary", backend, *inputs)
    check(*inputs, backend)


def shifted(x):
    """The same values at an odd storage offset: heads are not aligned to 16 bytes."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def parts_of_qkv(query, key):
    qkv = torch.cat([query, key, key], -2)
    return qkv.split([query.shape[-2], key.shape[-2], key.shape[-2]], -2)[:2]


LAYOUTS = {
    "parts of a fused qkv": parts_of_qkv,
    "heads first in memory": lambda q, k: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)],
    "odd offset": lambda q, k: [shifted(q), shifted(k)],
    "some tokens": lambda q, k: [torch.cat([x, x], 1)[:, : x.shape[1]] for x in (q, k)],
    "one head repeated": lambda q, k: [x[:, :, :1].expand(-1, -1, 4, -1) for x in (q, k)],
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_taken_as_they_are(need, device, nan_filled, backend, layout):
    query, key, cos, sin = make((2, 5), 6, 2, 32, 16, torch.bfloat16, device)
    need("rotary", backend, query)
    query, key = (x.detach() for x in LAYOUTS[layout](query, key))
    check(query, key, cos, sin, backend)
    whole = torch.cat([cos, sin], -1)  # the halves of a table of twice the width, shared by the batch
    check(query, key, whole[:1, :, :16], whole[:1, :, 16:], backend)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_heads_first(need, device, nan_filled, backend):
    """Results and gradients equal those of transposed tensors."""
    query, key, cos, sin = make((2, 5), 6, 2, 32, 12, torch.float32, device)
    need("rotary", backend, query)
    inputs = [x.transpose(1, 2).contiguous().requires_grad_() for x in (query, key)]
    actual = rotary(*inputs, cos, sin, heads_first=True, backend=backend)
    assert all(x.transpose(1, 2).is_contiguous() for x in actual)
    expected = [x.transpose(1, 2) for x in rotary(*(x.transpose(1, 2) for x in inputs), cos, sin, backend=backend)]
    weights = [torch.linspace(-1, 2, x.numel(), device=device).view(x.shape) for x in actual]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    gradients = (torch.autograd.grad(x, inputs, weights) for x in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_any_stride(need, device, backend):
    """The gradient that ``sum`` returns is an expanded scalar, with strides of 0."""
    query, key, cos, sin = make((3,), 2, 2, 8, 4, torch.float32, device)
    need("rotary", backend, query)
    query.requires_grad_()
    (actual,) = torch.autograd.grad(rotary(query, key, cos, sin, backend=backend)[0].sum(), query)
    (expected,) = torch.autograd.grad(rotary(query, key, cos, sin, backend="reference")[0].sum(), query)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("size", [((0,), 2, 2, 8, 4), ((2, 0), 2, 2, 8, 4), ((3,), 0, 2, 8, 4)])
def test_empty(need, device, backend, size):
    query, key, cos, sin = make(*size, torch.float32, device)
    need("rotary", backend, query)
    assert [x.shape for x in rotary(query, key, cos, sin, backend=backend)] == [query.shape, key.shape]


def test_gradcheck_of_the_reference():
    query, key, cos, sin = make((2, 3), 2, 1, 7, 2, torch.float64, "cpu", torch.float64)
    inputs = query.requires_grad_(), key.requires_grad_()

    def function(q, k):
        return rotary(q, k, cos, sin, backend="reference")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_opcheck(need, device, backend):
    query, key, cos, sin = make((2, 3), 2, 1, 8, 4, torch.float32, device)
    need("rotary", backend, query)
    arguments = (query.requires_grad_(), key.requires_grad_(), cos, sin, False, backend)
    torch.library.opcheck(torch.ops.vlmkernels.rotary.default, arguments)
    query, key = (x.detach().transpose(1, 2).requires_grad_() for x in (query, key))
    torch.library.opcheck(torch.ops.vlmkernels.rotary.default, (query, key, cos, sin, False, backend, True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_compiles_whole(need, device, backend):
    query, key, cos, sin = make((5,), 2, 2, 8, 4, torch.float32, device)
    need("rotary", backend, query)
    query.requires_grad_()

    def loss(q):
        return sum(x.square().sum() for x in rotary(q * 2, key, cos, sin, backend=backend))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), loss(query))
    torch.testing.assert_close(*(torch.autograd.grad(f(query), query)[0] for f in (compiled, loss)))


def error_cases():
    q, k, c = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 4)
    yield "query shape", (q[0, 0], k, c, c), {}, ValueError, r"query must be \(N, Hq, D\) or \(B, S, Hq, D\), got \(4, 8\)"
    yield "query dtype", (q.int(), k, c, c), {}, TypeError, "query must be floating point, got torch.int32"
    yield "key tokens", (q, k[:, :2], c, c), {}, ValueError, r"key must have the tokens and .*, got \(2, 2, 1, 8\) for \(2, 3"
    yield "key dtype", (q, k.bfloat16(), c, c), {}, TypeError, "key must have dtype float32, got bfloat16"
    yield (
        "heads first",
        (q[0], k[0], c, c),
        {"heads_first": True},
        ValueError,
        r"query must be \(B, Hq, S, D\) with",
    )
    wide = torch.zeros(2, 3, 5)
    yield "too many pairs", (q, k, wide, wide), {}, ValueError, r"cos must have .* at most D / 2 pairs, got \(2, 3, 5\) for"
    yield "cos tokens", (q, k, c[:, :2], c[:, :2]), {}, ValueError, r"cos must have the tokens of query, or 1 .* \(2, 2, 4\)"
    yield "sin shape", (q, k, c, c[..., :3]), {}, ValueError, r"sin must have the shape of cos, \(2, 3, 4\), got \(2, 3, 3\)"
    yield "sin dtype", (q, k, c, c.bfloat16()), {}, TypeError, "sin must have dtype float32, got bfloat16"
    yield "cos dtype", (q, k, c.int(), c.int()), {}, TypeError, "cos must have dtype float32 or .*, got int32"
    yield "trained", (q, k, c.clone().requires_grad_(), c), {}, ValueError, "cos and sin must not require gradients"
    yield "fp64", (q.double(), k.double(), c, c), {"backend": "cpp"}, NotImplementedError, "cpp: supports float32, .* float64"
    crosswise = torch.zeros(2, 3, 8, 4).transpose(2, 3)
    yield (
        "last axis",
        (crosswise, k, c, c),
        {"backend": "cpp"},
        NotImplementedError,
        "cpp: supports a contiguous last axis, got",
    )


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        rotary(*args, **options)


def test_too_many_pairs_for_a_block():
    inputs = make((1,), 1, 1, 600, 300, torch.float32, "cpu")
    if reason := backends.missing("cuda"):
        pytest.skip(reason)
    assert backends.why_not("rotary", "cuda", *(x.to(backends.device_type("cuda")) for x in inputs)) == (
        "supports at most 256 pairs, got 300"
    )


# Against transformers


def transformers_module(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vision_function(device, name, dtype):
    """Bitwise equal to the reference."""
    module = transformers_module(name)
    query, key, cos, sin = make((19,), 3, 3, 80, 40, dtype, device)
    expected = module.apply_rotary_pos_emb_vision(query, key, *(torch.cat([t, t], -1) for t in (cos, sin)))
    actual = rotary(query, key, cos, sin, backend="reference")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_function(device, dtype):
    """Bitwise equal in fp32; in 16 bits closer to fp64 than transformers, which rounds each product."""
    module = transformers_module("qwen2_5_vl")
    query, key, cos, sin = make((2, 5), 6, 2, 128, 64, dtype, device, dtype)
    whole = [torch.cat([t, t], -1) for t in (cos, sin)]
    heads_first = [x.transpose(1, 2) for x in (query, key)]
    expected = [x.transpose(1, 2) for x in module.apply_rotary_pos_emb(*heads_first, *whole)]
    actual = rotary(query, key, cos, sin, backend="reference")
    exact = rotary(*(x.double() for x in (query, key, cos, sin)), backend="reference")
    for ours, theirs, best in zip(actual, expected, exact, strict=True):
        assert torch.equal(ours, theirs) or dtype != torch.float32
        assert (ours - best).abs().max() <= (theirs - best).abs().max()


@pytest.fixture
def tiny():
    pytest.importorskip("transformers")
    return importlib.import_module("support.tiny")


MODELS = ["qwen2_vl", "vlm", "qwen3_vl"]  # of tiny.py; "vlm" is Qwen2.5-VL


@pytest.mark.parametrize("name", MODELS)
def test_tables_are_those_of_the_models(tiny, name):
    """cos and sin of the rotary embeddings of a vision tower and of a text model."""
    model = getattr(tiny, name)()
    embedding = model.model.language_model.rotary_emb
    positions = torch.randint(0, 300, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    axes = mrope_axes(embedding.mrope_section, interleaved=name == "qwen3_vl")
    expected = embedding(torch.zeros(1), positions)
    for ours, theirs in zip(rotary_table(positions, embedding.inv_freq, axes), expected, strict=True):
        assert torch.equal(torch.cat([ours, ours], -1), theirs)

    embedding = model.model.visual.rotary_pos_emb
    rows = vision_layout(torch.tensor([[1, 4, 6], [2, 2, 8]])).position_ids
    quarter = len(embedding.inv_freq)
    ours = rotary_table(rows.T, embedding.inv_freq.repeat(2), [0] * quarter + [1] * quarter)
    for table, theirs in zip(ours, embedding(torch.zeros(1), rows), strict=True):
        assert torch.equal(torch.cat([table, table], -1), theirs)


@pytest.mark.parametrize(("name", "layers"), [*((name, 4) for name in MODELS), ("text_model", 2)])
def test_in_models(tiny, monkeypatch, name, layers):
    """The same logits and gradients; other models of the same classes are unchanged."""
    from vlmkernels.models import rotary as models_rotary

    model, other = getattr(tiny, name)(), getattr(tiny, name)()
    ids = torch.arange(12).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name != "text_model":
        token = model.config.image_token_id
        inputs["input_ids"] = torch.cat([ids, torch.tensor([[token] * 2, [token, 3]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 4], [1, 2, 2]])
        rows = model.model.visual.patch_embed.proj.weight[0].numel()
        inputs["pixel_values"] = torch.randn(12, rows, generator=torch.Generator().manual_seed(0))
    models_rotary.use_fused_rotary(model)
    results, counted = [], []
    monkeypatch.setattr(models_rotary, "rotary", lambda *args, **options: counted.append(1) or rotary(*args, **options))
    for m in (model, other):
        logits = m(**inputs).logits
        logits.square().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
        assert len(counted) == layers  # none in the other
    (ours, gradients), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    size = max(g.abs().max() for g in expected.values())
    assert gradients.keys() == expected.keys()
    assert all((gradients[n] - g).abs().max() <= 1e-5 * size for n, g in expected.items())


@pytest.mark.parametrize("unsqueeze_dim", [0, 1, 2])
def test_layouts_of_text_models(tiny, unsqueeze_dim):
    """Pixtral's tower passes tables without a batch axis, and some models rotate before they transpose."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    from vlmkernels.models.rotary import fused_text_rotary

    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=rng) for heads in (4, 2))
    q, k = (x.transpose(1, 2) if unsqueeze_dim == 2 else x for x in (q, k))
    angles = torch.randn(*((5,) if unsqueeze_dim == 0 else (2, 5)), 4, generator=rng)
    cos, sin = (torch.cat([x, x], -1) for x in (angles.cos(), angles.sin()))
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    for ours, theirs in zip(fused_text_rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def decorated(forward):
    """A decorator without ``functools.wraps``, with closures that refer to each other."""

    def call(*args, **kwargs):
        return again(*args, **kwargs)

    def again(*args, **kwargs):
        return forward(*args, **kwargs) if call else None

    return call


@pytest.mark.parametrize("decorators", [[decorated], [torch.no_grad(), decorated], [decorated, torch.no_grad()]])
def test_decorated_attention(tiny, monkeypatch, decorators):
    """transformers 5.24 decorates the forward of text attention. If the function cannot be replaced, the class is named."""
    from vlmkernels.models import rotary as models_rotary

    model = tiny.text_model()
    attention, plain = type(model.model.layers[0].self_attn), type(model.model.layers[0].self_attn).forward
    forward = plain
    for decorator in decorators:
        forward = decorator(forward)
    monkeypatch.setattr(attention, "forward", forward)
    counted, ids = [], torch.arange(6).view(1, 6)
    expected = model(input_ids=ids).logits
    models_rotary.use_fused_rotary(model)
    monkeypatch.setattr(models_rotary, "rotary", lambda *args, **options: counted.append(1) or rotary(*args, **options))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    models_rotary.undo_fused_rotary(model)
    assert attention.forward is forward


def test_attention_that_rotates_elsewhere_raises(tiny, monkeypatch):
    from vlmkernels.models.rotary import use_fused_rotary

    model = tiny.text_model()
    attention = type(model.model.layers[0].self_attn)
    elsewhere = SimpleNamespace(forward=attention.forward)

    def forward(self, hidden_states, position_embeddings, **kwargs):
        return elsewhere.forward(self, hidden_states, position_embeddings, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(NotImplementedError, match="got Qwen2Attention, whose forward gets position_embeddings and calls"):
        use_fused_rotary(model)


def test_axes():
    assert mrope_axes([1, 2, 3]) == [0, 1, 1, 2, 2, 2]
    assert mrope_axes([4, 2, 2], interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]
    with pytest.raises(ValueError, match=r"section must be three numbers >= 0, got \[1, 2\]"):
        mrope_axes([1, 2])
    with pytest.raises(ValueError, match="axes must be one per pair, 4, got 3"):
        rotary_table(torch.zeros(3, 1), torch.ones(4), [0, 1, 2])
    with pytest.raises(ValueError, match=r"axes must be in \[0, 2\), the axes of position_ids, got \[0, 2\]"):
        rotary_table(torch.zeros(2, 1), torch.ones(2), [0, 2])


def test_copies_of_models_and_compiled_ones(tiny):
    from vlmkernels.models.rotary import use_fused_rotary

    model = copy.deepcopy(use_fused_rotary(tiny.vlm()))
    attention = model.model.language_model.layers[0].self_attn
    assert attention.forward.__self__ is attention
    hidden = torch.randn(1, 5, 32)
    angles = model.model.language_model.rotary_emb(hidden, torch.arange(5).expand(3, 1, 5))
    graphs = []
    compiled = torch.compile(attention, backend=lambda graph, _: graphs.append(graph) or graph)
    actual = compiled(hidden, position_embeddings=angles)[0]
    torch.testing.assert_close(actual, attention(hidden, position_embeddings=angles)[0])
    assert [n.target for graph in graphs for n in graph.graph.nodes if "rotary" in str(n.target)] == [
        torch.ops.vlmkernels.rotary
    ]


def test_models_with_another_rotary_function_raise(tiny):
    from vlmkernels.models.rotary import undo_fused_rotary, use_fused_rotary

    model = importlib.import_module("support.tiny_families").case("glm4v").model
    with pytest.raises(
        NotImplementedError, match=r"rotates the pairs \(j, j \+ P\), got another function in Glm4vTextAttention"
    ):
        use_fused_rotary(model)
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(NotImplementedError, match=r"model must have attention modules that call .*, got Linear"):
        use_fused_rotary(torch.nn.Linear(1, 1))
    hooked = tiny.text_model()
    attention = hooked.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(NotImplementedError, match="have the forward of its classes, got another in Qwen2Attention"):
        use_fused_rotary(hooked)
    del attention.forward
    use_fused_rotary(use_fused_rotary(hooked))
    undo_fused_rotary(hooked)
    assert not any("forward" in vars(module) for module in hooked.modules())
