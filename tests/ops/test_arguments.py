"""The forms in which callers have masks, targets, rewards and bounds give the results of the documented dtypes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkernels import gather_logps, group_advantages, grpo_loss, linear_grpo_loss, linear_logps, pack_patches
from vlmkernels.ops.arguments import as_mask, is_readable
from vlmkernels.ops.grpo_loss.config import PRESETS, GRPOLossConfig
from vlmkernels.ops.merge_image_features import merge_image_features, placeholder_positions
from vlmkernels.ops.mrope_positions import mrope_positions
from vlmkernels.ops.varlen_attention import varlen_attention
from vlmkernels.ops.vision_layout import vision_layout

REAL = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGETS = torch.tensor([[3, 1, 4], [1, 5, 6]])
MASK = torch.tensor([[True, False, True], [False, True, True]])


def head(device):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=rng).to(device).requires_grad_() for shape in ((2, 3, 8), (7, 8))]


def logits_call(device, targets, **options):
    hidden, weight = head(device)
    logps = gather_logps(hidden @ weight.T, targets, **options)
    return logps, torch.autograd.grad(logps.sum(), (hidden, weight))


def hidden_call(device, targets, **options):
    hidden, weight = head(device)
    logps = linear_logps(hidden, weight, targets, **options)
    return logps, torch.autograd.grad(logps.sum(), (hidden, weight))


def loss_call(device, targets, mask=None, config="grpo", **options):
    hidden, weight = head(device)
    options |= {"ref_logps": torch.full((2, 3), -2.0, device=device)} if config == "grpo" else {}
    loss = linear_grpo_loss(hidden, weight, targets, [1.0, -0.5], loss_mask=mask, config=config, **options).loss
    return loss, torch.autograd.grad(loss, (hidden, weight))


CALLS = {"gather_logps": logits_call, "linear_logps": hidden_call, "one sweep": loss_call}
CALLS["composed"] = lambda device, targets, mask=None: loss_call(device, targets, mask, config="gspo")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_masks_of_0_and_1(call, dtype, device):
    targets, mask = TARGETS.to(device), MASK.to(device)
    expected = CALLS[call](device, targets, mask=mask)
    torch.testing.assert_close(CALLS[call](device, targets, mask=mask.to(dtype)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", [torch.Tensor.int, torch.Tensor.short, torch.Tensor.tolist, torch.Tensor.numpy])
def test_integer_targets_and_lists(call, form, device):
    expected = CALLS[call](device, TARGETS.to(device), mask=MASK.to(device))
    actual = form(TARGETS), form(MASK.long())
    if isinstance(actual[0], torch.Tensor):
        actual = [x.to(device) for x in actual]
    torch.testing.assert_close(CALLS[call](device, actual[0], mask=actual[1]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_ignored_targets_are_masked(call, device):
    targets, mask = TARGETS.to(device), MASK.to(device)
    ignored = targets.masked_fill(~mask, -100)
    expected = CALLS[call](device, targets, mask=mask)
    torch.testing.assert_close(CALLS[call](device, ignored), expected)
    torch.testing.assert_close(CALLS[call](device, ignored, mask=torch.ones_like(mask)), expected)


@pytest.mark.parametrize("call", [gather_logps, linear_logps])
def test_ignored_targets_in_compiled_graphs(call, device):
    """Compiled code cannot read the targets, and on a GPU neither does eager code."""
    hidden, weight = (x.detach() for x in head(device))
    inputs = (hidden @ weight.T,) if call is gather_logps else (hidden, weight)
    targets = TARGETS.to(device).masked_fill(~MASK.to(device), -100)
    expected = call(*inputs, targets)
    assert expected[0, 1] == 0
    assert expected[0, 0] < 0

    def function(targets):
        return call(*inputs, targets)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(targets), expected)


@pytest.mark.parametrize("ignored", [-1, -101, 7])
def test_only_minus_100_is_ignored(ignored):
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 7\), .* got {ignored} at index \(0, 1\)"):
        logits_call("cpu", TARGETS.where(MASK, ignored))


def test_masks_of_other_values_are_refused():
    for mask in (MASK * 2.0, MASK.float() - 1, MASK * 0.5, MASK / torch.zeros(1)):
        with pytest.raises(ValueError, match="mask must hold only 0 and 1, got"):
            as_mask("mask", mask)
    with pytest.raises(TypeError, match="mask must be a tensor, an array or a list of numbers, got str"):
        as_mask("mask", "101")
    with pytest.raises(TypeError, match="mask must be real, got complex64"):
        as_mask("mask", MASK + 0j)


@pytest.mark.parametrize("dtype", ["reversed", ">i8", object])
def test_arrays_that_torch_cannot_share(dtype):
    arrays = TARGETS.numpy(), MASK.long().numpy()
    targets, mask = (x[::-1].copy()[::-1] if dtype == "reversed" else x.astype(dtype) for x in arrays)
    expected = logits_call("cpu", TARGETS, mask=MASK)
    torch.testing.assert_close(logits_call("cpu", targets, mask=mask), expected, rtol=0, atol=0)


def test_complex_numbers_are_refused():
    """Their imaginary part would be lost."""
    number = torch.tensor([1j, 2])
    with pytest.raises(TypeError, match="advantages must be real, got complex64"):
        grpo_loss(torch.zeros(2, 3), number)
    with pytest.raises(TypeError, match="weights must be real, got complex64"):
        group_advantages(torch.ones(2, 2), 2, weights=number)


def test_not_finite_values_at_ignored_targets(device):
    """They reach neither results nor gradients, as with a mask."""
    if device != "cpu":
        pytest.skip("on a GPU the ignored targets of linear_logps are computed")
    hidden, weight = head(device)
    hidden = hidden.detach().masked_fill(~MASK[..., None], torch.nan).requires_grad_()
    logits = (hidden @ weight.T).detach().requires_grad_()
    ignored = TARGETS.masked_fill(~MASK, -100)
    (gradient,) = torch.autograd.grad(gather_logps(logits, ignored).sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[~MASK].any()
    for function in (linear_logps, lambda *inputs: linear_grpo_loss(*inputs, [1.0, -0.5]).loss):
        gradients = torch.autograd.grad(function(hidden, weight, ignored).sum(), (hidden, weight))
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[0][~MASK].any()


def test_what_can_be_read():
    assert is_readable(torch.zeros(2))
    assert not is_readable(torch.zeros(2, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert not is_readable(torch.zeros(2))


@pytest.mark.parametrize(
    "rewards",
    [
        *([1, 0, None, 2], [True, 0, None, 2.0], [[1], [0], [None], [2]], (1, 0, np.nan, 2)),
        *(np.array([1.0, 0.0, np.nan, 2.0]), np.array([1, 0, None, 2]), np.array([2.0, np.nan, 0.0, 1.0])[::-1]),
    ],
    ids=str,
)
def test_rewards_of_lists_and_integers(rewards):
    expected = group_advantages(torch.tensor([1.0, 0.0, torch.nan, 2.0]), 4)
    torch.testing.assert_close(group_advantages(rewards, 4), expected, equal_nan=True)


def test_integer_rewards_and_listed_weights(device):
    rewards = torch.tensor([[1, 0], [0, 1], [1, 1], [3, 2]], device=device)
    expected = group_advantages(rewards.float(), 2, weights=torch.tensor([1.0, 0.5], device=device))
    torch.testing.assert_close(group_advantages(rewards, 2, weights=[1, 0.5]), expected)
    torch.testing.assert_close(group_advantages(rewards.bool(), 2), group_advantages(rewards.bool().float(), 2))


def test_bounds_of_any_integers(device):
    logps = torch.linspace(-3, -1, 6, device=device)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    expected = grpo_loss(logps, torch.ones(2, device=device), cu_seqlens=bounds).loss
    query = torch.linspace(-1, 1, 6 * 8, device=device).view(6, 1, 8)
    attention = varlen_attention(query, query, query, bounds, backend="sdpa")
    for form in (bounds.long(), bounds.short(), [0, 2, 6]):
        assert grpo_loss(logps, [1, 1], cu_seqlens=form).loss == expected
        assert varlen_attention(query, query, query, form, backend="sdpa").equal(attention)


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_by_name(name):
    changes = {"max_completion_length": 3} if name == "dr_grpo" else {}
    config = GRPOLossConfig.preset(name, **changes)
    logps = torch.tensor([[-1.0, -2.0, -3.0]])
    options = {"ref_logps": logps - 0.1} if config.beta else {}
    options |= {"entropy": -logps} if config.top_entropy_quantile < 1 else {}
    options |= {"masked_logps": logps - 0.1} if config.perception else {}
    if changes:
        with pytest.raises(ValueError, match="max_completion_length must be given with loss_type = 'dr_grpo', got None"):
            grpo_loss(logps, [1.0], config=name)
    else:
        assert grpo_loss(logps, [1.0], config=name, **options).loss == grpo_loss(logps, [1.0], config=config, **options).loss


def test_configuration_by_name_in_a_compiled_graph():
    logps, advantages = torch.tensor([[-1.0, -2.0, -3.0]]), torch.ones(1)

    def function(logps):
        return grpo_loss(logps, advantages, config="gspo").loss

    assert torch.compile(function, fullgraph=True, backend="aot_eager")(logps) == function(logps)


def test_one_image():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    sizes = {"patch_size": 14, "mean": [0.5] * 3, "std": [0.5] * 3}
    expected = pack_patches([pixels], **sizes)
    for image in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels)):
        torch.testing.assert_close(pack_patches(image, **sizes), expected)


def test_grids_and_positions_of_any_integers():
    grid = torch.tensor([[1, 4, 6]])
    expected = vision_layout(grid)
    types = torch.tensor([[0, *[1] * 6, 0]])
    positions = mrope_positions(types, grid, attention_mask=torch.ones(1, 8).bool())
    for form in (grid.int(), grid.tolist(), grid[0], grid.numpy()):
        assert vision_layout(form) is expected  # results are cached by value
        actual = mrope_positions(types, form, attention_mask=torch.ones(1, 8))
        torch.testing.assert_close(actual, positions)
    torch.testing.assert_close(mrope_positions(types.tolist(), grid.tolist()), positions)
    text = torch.zeros(1, 3, dtype=torch.int64)
    torch.testing.assert_close(mrope_positions(text, []), mrope_positions(text))
    embeddings, features = torch.zeros(4, 2), torch.ones(2, 2)
    assert merge_image_features(embeddings, features, torch.tensor([1, 3], dtype=torch.int32))[:, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.int])
def test_placeholders_of_any_integers(form):
    ids, counts = torch.tensor([[1, 5, 5], [6, 1, 1]]), torch.tensor([2, 1])
    assert placeholder_positions(form(ids), (5, 6), form(counts)).tolist() == [1, 2, 3]
    assert placeholder_positions(form(ids.flatten()), (5, 6), form(counts), form(torch.tensor([0, 3, 6]))).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"num_features must hold one number per sample, 2, got 1"):
        placeholder_positions(form(ids), 5, form(counts[:1]))


def test_shapes_of_indices_are_named():
    with pytest.raises(ValueError, match=r"positions must be \(M,\), got \(1, 1\)"):
        merge_image_features(torch.zeros(3, 2), torch.ones(1, 2), [[1]])
    with pytest.raises(ValueError, match=r"second_per_grid_ts must be one number per video, \(1,\), got \(\)"):
        mrope_positions([[2, 2, 0]], None, [2, 2, 2], tokens_per_second=2, second_per_grid_ts=1.0)


def test_sizes_of_numpy():
    pixels = np.zeros((28, 28, 3), dtype=np.uint8)
    expected = pack_patches(pixels, patch_size=14, mean=None, std=None)
    torch.testing.assert_close(pack_patches(pixels, patch_size=np.int64(14), mean=None, std=None), expected)
    with pytest.raises(ValueError, match="patch_size must be an integer > 0, got True"):
        pack_patches(pixels, patch_size=True, mean=None, std=None)
