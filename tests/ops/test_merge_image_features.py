"""merge_image_features against masked_scatter."""

import pytest
import torch

from vlmkernels import merge_image_features, placeholder_positions

pytestmark = pytest.mark.device

torch.set_num_threads(1)

IMAGE, VIDEO = 7, 8


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 10, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 11), (40,), (1, 1)], ids=["padded", "packed", "one token"])
def test_equals_masked_scatter(device, shape, dtype):
    ids = tokens(*shape)
    mask = ids == IMAGE
    num_features = mask.sum(-1) if mask.dim() == 2 else [mask.sum()]
    embeddings, features = (
        draw(*shape, 16, dtype=dtype).to(device),
        draw(int(mask.sum()), 16, seed=1).to(device),
    )  # features fp32
    positions = placeholder_positions(ids, IMAGE, num_features)
    merged = merge_image_features(embeddings, features, positions)
    expected = embeddings.masked_scatter(mask.unsqueeze(-1).to(device), features.to(dtype))
    assert torch.equal(merged, expected)
    upstream = draw(*shape, 16, dtype=dtype, seed=2).to(device).detach()
    gradients = [torch.autograd.grad(result, (embeddings, features), upstream) for result in (merged, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_samples_without_images_several_tokens_and_packs():
    ids = torch.tensor([[1, 2, 3, 4], [IMAGE, VIDEO, 1, IMAGE]])
    assert placeholder_positions(ids, IMAGE, [0, 2]).tolist() == [4, 7]
    assert placeholder_positions(ids, (IMAGE, VIDEO), torch.tensor([0, 3])).tolist() == [4, 5, 7]
    cu_seqlens = torch.tensor([0, 0, 5, 8], dtype=torch.int32)
    assert placeholder_positions(ids.flatten(), IMAGE, [0, 1, 1], cu_seqlens).tolist() == [4, 7]
    embeddings = draw(2, 4, 3)
    nothing = merge_image_features(embeddings, draw(0, 3), placeholder_positions(ids, 9, [0, 0]))
    assert torch.equal(nothing, embeddings)


def test_arguments_are_not_written_to_and_may_be_strided():
    ids = tokens(4, 6)
    wide, features = draw(4, 6, 20).detach(), draw(5, 40, seed=1)[:, ::2].detach()
    embeddings, before = wide[..., ::2], wide.clone()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask.view(-1)[::5] = True
    ids = torch.where(mask, IMAGE, 0)
    merged = merge_image_features(embeddings, features[:, :10], placeholder_positions(ids, IMAGE, mask.sum(1)))
    assert torch.equal(merged, embeddings.masked_scatter(mask.unsqueeze(-1), features[:, :10].contiguous()))
    assert torch.equal(wide, before)


def test_compiles():
    ids = tokens(2, 9)
    positions = placeholder_positions(ids, IMAGE, (ids == IMAGE).sum(1))
    embeddings, features = draw(2, 9, 4), draw(len(positions), 4, seed=1)
    compiled = torch.compile(merge_image_features, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(embeddings, features, positions), merge_image_features(embeddings, features, positions))


@pytest.mark.parametrize(
    ("num_features", "message"),
    [
        (
            [1, 3],
            "input_ids must have one placeholder token per feature, 3 in sample 1, got 2: the prompt was truncated, or an im",
        ),
        (
            [1, 1],
            "input_ids must have one placeholder token per feature, 1 in sample 1, got 2: placeholder tokens were sampled",
        ),
        ([2, 1], "input_ids must have one placeholder token per feature, 2 in sample 0, got 1"),  # the sum is right
        ([3], "num_features must hold one number per sample, 2, got 1"),
    ],
)
def test_a_mismatch_names_the_sample_both_counts_and_the_cause(num_features, message):
    ids = torch.tensor([[1, IMAGE, 3, 4], [IMAGE, 0, 1, IMAGE]])
    with pytest.raises(ValueError, match=message):
        placeholder_positions(ids, IMAGE, num_features)


def test_other_errors_are_named():
    positions = torch.tensor([0, 2])
    with pytest.raises(
        ValueError, match=r"features must be \(2, 4\), a row of the embeddings' width per position, got \(3, 4\)"
    ):
        merge_image_features(draw(5, 4), draw(3, 4), positions)
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        merge_image_features(draw(5, 4), draw(2, 4), positions.float())
    with pytest.raises(ValueError, match=r"input_ids must be \(B, S\) or packed \(N,\), got \(1, 2, 3\)"):
        placeholder_positions(torch.zeros(1, 2, 3).long(), IMAGE, [0])
    with pytest.raises(ValueError, match=r"input_ids must be on the CPU \(reading them must not wait for a device\), got meta"):
        placeholder_positions(torch.zeros(2, 3, dtype=torch.int64, device="meta"), IMAGE, [0, 0])
