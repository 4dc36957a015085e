"""Our versions of Liger's functions, compared with Liger 0.8.5 where it is correct and with the formula where it is not."""

import importlib.metadata
import sys
import types

import pytest
import torch

from vlmkernels.integrations import liger as ours
from vlmkernels.integrations.liger import formulas
from vlmkernels.integrations.patch import parameters
from vlmkernels.ops.grpo_loss import GRPOLossConfig, reference

pytest.importorskip("liger_kernel")
from liger_kernel import chunked_loss, ops
from liger_kernel.transformers import grpo_loss as theirs

B, T, V, H = 3, 4, 19, 8
LENGTHS = torch.tensor([4, 2, 1])
RATIO_SHAPES = {"(B,)": (B,), "(B, 1)": (B, 1), "(B, L)": (B, T)}


def make(padded=True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, weight, bias = normal(B, T, H), normal(V, H), normal(V)
    ids = torch.randint(V, (B, T), generator=rng)
    logits = hidden @ weight.T + bias
    logp = (logits / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    mask = torch.arange(T) < LENGTHS.unsqueeze(1) if padded else torch.ones(B, T, dtype=torch.bool)
    data = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "logits": torch.cat([logits, normal(B, 1, V)], 1),
        "old": logp + 0.3 * normal(B, T),
        "ref": logp + 0.3 * normal(B, T),
        "advantages": normal(B),
        "ratios": normal(B, T).exp(),
        "upstream": normal(B, T).exp(),
        "mask": mask.double(),
    }
    return types.SimpleNamespace(ids=ids, **{name: x.to(dtype) for name, x in data.items()})


def assert_equal(actual, expected, what):
    """Assert equality within fp32 rounding of the largest value."""
    assert len(actual) == len(expected), what
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (b is None), (what, number)
        if a is not None:
            assert a.shape == b.shape, (what, number)
            error = (a.double() - b.double()).abs().max()
            assert error <= 5e-6 * b.double().abs().max().clamp(min=1e-3), f"{what}, result {number}: {error:.1e}"


def from_logits(function, d, reduce=True, ratio=None, **settings):
    """Return all results and the gradient by logits."""
    logits = d.logits.detach().requires_grad_()
    if ratio is not None:
        ratio = d.ratios.reshape(-1)[: torch.Size(RATIO_SHAPES[ratio]).numel()].view(RATIO_SHAPES[ratio])
    defaults = {"completion_mask": d.mask, "eps_low": 0.1, "eps_high": 0.15, "inplace": False}
    results = function(logits, d.old, d.ref, d.ids, d.advantages, vllm_is_ratio=ratio, reduce=reduce, **defaults | settings)
    if reduce:
        loss, metrics = results
        assert type(metrics) is list
        flat = [loss, *metrics]
    else:
        assert type(results) is tuple
        loss, flat = (results[0] * d.upstream).sum(), list(results)  # each token gets another gradient
    return [x if x is None else x.detach() for x in flat] + [*torch.autograd.grad(loss, logits)]


# Every loss, level, KL term, cap, policy weight and reduction occurs in a row.
CASES = [
    {},
    {"loss_type": "grpo", "beta": 0.0, "reduce": True},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True, "ratio": "(B, L)"},
    {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "delta": 1.3, "beta": 0.3, "reduce": True},
    {"loss_type": "bnpo", "delta": 1.3, "use_bias_correction_kl": True, "ratio": "(B, 1)", "reduce": True},
    {"loss_type": "dr_grpo", "reduce": True},
    {"loss_type": "dr_grpo", "max_completion_length": 9, "ratio": "(B,)", "reduce": True},
    {"num_items_in_batch": torch.tensor(21), "reduce": True},
    {"loss_type": "cispo", "eps_high": 1.05, "ratio": "(B, L)", "reduce": True},
    {"loss_type": "sapo", "ratio": "(B, 1)"},
    {"loss_type": "vespo", "ratio": "(B, 1)", "num_items_in_batch": 21, "reduce": True},
    {"loss_type": "vespo", "ratio": "(B,)", "use_bias_correction_kl": True},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "reduce": True, "padded": False},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(str(value) for value in case.values()) or "defaults")
def test_triton_grpo_loss(case):
    case = dict(case)
    d = make(case.pop("padded", True))
    reduce = case.pop("reduce", False)
    actual, expected = (from_logits(f, d, reduce, **case) for f in (ours.triton_grpo_loss, theirs.triton_grpo_loss))
    assert_equal(actual, expected, case)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
def test_token_formulas_equal_the_reference(loss_type):
    """Losses and gradients per token, in fp64."""
    config = GRPOLossConfig(loss_type=loss_type, beta=0.1, delta=1.3 if loss_type == "grpo" else None)
    row = reference.SURROGATES[config.loss.surrogate]
    rng = torch.Generator().manual_seed(0)
    logps, old, ref, advantages = torch.randn(4, 5, 40, generator=rng, dtype=torch.float64)
    log_weight = torch.randn(5, 1, generator=rng, dtype=torch.float64)
    logps = logps.requires_grad_()
    ratio = (logps - old).exp()
    loss = formulas.surrogate(config, logps, ratio, log_weight, advantages)
    expected = row.term(logps.detach(), ratio.detach(), log_weight, advantages, config.scalars)
    torch.testing.assert_close(loss.detach(), expected.loss)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logps)[0], expected.dlogp)
    torch.testing.assert_close(formulas.kl(ref, logps.detach()), reference.KL["k3"](ref - logps.detach())[0])


def from_hidden(module, d, ref="logps", ratio=None, num_items=None, **settings):
    """Return the loss, metrics and the gradients by hidden states, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in (d.hidden, d.weight, d.bias)]
    if ratio is not None:
        ratio = d.ratios.reshape(-1)[: torch.Size(RATIO_SHAPES[ratio]).numel()].view(RATIO_SHAPES[ratio])
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.15, "temperature": 0.9, "max_completion_length": 9} | settings
    given = {"ref_per_token_logps": d.ref} if ref == "logps" else {}
    if ref == "input":
        given = {"ref_input": d.hidden + 0.1, "ref_weight": d.weight, "ref_bias": d.bias}
    function = module(compiled=False, use_ref_model=ref is not None, **settings)
    hidden, weight, bias = leaves
    loss, metrics = function(
        hidden, weight, d.ids, d.mask, d.advantages, bias=bias, old_per_token_logps=d.old, vllm_is_ratio=ratio,
        num_items_in_batch=num_items, **given,
    )  # fmt: skip
    assert type(metrics) is tuple
    return [loss.detach(), *(x.detach() for x in metrics), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_linear_grpo_loss(loss_type, level):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        pytest.skip("refused by Liger")
    d = make(padded=loss_type != "luspo")
    for case in (
        {"beta": 0.0},
        {"ref": "input", "num_items": 21},
        {"beta": 0.2, "use_bias_correction_kl": True, "ratio": "(B, 1)" if loss_type == "vespo" else "(B, L)"},
        {"beta": 0.2, "delta": 1.1, "ratio": "(B, 1)"},
        {"ref": None, "ratio": "(B,)"},
    ):
        case = {"loss_type": loss_type, "importance_sampling_level": level} | case
        modules = (ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss)
        assert_equal(*(from_hidden(module, d, **case) for module in modules), case)


def formula(d, loss_type, level, delta=None, beta=0.2, weight=None):
    """Return the loss of luspo (arXiv:2602.05261) or grpo in fp64, and its gradient by logits."""
    logits = d.logits.double().requires_grad_()
    logp = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, d.ids.unsqueeze(-1)).squeeze(-1)
    log_ratio, mask = logp - d.old.double(), d.mask.double()
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).unsqueeze(1)
    ratio = log_ratio.exp()
    advantages = d.advantages.double().view(B, -1)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(capped * advantages, ratio.clamp(0.9, 1.15) * advantages)
    kl = (d.ref.double() - logp).exp() - (d.ref.double() - logp) - 1
    loss = ((loss + beta * kl) * mask).sum(1)
    loss = (loss if loss_type == "luspo" else loss / mask.sum(1)).mean()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_ignores_padding(level):
    """Liger sums over padding and divides by the padded length. Without padding both are equal (above)."""
    d = make()
    settings = {"loss_type": "luspo", "importance_sampling_level": level, "beta": 0.2}
    loss, gradient = formula(d, "luspo", level)
    dhidden = gradient[:, :-1] @ d.weight.double()
    mine = from_logits(ours.triton_grpo_loss, d, **settings)
    assert_equal([mine[0], mine[-1]], [loss, gradient], level)
    fused = from_hidden(ours.LigerFusedLinearGRPOLoss, d, **settings)
    assert_equal([fused[0], fused[-3]], [loss, dhidden], level)
    liger = from_logits(theirs.triton_grpo_loss, d, **settings)
    assert (liger[-1] - gradient).abs().max() > 0.05 * gradient.abs().max()
    liger = from_hidden(chunked_loss.LigerFusedLinearGRPOLoss, d, **settings)
    assert (liger[-3] - dhidden).abs().max() > 0.02 * dhidden.abs().max()


def test_gradient_with_a_cap_below_the_clip():
    """With delta < 1 + eps_high and A < 0 the clipped ratio is chosen where it equals the ratio. Liger drops its gradient."""
    d = make(padded=False)
    d.advantages = -d.advantages.abs()
    settings = {"loss_type": "grpo", "delta": 1.01, "beta": 0.2}
    loss, gradient = formula(d, "grpo", "token", delta=1.01)
    mine, liger = (from_logits(f, d, **settings) for f in (ours.triton_grpo_loss, theirs.triton_grpo_loss))
    assert_equal([mine[0], mine[-1]], [loss, gradient], "delta")
    assert (liger[0] - loss).abs() < 1e-6
    assert (liger[-1] - gradient).abs().max() > 0.1 * gradient.abs().max()


def test_advantage_per_token():
    d = make()
    d.advantages = d.ratios - 1
    d.upstream = d.mask / d.mask.sum(1, keepdim=True) / B  # the weights of grpo
    expected = formula(d, "grpo", "token")
    for reduce in (True, False):
        results = from_logits(ours.triton_grpo_loss, d, reduce, loss_type="grpo", beta=0.2)
        loss = results[0] if reduce else (results[0] * d.upstream).sum()
        assert_equal([loss, results[-1]], expected, reduce)
    fused, *_, dhidden, _, _ = from_hidden(ours.LigerFusedLinearGRPOLoss, d, loss_type="grpo", beta=0.2)
    assert_equal([fused, dhidden], [expected[0], expected[1][:, :-1] @ d.weight.double()], "hidden")


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("reduce", [True, False])
def test_masked_positions_are_not_read(loss_type, reduce):
    """Liger's vespo multiplies the weights of padding into the weight of the sequence."""
    d = make()
    settings = {"reduce": reduce, "loss_type": loss_type, "ratio": "(B, L)"}
    clean = from_logits(ours.triton_grpo_loss, d, **settings)
    for name in ("old", "ref", "ratios"):
        getattr(d, name)[d.mask == 0] = torch.nan
    d.logits[:, :-1][d.mask == 0] = torch.nan
    assert_equal(from_logits(ours.triton_grpo_loss, d, **settings), clean, loss_type)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_finite_where_liger_is_not():
    """A ratio of e^100 is clamped to e^20."""
    d = make()
    d.old -= 100
    d.advantages = -d.advantages.abs()
    for reduce in (True, False):
        mine, liger = (from_logits(f, d, reduce) for f in (ours.triton_grpo_loss, theirs.triton_grpo_loss))
        assert all(x.isfinite().all() for x in mine)
        assert not all(x.isfinite().all() for x in liger)


@pytest.mark.parametrize("layout", ["strided", "long"])
def test_layouts_that_liger_does_not_support(layout):
    """Logits that are a view, and more than 65,535 tokens, which exceed the second axis of a CUDA grid."""
    d = make()
    if layout == "strided":
        d.logits = torch.stack([d.logits, d.logits], 1)[:, 0]
        with pytest.raises(AssertionError):
            from_logits(theirs.triton_grpo_loss, d)
        expected = from_logits(ours.triton_grpo_loss, make())
        assert_equal(from_logits(ours.triton_grpo_loss, d), expected, layout)
        with pytest.raises(AssertionError):
            theirs.fused_selective_log_softmax(d.logits, d.ids)
        logps = ours.fused_selective_log_softmax(d.logits, d.ids)
        assert_equal([logps], [theirs.fused_selective_log_softmax(d.logits.contiguous(), d.ids)], layout)
        return
    length = 65_537
    logits, ids = torch.randn(1, length + 1, 3).requires_grad_(), torch.randint(3, (1, length))
    expected = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert_equal([ours.fused_selective_log_softmax(logits, ids)], [expected.detach()], layout)
    loss, _ = ours.triton_grpo_loss(logits, None, None, ids, torch.ones(1), beta=0.0, inplace=False, reduce=True)
    assert loss.item() == pytest.approx(-1)
    dlogits, expected = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(-expected.mean(), logits)[0]
    assert_equal([dlogits], [expected], layout)


def test_selective_log_softmax():
    """The result has the log-probabilities of the last tokens of a longer row."""
    d = make()
    ids, mask = (torch.cat([x, x], 1) for x in (d.ids, d.mask))
    for arguments in ((0.9, None), (0.7, mask)):
        functions = (ours.fused_selective_log_softmax, theirs.fused_selective_log_softmax)
        mine, other = (f(d.logits.requires_grad_(), ids, *arguments) for f in functions)
        assert not mine.requires_grad
        assert_equal([mine], [other], arguments)


def test_inplace_writes_the_gradient_over_the_logits():
    d = make()
    expected = from_logits(ours.triton_grpo_loss, d)[-1]
    logits = d.logits.clone().requires_grad_()
    # inplace is the default
    loss, _ = ours.triton_grpo_loss(logits, d.old, d.ref, d.ids, d.advantages, d.mask, eps_low=0.1, eps_high=0.15, reduce=True)
    loss.backward()
    assert torch.equal(logits.detach(), expected)
    assert torch.equal(logits.grad, expected)


def test_num_items_with_several_processes(monkeypatch):
    """The divisor is the tokens of all processes divided by the number of processes, also without num_items_in_batch."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **op: x.mul_(3))
    modules = (ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss)
    for num_items in (None, 21, torch.tensor(21)):
        assert_equal(*(from_hidden(module, make(), num_items=num_items) for module in modules), num_items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_cross_entropy(dtype):
    d = make(dtype=dtype)
    target = d.ids.flatten().clone()
    target[2] = -100
    chosen = torch.tensor([3, 0, 3])
    for entropy in (False, True):
        for selected in (None, chosen):
            results = []
            for function in (
                ours.LigerFusedLinearScaledCrossEntropyFunction,
                ops.LigerFusedLinearScaledCrossEntropyFunction,
            ):
                hidden, weight = d.hidden.flatten(0, 1).clone().requires_grad_(), d.weight.clone().requires_grad_()
                out = function.apply(hidden, weight, target, 0.7, -100, return_entropy=entropy, selected_token_ids=selected)
                assert isinstance(out, torch.Tensor) == (not entropy and selected is None)
                out = [out] if isinstance(out, torch.Tensor) else list(out)
                rng = torch.Generator().manual_seed(1)
                total = sum((x * torch.randn(x.shape, generator=rng)).sum() for x in out)
                results.append([x.detach() for x in out] + [*torch.autograd.grad(total, (hidden, weight))])
            mine, other = results
            assert all(x.dtype == torch.float32 for x in mine[:-2])
            if dtype == torch.float32:
                assert_equal(mine, other, (entropy, selected))
            else:  # Liger rounds logits and entropy to bf16
                for a, b in zip(mine, other, strict=True):
                    assert (a - b).abs().max() <= 0.03 * b.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of .*, got 'ppo'"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta must be None with loss_type = 'sapo', got 2.0"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling_level must be one of the token"),
        ({"vllm_is_ratio": torch.ones(2, 2)}, r"vllm_is_ratio must be \(B,\), \(B, 1\) or \(B, L\).*, got \(2, 2\)"),
        ({"ref_logp": None}, "ref_logp must be given with beta = 0.04, got None"),
    ],
)
def test_errors(call, message):
    d = make()
    arguments = {"logits": d.logits, "old_logp": d.old, "ref_logp": d.ref, "completion_ids": d.ids, "advantages": d.advantages}
    with pytest.raises(ValueError, match=message):
        ours.triton_grpo_loss(**arguments | call)
    module = ours.LigerFusedLinearGRPOLoss()
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input must be given with use_ref_model, got None"):
        module(d.hidden, d.weight, d.ids, d.mask, d.advantages)


def test_two_references():
    """As in Liger, the log-probabilities are used, with a warning."""
    d = make()
    results = []
    for cls in (ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss):
        function = cls(compiled=False, loss_type="grpo", temperature=0.9)
        both = {"ref_per_token_logps": d.ref, "ref_input": d.hidden + 0.1, "ref_weight": d.weight}
        with pytest.warns(UserWarning, match="ref_per_token_logps"):
            loss, metrics = function(d.hidden, d.weight.clone().requires_grad_(), d.ids, d.mask, d.advantages, d.bias, **both)
        results.append([loss.detach(), *metrics])
    assert_equal(*results, "both references")


@pytest.mark.parametrize(
    ("selected", "error", "message"),
    [
        ([3, V], ValueError, rf"selected_token_ids must be in \[0, {V}\), the rows of weight, got {V} at index \(1,\)"),
        ([-1], ValueError, r"selected_token_ids must be in .*, got -1 at index \(0,\)"),
        ([[1, 2]], ValueError, r"selected_token_ids must be \(K,\), got \(1, 2\)"),
        ([0.5], TypeError, "selected_token_ids must be integers, got float32"),
    ],
)
def test_selected_tokens_are_checked(selected, error, message):
    d = make()
    apply = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    hidden, target = d.hidden.flatten(0, 1), d.ids.flatten()
    with pytest.raises(error, match=message):
        apply(hidden, d.weight, target, selected_token_ids=torch.tensor(selected))
    with pytest.raises(error, match=message):
        apply(hidden, d.weight, target, selected_token_ids=selected)
    for dtype in (torch.int32, torch.int64):
        results = apply(hidden, d.weight, target.to(dtype), selected_token_ids=torch.tensor([3, 0], dtype=dtype))
        assert_equal(results, apply(hidden, d.weight, target, selected_token_ids=[3, 0]), dtype)


def test_masks_that_are_not_masks_and_targets_out_of_range():
    d = make()
    d.mask[0, 1] = 0.5
    message = r"{} must hold only 0 and 1, got 0.5 at index \(0, 1\)"
    with pytest.raises(ValueError, match=message.format("completion_mask")):
        from_logits(ours.triton_grpo_loss, d)
    with pytest.raises(ValueError, match=message.format("attention_mask")):
        from_hidden(ours.LigerFusedLinearGRPOLoss, d)
    apply = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    for token in (V, -100):
        d.ids[1, 1] = token
        with pytest.raises(
            ValueError, match=rf"target must be in \[0, {V}\), .* ignore_index = -1, got {token} at index \(5,\)"
        ):
            apply(d.hidden.flatten(0, 1), d.weight, d.ids.flatten(), ignore_index=-1)


def test_selected_tokens_that_are_not_checked(monkeypatch):
    """On a GPU, where nothing is checked, the results of tokens out of range are NaN, and no memory out of range is read."""
    monkeypatch.setattr(ours, "require_indices", lambda *_: None)
    d = make()
    hidden, target = d.hidden.flatten(0, 1), d.ids.flatten()
    apply = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    _, selected = apply(hidden, d.weight, target, selected_token_ids=torch.tensor([3, V, -1]))
    _, expected = apply(hidden, d.weight, target, selected_token_ids=torch.tensor([3]))
    assert_equal([selected[:, :1]], [expected], "in range")
    assert selected[:, 1:].isnan().all()


def test_patch():
    """Every module that holds Liger's functions gets ours, and Liger's again at the end."""
    holder = types.ModuleType("holder")
    holder.triton_grpo_loss = holder.alias = theirs.triton_grpo_loss
    sys.modules["holder"] = holder
    original = theirs.triton_grpo_loss, chunked_loss.LigerFusedLinearGRPOLoss
    try:
        with ours.patch_liger() as patch:
            assert holder.triton_grpo_loss is holder.alias is theirs.triton_grpo_loss is ours.triton_grpo_loss
            assert theirs.fused_selective_log_softmax is ours.fused_selective_log_softmax
            assert chunked_loss.LigerFusedLinearGRPOLoss is ours.LigerFusedLinearGRPOLoss
            assert chunked_loss.grpo_loss.LigerFusedLinearGRPOLoss is ours.LigerFusedLinearGRPOLoss
            function = ours.LigerFusedLinearScaledCrossEntropyFunction
            assert ops.LigerFusedLinearScaledCrossEntropyFunction is function
            with pytest.raises(RuntimeError, match="patch_liger must be undone before it is called again"):
                ours.patch_liger()
            holder.LigerFusedLinearGRPOLoss = chunked_loss.LigerFusedLinearGRPOLoss  # imported under the patch
        assert (holder.triton_grpo_loss, holder.LigerFusedLinearGRPOLoss) == (holder.alias, original[1]) == original
        assert (theirs.triton_grpo_loss, chunked_loss.grpo_loss.LigerFusedLinearGRPOLoss) == original
        assert ours.triton_grpo_loss.__module__ == ours.__name__
        patch.undo()  # a second undo does nothing
        again = ours.patch_liger()
        patch.undo()  # does not undo the new patch
        assert theirs.triton_grpo_loss is ours.triton_grpo_loss
        again.undo()
        assert theirs.triton_grpo_loss is original[0]
    finally:
        del sys.modules["holder"]


def test_patch_of_another_version(monkeypatch):
    version = importlib.metadata.version("liger-kernel")
    for other in ("0.7.0", "0.9.1", "1.0.8"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, other=other: other)
        with pytest.raises(RuntimeError, match=f"patch_liger needs liger-kernel 0.8.\\*, got {other}"):
            ours.patch_liger()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    original = theirs.triton_grpo_loss
    monkeypatch.setattr(theirs, "triton_grpo_loss", lambda logits: None)
    with pytest.raises(
        RuntimeError, match=r"patch_liger needs liger-kernel .*: liger_kernel.*:triton_grpo_loss has other parameters"
    ):
        ours.patch_liger()
    monkeypatch.setattr(theirs, "triton_grpo_loss", original)
    with ours.patch_liger():  # the failed calls replaced nothing
        pass

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="patch_liger needs liger-kernel, which is not installed"):
        ours.patch_liger()


def test_settings_are_attributes():
    """As in Liger, settings changed between steps take effect."""
    d = make()
    results = []
    for cls in (ours.LigerFusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss):
        function = cls(compiled=False, loss_type="grpo", temperature=0.9)
        function.beta, function.epsilon_low, function.temperature = 0.5, 0.01, 0.8
        loss, metrics = function(d.hidden, d.weight.clone().requires_grad_(), d.ids, d.mask, d.advantages, d.bias, d.ref, d.old)
        results.append([loss.detach(), *metrics])
    assert_equal(*results, "attributes")


def test_parameters_equal_those_of_liger():
    for function in ours._REPLACEMENTS.values():
        assert len(parameters(function)) > 3
    assert parameters(ours.triton_grpo_loss) == parameters(theirs.triton_grpo_loss)
    assert parameters(ours.LigerFusedLinearGRPOLoss) == parameters(chunked_loss.LigerFusedLinearGRPOLoss)
