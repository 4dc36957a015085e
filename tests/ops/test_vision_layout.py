"""vision_layout against the functions of transformers that a vision tower calls, on random grids."""

import pytest
import torch

vision_utils = pytest.importorskip("transformers.vision_utils")
pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from vlmkernels import pack_patches, vision_layout  # noqa: E402

SIDE = st.integers(1, 11)
GRIDS = st.lists(st.tuples(st.integers(1, 3), SIDE, SIDE), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(grids=GRIDS, merge_size=st.sampled_from([1, 2, 3]), window=st.integers(1, 5))
def test_equals_transformers(grids, merge_size, window):
    grid = torch.tensor(grids) * torch.tensor([1, merge_size, merge_size])
    sizes = {"window_size": window * merge_size * 14, "patch_size": 14}
    actual = vision_layout(grid, merge_size=merge_size, **sizes)
    assert torch.equal(actual.cu_seqlens, vision_utils.get_vision_cu_seqlens(grid))
    assert actual.max_seqlen == int(actual.cu_seqlens.diff().max())
    assert torch.equal(actual.position_ids, vision_utils.get_vision_position_ids(grid, merge_size))
    index, bounds = vision_utils.get_vision_window_index(grid, merge_size, **sizes)
    assert torch.equal(actual.window_index, index)
    assert torch.equal(actual.cu_window_seqlens, bounds)
    assert actual.max_window_seqlen == int(bounds.diff().max())
    assert torch.equal(actual.window_inverse, index.argsort())


def test_bounds_are_those_of_pack_patches():
    images = [torch.zeros(3, 28, 56, dtype=torch.uint8), torch.zeros(5, 3, 28, 28, dtype=torch.uint8)]
    packed = pack_patches(images, patch_size=14, mean=None, std=None)
    assert torch.equal(vision_layout(packed.image_grid_thw).cu_seqlens, packed.cu_seqlens)


def test_is_computed_once_per_set_of_grids():
    grid = torch.tensor([[1, 4, 6], [2, 2, 2]])
    first = vision_layout(grid)
    assert first.position_ids is vision_layout(grid.clone()).position_ids
    assert first.window_index is None
    assert first.position_ids is not vision_layout(grid, merge_size=1).position_ids


@pytest.mark.gpu
def test_on_a_gpu():
    grid = torch.tensor([[1, 4, 6], [2, 8, 2]])
    sizes = {"window_size": 56, "patch_size": 14}
    for a, b in zip(vision_layout(grid, **sizes, device="cuda"), vision_layout(grid, **sizes), strict=True):
        assert torch.equal(a.cpu(), b) if isinstance(b, torch.Tensor) else a == b


def error_cases():
    grid = torch.tensor([[1, 2, 4], [1, 3, 4]])
    rule = r"image_grid_thw\[1\] must be > 0, its rows and columns multiples of 2, got \(1, 3, 4\)"
    yield "merge_size", (grid,), {}, ValueError, rule
    yield "zero", (grid * torch.tensor([0, 2, 2]),), {}, ValueError, r"image_grid_thw\[0\] must be > 0, .* got \(0, 4, 8\)"
    yield "no image", (grid[:0],), {}, ValueError, r"image_grid_thw must be \(n, 3\) with n >= 1, got \(0, 3\)"
    yield "shape", (grid[0, :2],), {}, ValueError, r"image_grid_thw must be \(n, 3\) with n >= 1, got \(2,\)"
    yield "dtype", (grid.float(),), {}, TypeError, "image_grid_thw must be integers, got float32"
    yield "device", (grid.to("meta"),), {}, ValueError, "image_grid_thw must be on the CPU, as a processor returns it, got meta"
    window = {"window_size": 112}
    yield "window", (grid[:1],), window, ValueError, "window_size and patch_size must both be given .*, got 112 and None"
    small = {"window_size": 14, "patch_size": 14}
    yield "small window", (grid[:1],), small, ValueError, r"window_size must be at least patch_size \* merge_size = 28, got 14"


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        vision_layout(*args, **options)
