"""linear_grpo_loss equals grpo_loss of linear_logps, also in one sweep over the logits."""

import sys

import pytest
import torch
from support.budget import assert_within_budget
from support.grpo_cases import VARIANTS, make, on, packed
from support.linear_cases import KERNELS, ROW

from vlmkernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_logps
from vlmkernels.ops import linear_grpo_loss as linear_grpo_loss_module
from vlmkernels.ops import linear_logps as linear_logps_module
from vlmkernels.ops.grpo_loss.inputs import LossInputs
from vlmkernels.ops.linear_grpo_loss import in_one_sweep
from vlmkernels.ops.linear_logps import sweep

pytestmark = pytest.mark.device

VOCAB, WIDTH = 211, 24
ONE_SWEEP = [name for name, settings in VARIANTS.items() if in_one_sweep(GRPOLossConfig(**settings))]
HALF = [torch.bfloat16, torch.float16]


def problem(device, B=5, T=6, dtype=torch.float32, bias=True, per_token=False):
    """hidden, weight, bias, targets, and a batch of grpo_loss whose policies are close to the model's logps."""
    batch = on(device, make(B, T, per_token=per_token))
    rng = torch.Generator().manual_seed(B + T)

    def randn(*shape):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    operands = [randn(B, T, WIDTH), 0.5 * randn(VOCAB, WIDTH), randn(VOCAB) if bias else None]
    targets = torch.randint(VOCAB, (B, T), generator=rng).to(device)
    double = [x if x is None else x.double() for x in operands]
    logps = linear_logps(*double[:2], targets, bias=double[2], temperature=0.8, backend="reference")
    for name in ("old_logps", "ref_logps", "rollout_logps", "masked_logps"):
        batch[name] += logps - batch["logps"]
    del batch["entropy"], batch["logps"]
    return operands, targets, {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}


def inputs_for(config, batch):
    """The inputs that the configuration reads."""
    batch = dict(batch)
    if config.rollout_correction is None and config.off_policy_mask_threshold is None:
        batch.pop("rollout_logps")
    if not config.perception:
        batch.pop("masked_logps")
    return batch


def composed(hidden, weight, targets, *, bias, rows=None, softcap=None, backend, **options):
    """The formula of the docstring."""
    head = {"bias": bias, "temperature": 0.8, "softcap": softcap, "rows": rows, "mask": options.get("loss_mask")}
    logps, entropy = linear_logps(hidden, weight, targets, **head, return_entropy=True, backend=backend)
    return grpo_loss(logps, entropy=entropy, backend=backend, **options)


def fused(hidden, weight, targets, **options):
    return linear_grpo_loss(hidden, weight, targets, temperature=0.8, **options)


def gradients(function, operands, targets, upstream=1.7, **options):
    """Return the gradients of ``upstream`` times the loss, and the output."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in operands]
    if "masked_logps" in options:
        leaves.append(options["masked_logps"].detach().clone().requires_grad_())
        options["masked_logps"] = leaves[3]
    output = function(*leaves[:2], targets, bias=leaves[2], **options)
    wanted = [x for x in leaves if x is not None]
    return torch.autograd.grad(upstream * output.loss, wanted), output


def check(operands, targets, batch, config, backend, chunk_bytes=None, **options):
    """Gradients are within the error of the formula in the same dtype, or equal to it. Loss and metrics equal grpo_loss."""
    batch = inputs_for(config, batch) | options
    double = [None if x is None else x.double() for x in operands]
    exact, _ = gradients(composed, double, targets, config=config, backend="reference", **batch)
    eager, _ = gradients(composed, operands, targets, config=config, backend="reference", **batch)
    actual, output = gradients(fused, operands, targets, config=config, backend=backend, chunk_bytes=chunk_bytes, **batch)
    # The gradient of the bias sums a column of the logits' gradient, whose terms cancel.
    size = exact[0].abs().sum().item() if len(exact) > 2 else None
    if in_one_sweep(config):
        for name, a, e, x in zip(("dhidden", "dweight", "dbias", "dmasked"), actual, eager, exact, strict=False):
            assert_within_budget(name, a, e, x, scale=size if name == "dbias" else None)
    elif chunk_bytes is None:
        expected, _ = gradients(composed, operands, targets, config=config, backend=backend, **batch)
        if operands[0].is_cuda and "rows" in options:  # gradients of a repeated row are added up in no fixed order
            torch.testing.assert_close(actual, expected)
        else:
            assert all(torch.equal(a, x) for a, x in zip(actual, expected, strict=True))
    else:
        torch.testing.assert_close(list(actual), [x.to(actual[0].dtype) for x in exact], rtol=1e-4, atol=1e-5)
    for name in ("rows", "softcap", "upstream"):
        batch.pop(name, None)
    loss, metrics = grpo_loss(output.logps, entropy=output.entropy, config=config, backend=backend, **batch)
    assert torch.equal(output.loss, loss)
    assert output.metrics.keys() == metrics.keys()
    assert all(torch.equal(output.metrics[name], value) for name, value in metrics.items())


def test_one_sweep_is_for_objectives_of_tokens():
    assert ONE_SWEEP == ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "token mask", "papo"]


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_fp64(need, device, nan_filled, backend, variant):
    config = GRPOLossConfig(**VARIANTS[variant])
    operands, targets, batch = problem(device)
    need("linear_grpo_loss", backend, operands[0])
    check(operands, targets, batch, config, backend, num_items=17.0)
    if backend in ("reference", "cpp") or variant in (*ONE_SWEEP, "gspo", "vespo"):  # emulated kernels are slow
        check(operands, targets, batch, config, backend, chunk_bytes=7 * VOCAB * ROW, accumulation_steps=3)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.bfloat16, 1.7), *((torch.float16, x) for x in (1.0, 65536.0, 1e-3))], ids=str
)
def test_half_precision(need, device, nan_filled, backend, dtype, upstream):
    """On policy, because there no rounding moves a token across a bound; one chunk, and several; loss scales for fp16."""
    operands, targets, batch = problem(device, 5, 7, dtype)
    need("linear_grpo_loss", backend, operands[0])
    config = GRPOLossConfig("grpo", beta=0.1, entropy_coef=0.1, perception_loss_weight=0.3)
    del batch["old_logps"]
    rows = torch.arange(35, device=device).view(5, 7) // 2
    for chunk_bytes in (None, 9 * VOCAB * ROW):
        check(operands, targets, batch, config, backend, chunk_bytes, upstream=upstream)
        if backend in ("reference", "cpp") or upstream == 65536:  # emulated kernels are slow
            head = {"rows": rows, "softcap": 4.0}
            check(operands, targets, batch, config.replace(beta=0.0), backend, chunk_bytes, upstream=upstream, **head)


@pytest.mark.parametrize("variant", [*ONE_SWEEP, "gspo", "vespo"])
def test_packed_and_repeated_rows(device, variant):
    """Packed completions whose first tokens are all predicted by the same row."""
    operands, targets, batch = problem(device)
    config = GRPOLossConfig(**VARIANTS[variant])
    flat = packed(batch)
    cu_seqlens = flat["cu_seqlens"].long()
    rows = batch["loss_mask"].flatten().nonzero().squeeze(1)
    first = cu_seqlens[:-1][cu_seqlens.diff() > 0]
    head = {"bias": operands[2].double(), "temperature": 0.8, "backend": "reference"}

    def score(rows, targets):
        return linear_logps(*(x.double() for x in operands[:2]), targets, rows=rows, **head)

    before = score(rows, targets.flatten()[rows])
    rows[first] = 3
    targets = targets.flatten()[: len(rows)]
    for name in ("old_logps", "ref_logps", "rollout_logps", "masked_logps"):  # the policies stay around the model
        flat[name] += (score(rows, targets) - before).float()
    check(operands, targets, flat, config, "auto", rows=rows)
    check(operands, targets, flat, config, "auto", chunk_bytes=7 * VOCAB * ROW, rows=rows)


def test_advantages_per_token(device):
    operands, targets, batch = problem(device, per_token=True)
    check(operands, targets, batch, GRPOLossConfig("bnpo"), "auto")
    flat = packed(batch)
    check([operands[0][batch["loss_mask"]], *operands[1:]], targets[batch["loss_mask"]], flat, GRPOLossConfig("bnpo"), "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_only_needed_gradients_are_computed(device, monkeypatch, needs, dtype):
    """Forward and backward pass run two products with a frozen head, instead of three."""
    (hidden, weight, bias), targets, batch = problem(device, dtype=dtype)
    operands = {"hidden": hidden, "weight": weight, "bias": bias}
    every, _ = gradients(fused, list(operands.values()), targets, **inputs_for(GRPOLossConfig(), batch))
    operands[needs].requires_grad_()
    shapes = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=product, **o: shapes.append(tuple((r := f(*a, **o)).shape)) or r)
    output = fused(**operands, targets=targets, **inputs_for(GRPOLossConfig(), batch))
    (1.7 * output.loss).backward()
    torch.testing.assert_close(operands[needs].grad, every[list(operands).index(needs)])
    num = int(batch["loss_mask"].sum())
    logits, dhidden, dweight = (num, VOCAB), (num, WIDTH), (VOCAB, WIDTH)
    assert shapes == {"hidden": [logits, dhidden], "weight": [logits, dweight], "bias": [logits]}[needs]


@pytest.mark.parametrize(
    ("variant", "dtype", "rows"), [("dapo", torch.float32, 30), ("gspo", torch.float32, 30), *(("dapo", x, 5) for x in HALF)]
)
def test_nothing_is_computed_again(device, monkeypatch, variant, dtype, rows):
    """Logits that fit in chunk_bytes are computed once, for any objective; in one sweep, any logits are."""
    operands, targets, batch = problem(device, dtype=dtype)
    config = GRPOLossConfig(**VARIANTS[variant])
    made = []
    original = linear_logps_module.sweep.Sweep.logits
    monkeypatch.setattr(linear_logps_module.sweep.Sweep, "logits", lambda *a: made.append(len(a[1])) or original(*a))
    gradients(fused, operands, targets, config=config, chunk_bytes=rows * VOCAB * ROW, **inputs_for(config, batch))
    assert (len(made) == 1) == (rows == 30)
    assert sum(made) == int(batch["loss_mask"].sum())


def test_without_gradients(device):
    operands, targets, batch = problem(device)
    with torch.no_grad():
        output = fused(*operands[:2], targets, bias=operands[2], **inputs_for(GRPOLossConfig(), batch))
    _, expected = gradients(fused, operands, targets, **inputs_for(GRPOLossConfig(), batch))
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, expected.loss.detach())


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 7 * VOCAB * ROW])
def test_fp32_master_weight_and_autocast(device, half, chunk_bytes):
    operands, targets, batch = problem(device, bias=False)
    hidden, weight = (x.clone().requires_grad_() for x in operands[:2])
    config = GRPOLossConfig()
    with torch.autocast(device, half):
        output = fused(hidden, weight, targets, chunk_bytes=chunk_bytes, **inputs_for(config, batch))
    output.loss.backward()
    rounded = [hidden.detach().to(half), weight.detach().to(half), None]
    expected, _ = gradients(fused, rounded, targets, **inputs_for(config, batch))
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(1.7 * hidden.grad, expected[0].float(), rtol=0.02, atol=1e-5)
    torch.testing.assert_close(1.7 * weight.grad, expected[1].float(), rtol=0.02, atol=1e-4)


def test_one_backward_pass(device):
    operands, targets, batch = problem(device)
    leaves = [x.requires_grad_() for x in operands]
    output = fused(*leaves[:2], targets, bias=leaves[2], **inputs_for(GRPOLossConfig(), batch))
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_grpo_loss supports one backward pass"):
        output.loss.backward()


SEVERAL_CHUNKS = pytest.mark.parametrize("chunk_bytes", [None, 1000 * 50 * ROW])


def many_tokens(device, *large):
    """fp16 operands and 4096 equal targets. ``large``: values for the first columns of hidden and weight."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 16, generator=rng), 0.3 * torch.randn(50, 16, generator=rng)
    for i, (of_hidden, of_weight) in enumerate(large):
        hidden[..., i], weight[:, i] = of_hidden, of_weight
    operands = [hidden.to(device, torch.float16), weight.to(device, torch.float16), None]
    return operands, torch.zeros(1, 4096, dtype=torch.long, device=device)


@SEVERAL_CHUNKS
def test_small_fp16_gradients(device, monkeypatch, chunk_bytes):
    """They are as exact as those of the formula with a loss scale. Without gradient_scale rounding would change them."""
    operands, targets = many_tokens(device)
    options = {"advantages": torch.full((1,), 0.001, device=device), "upstream": 65536.0}
    double = [x if x is None else x.double() for x in operands]
    exact, _ = gradients(composed, double, targets, backend="reference", **options)
    eager, _ = gradients(composed, operands, targets, backend="reference", **options)
    actual, _ = gradients(fused, operands, targets, chunk_bytes=chunk_bytes, **options)
    for name, a, e, x in zip(("dhidden", "dweight"), actual, eager, exact, strict=True):
        assert_within_budget(name, a, e, x)
    monkeypatch.setattr(linear_grpo_loss_module, "gradient_scale", lambda tokens: 1.0)
    unscaled, _ = gradients(fused, operands, targets, chunk_bytes=chunk_bytes, **options)
    assert all((a.double() - x).norm() > 0.1 * x.norm() for a, x in zip(unscaled, exact, strict=True))


@SEVERAL_CHUNKS
@pytest.mark.parametrize(
    "config",
    [
        GRPOLossConfig(loss_type="dr_grpo", max_completion_length=32768),  # all weights are small
        GRPOLossConfig(loss_type="luspo", importance_sampling_level="token"),  # weights of 1 / B
        GRPOLossConfig(loss_type="grpo"),  # weights of 1 / length: a completion of one token has 4095 times that of the other
    ],
    ids=lambda config: config.loss_type,
)
def test_fp16_weights(device, config, chunk_bytes):
    """Aggregations whose weights are far from 1 / tokens, or differ between completions."""
    operands, targets = many_tokens(device)
    operands[0], targets = torch.cat([operands[0]] * 2), torch.cat([targets] * 2)
    mask = torch.ones_like(targets, dtype=torch.bool)
    mask[1, 1:] = False
    options = {"advantages": torch.tensor([3.0, -3.0], device=device), "config": config, "loss_mask": mask}
    double = [x if x is None else x.double() for x in operands]
    exact, _ = gradients(composed, double, targets, 1.0, backend="reference", **options)
    for k, x in enumerate(exact):  # with a loss scale at which this gradient has the range of fp16
        upstream = 2.0 ** -x.abs().max().log2().floor().item()
        actual = gradients(fused, operands, targets, upstream, chunk_bytes=chunk_bytes, **options)[0][k].double() / upstream
        long, short = (actual[i] - x[i] for i in (0, 1)) if k == 0 else (actual - x, torch.zeros(()))
        assert long.norm() < 2e-3 * (x[0] if k == 0 else x).norm()
        assert short.norm() <= 2e-3 * x[1].norm()


@SEVERAL_CHUNKS
def test_fp16_overflows_only_with_the_gradient(device, chunk_bytes):
    """The products with the gradients of the logits are beyond 65504 until they are scaled."""
    operands, targets = many_tokens(device, (32.0, 0.0), (0.0, 30000.0))  # the logits stay small
    operands[1][1:, 1] = 0  # only the weight of the target is large
    double = [x if x is None else x.double() for x in operands]
    options = {"advantages": torch.full((1,), 4.0, device=device)}
    for upstream, is_finite in ((1.0, True), (65536.0, False)):
        exact, _ = gradients(composed, double, targets, upstream, backend="reference", **options)
        actual, _ = gradients(fused, operands, targets, upstream, chunk_bytes=chunk_bytes, **options)
        for a, x in zip(actual, exact, strict=True):
            assert bool(x.half().isfinite().all()) == is_finite
            torch.testing.assert_close(a, x.half(), rtol=4e-3, atol=4e-3 * upstream * x.abs().median().item())


@pytest.mark.skipif(torch.cuda.is_available(), reason="logits are fp32 there")
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("chunk_bytes", [None, 50 * 2])
def test_logits_beyond_fp16_are_named(need, backend, chunk_bytes):
    hidden, weight = torch.tensor([[[1.0], [300.0]]]).half(), torch.full((50, 1), 300.0).half().requires_grad_()
    need("linear_grpo_loss", backend, hidden)
    inputs = {"targets": torch.zeros(1, 2, dtype=torch.long), "advantages": torch.ones(1), "backend": backend}
    with pytest.raises(ValueError, match=r"hidden must have logits within fp16's range, up to 65504, got inf at index \(1,\)"):
        linear_grpo_loss(hidden, weight, **inputs, chunk_bytes=chunk_bytes)
    assert linear_grpo_loss(hidden, weight, **inputs, chunk_bytes=chunk_bytes, softcap=30.0).loss.isfinite()


@pytest.mark.parametrize("divisor", ["num_items", "accumulation_steps"])
def test_fp16_is_scaled_before_it_is_rounded(device, divisor):
    """Gradients of 1e-9 survive with a loss scale, as without the fusion."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 64, 32, generator=rng).to(device, torch.float16).requires_grad_()
    weight = (0.3 * torch.randn(2000, 32, generator=rng)).to(device, torch.float16).requires_grad_()
    targets = torch.randint(2000, (1, 64), generator=rng).to(device)
    gradients = []
    for scale, number in ((65536.0, 1e6), (1.0, 1e6 / 65536), (1.0, 1e30)):
        output = linear_grpo_loss(hidden, weight, targets, torch.ones(1, device=device), **{divisor: number})
        gradients.append(torch.autograd.grad(output.loss * scale, (hidden, weight)))
    torch.testing.assert_close(*gradients[:2])
    assert all(x.eq(0).all() for x in gradients[2])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_nothing_counts(device, shape):
    """An empty batch, or one with all tokens masked: loss and gradients are 0."""
    hidden = torch.zeros(*shape, WIDTH, device=device, requires_grad=True)
    weight = torch.ones(VOCAB, WIDTH, device=device, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    output = linear_grpo_loss(hidden, weight, targets, torch.ones(shape[0], device=device), loss_mask=mask)
    output.loss.backward()
    assert output.loss == 0
    assert weight.grad.eq(0).all()
    assert hidden.grad.eq(0).all()


@pytest.fixture
def wide_logits(monkeypatch, device):
    """GEMMs of 16-bit operands return fp32 logits, as on a GPU."""
    if device == "cuda":
        return
    for module in (sweep, linear_grpo_loss_module):
        monkeypatch.setattr(module, "result_dtype", lambda hidden: torch.float32)

    def logits(self, hidden, out):
        bias = 0 if self.head.bias is None else self.head.bias.float()
        return out.copy_(hidden.float() @ self.head.weight.float().t() + bias)

    monkeypatch.setattr(sweep.Sweep, "logits", logits)


# 30 rows in chunks of 8. Kept are the logit gradients of all rows, of segments of 24 and 6 or 16 and 14 rows, or of one chunk.
@pytest.mark.parametrize("kept_rows", [30, 24, 16, 0])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_kept_gradients(need, device, nan_filled, wide_logits, backend, kept_rows, dtype):
    operands, targets, batch = problem(device, dtype=dtype)
    need("linear_grpo_loss", backend, operands[0])
    config, batch = GRPOLossConfig("grpo", beta=0.1, entropy_coef=0.1), inputs_for(GRPOLossConfig(), batch)
    for name in ("old_logps", "loss_mask"):
        del batch[name]  # on policy no rounding moves a token across a bound
    kept = {"chunk_bytes": 8 * VOCAB * 4, "keep_logits_bytes": kept_rows * VOCAB * 2}
    double = [x.double() for x in operands]
    exact, _ = gradients(composed, double, targets, config=config, backend="reference", **batch)
    eager, _ = gradients(composed, operands, targets, config=config, backend="reference", **batch)
    actual, _ = gradients(fused, operands, targets, config=config, backend=backend, **kept, **batch)
    size = exact[0].abs().sum().item()
    for name, a, e, x in zip(("dhidden", "dweight", "dbias"), actual, eager, exact, strict=True):
        assert_within_budget(name, a, e, x, scale=size if name == "dbias" else None)


@pytest.mark.parametrize(("kept_rows", "products"), [(30, 1), (24, 2), (16, 2), (0, 4)])
def test_few_long_products(monkeypatch, wide_logits, device, kept_rows, products):
    """One product into the (V, H) gradient of the weight per segment, not per chunk."""
    (hidden, weight, _), targets, batch = problem(device, dtype=torch.bfloat16, bias=False)
    added = []
    original = sweep._add_product
    monkeypatch.setattr(sweep, "_add_product", lambda *args: added.append(args[2].shape) or original(*args))
    kept = {"chunk_bytes": 8 * VOCAB * 4, "keep_logits_bytes": kept_rows * VOCAB * 2}
    loss = fused(hidden, weight.requires_grad_(), targets, advantages=batch["advantages"], **kept).loss
    assert len(added) == (0 if kept_rows == 30 else products)
    loss.backward()
    assert len(added) == products
    assert sum(len_ for len_, _ in added) == 30


@pytest.mark.parametrize(("segment_rows", "products"), [(30, 1), (24, 2), (8, 4), (0, 4)])
def test_few_long_products_of_linear_logps(monkeypatch, wide_logits, device, segment_rows, products):
    """The same in the backward pass of linear_logps, which objectives of whole sequences use."""
    operands, targets, batch = problem(device, dtype=torch.bfloat16)
    config, batch = GRPOLossConfig(**VARIANTS["gspo"]), inputs_for(GRPOLossConfig(), batch)
    for name in ("old_logps", "loss_mask"):
        del batch[name]
    exact, _ = gradients(composed, [x.double() for x in operands], targets, config=config, backend="reference", **batch)
    eager, _ = gradients(composed, operands, targets, config=config, backend="reference", **batch)
    added = []
    original = sweep._add_product
    monkeypatch.setattr(sweep, "_add_product", lambda *args: added.append(len(args[2])) or original(*args))
    monkeypatch.setattr(linear_logps_module, "default_dlogits_bytes", lambda device: segment_rows * VOCAB * 2)
    monkeypatch.setattr(sys.modules["vlmkernels.ops.linear_logps.check"], "default_chunk_bytes", lambda device: 8 * VOCAB * 4)
    actual, _ = gradients(fused, operands, targets, config=config, **batch)
    assert len(added) == products
    assert sum(added) == 30
    for name, a, e, x in zip(("dhidden", "dweight"), actual, eager, exact, strict=False):
        assert_within_budget(name, a, e, x)


@pytest.mark.parametrize("keep_logits_bytes", [0, 2**20])
@pytest.mark.parametrize("frozen_master_weight", [False, True])
@pytest.mark.parametrize("half", HALF, ids=str)
def test_opcheck(device, keep_logits_bytes, frozen_master_weight, half):
    (hidden, weight, bias), targets, batch = problem(device, 2, 3, torch.float32 if frozen_master_weight else half)
    if frozen_master_weight:  # fp32, with hidden states of 16 bits
        hidden = hidden.to(half)
    needed = [True, not frozen_master_weight, True]
    if keep_logits_bytes:
        del batch["loss_mask"]  # the rows of dlogits behind those of the selected tokens are not written
    results = torch.zeros((), device=device).expand(targets.shape)
    batch |= {"logps": results, "entropy": results, "accumulation_steps": 1.0}
    inputs = [batch.get(name) for name in LossInputs._fields]
    config = GRPOLossConfig(beta=0.1, rollout_correction="token_truncate", perception_loss_weight=0.3).text
    settings = (0.8, 1.0, None, 2**20, keep_logits_bytes, needed, config, "auto")
    arguments = (hidden, weight, bias, targets, batch.get("loss_mask"), None, *inputs, *settings)
    torch.library.opcheck(torch.ops.vlmkernels.linear_grpo_loss_fwd, arguments)
    dlogits = torch.randn(targets.numel(), VOCAB, device=device).to(hidden.dtype)
    arguments = (torch.tensor(2.0, device=device), dlogits, hidden, weight, bias, None, None, needed)
    torch.library.opcheck(torch.ops.vlmkernels.linear_grpo_loss_bwd, arguments)


@pytest.mark.parametrize(("variant", "dtype"), [("dapo", torch.float32), ("gspo kl", torch.float32), ("dapo", torch.float16)])
def test_compile(device, variant, dtype):
    operands, targets, batch = problem(device, dtype=dtype)
    config = GRPOLossConfig(**VARIANTS[variant])
    batch = inputs_for(config, batch)

    def function(hidden, weight, bias):
        return fused(hidden * 1.1, weight, targets, bias=bias, config=config, **batch).loss

    leaves = [x.requires_grad_() for x in operands]
    expected = torch.autograd.grad(2 * function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(2 * compiled(*leaves), leaves), expected)


def test_checkpointing(device):
    operands, targets, batch = problem(device)
    leaves = [x.requires_grad_() for x in operands]
    batch = inputs_for(GRPOLossConfig(), batch)

    def function(hidden, weight, bias):
        return fused(hidden.tanh(), weight, targets, bias=bias, **batch).loss

    expected = torch.autograd.grad(function(*leaves), leaves)
    loss = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.ones(3)}, "advantages must be one per sequence"),
        ({"targets": torch.zeros(2, 3, dtype=torch.long)}, "targets must have the shape of hidden without its width"),
        ({"targets": torch.full((2, 4), 300)}, r"targets must be in \[0, 211\), the vocabulary, got 300"),
        ({"old_logps": torch.zeros(2, 3)}, "old_logps must have the shape of logps"),
        ({"config": GRPOLossConfig(beta=0.1)}, "ref_logps must be given with beta = 0.1"),
        ({"loss_mask": torch.full((2, 4), 0.5)}, "loss_mask must hold only 0 and 1, got 0.5"),
        ({"rollout_logps": torch.zeros(2, 4)}, "rollout_logps must be None unless"),
        ({"config": "papo_d"}, "masked_logps must be given with perception_loss_weight = 0.01"),
        ({"config": "papo_d", "masked_logps": torch.zeros(2, 3)}, "masked_logps must have the shape of logps"),
        ({"chunk_bytes": 100}, "chunk_bytes must hold one row of logits, 844 bytes, got 100"),
        ({"hidden": torch.zeros(2, 4, 5)}, r"weight must be \(V, H\)"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0"),
        ({"config": GRPOLossConfig(check_finite=True), "old_logps": torch.full((2, 4), torch.nan)}, "old_logps must be finite"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "logps must be"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"config": "ppo"}, "config must be one of grpo, .* got 'ppo'"),
        ({"keep_logits_bytes": -1}, r"keep_logits_bytes must be an integer in \[0, 2\*\*63\), got -1"),
    ],
)
def test_bad_input(changes, message):
    arguments = {
        "hidden": torch.zeros(2, 4, WIDTH), "weight": torch.zeros(VOCAB, WIDTH, requires_grad=True),
        "targets": torch.zeros(2, 4, dtype=torch.long), "advantages": torch.ones(2),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        linear_grpo_loss(**arguments | changes)
