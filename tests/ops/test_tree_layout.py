"""``TreeLayout``: its mask and everything that is derived from lengths and parents, from the definitions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.layouts import layouts

from vlmkernels.ops.tree_attention import TreeLayout


def mask_by_definition(layout, window):
    """(N, N) bool, one pair of tokens after another."""
    segment = [s for s, length in enumerate(layout.lengths) for _ in range(length)]
    paths = [layout.path(s) for s in range(len(layout.lengths))]
    before = [sum(layout.lengths[a] for a in path[:-1]) for path in paths]
    position = [before[s] + k for s, length in enumerate(layout.lengths) for k in range(length)]
    span = {token: first for first, last in layout.bidirectional for token in range(first, last)}
    if layout.linked:
        span = {token: segment[token] for token in span}
    num = layout.num_tokens
    mask = torch.zeros(num, num, dtype=torch.bool)
    for i in range(num):
        for j in range(num):
            is_before = segment[j] in paths[segment[i]] and position[j] <= position[i]
            is_seen = is_before or (i in span and span.get(j) == span[i])
            mask[i, j] = is_seen and (window is None or position[i] - position[j] < window)
    return mask


@settings(max_examples=60, deadline=None)
@given(layouts(st.integers(0, 6), spans=True), st.none() | st.integers(1, 12))
def test_mask_and_number_of_pairs(layout, window):
    mask = mask_by_definition(layout, window)
    assert torch.equal(layout.mask(window), mask)
    assert layout.num_pairs(window) == int(mask.sum())
    if not layout.bidirectional:
        assert layout.causal() is layout
    assert torch.equal(layout.causal().mask(window), mask.tril())


@settings(max_examples=400, deadline=None)
@example(TreeLayout((3, 2, 0, 1), (-1, 0, 0, 2)))  # an only child whose empty parent has a sibling
@given(layouts(st.integers(0, 2), spans=True))
def test_condensed_layout(layout):
    """It has the same mask, and neither empty segments nor only children."""
    condensed = layout.condensed
    for window in (None, 3):
        assert torch.equal(condensed.mask(window), layout.mask(window))
    if not layout.linked:
        assert all(condensed.lengths)
        assert 1 not in [condensed.parents.count(segment) for segment in range(len(condensed.parents))]
    else:
        assert condensed is layout


def test_a_chain_is_one_segment():
    layout = TreeLayout((2, 0, 3, 1, 4), (-1, 0, 1, 2, 3))
    assert layout.condensed == TreeLayout((10,), (-1,))


@given(layouts())
def test_properties_of_a_layout(layout):
    """What is derived from lengths and parents, from the definition of each."""
    segments = range(len(layout.lengths))
    paths = [layout.path(s) for s in segments]
    assert all(path[-1] == s and layout.parents[path[0]] == -1 for s, path in zip(segments, paths, strict=True))
    assert all(layout.parents[b] == a for path in paths for a, b in pairwise(path))
    assert layout.depths == tuple(len(path) - 1 for path in paths)
    assert layout.offsets == tuple(sum(layout.lengths[a] for a in path[:-1]) for path in paths)
    assert layout.longest_path == max((sum(layout.lengths[a] for a in path) for path in paths), default=0)
    descendants = [[s for s in segments if a in paths[s]] for a in segments]
    assert layout.ends == tuple(layout.starts[d[-1]] + layout.lengths[d[-1]] for d in descendants)
    leaves = [s for s in segments if s not in layout.parents]
    assert layout.num_paths == tuple(sum(leaf in d for leaf in leaves) for d in descendants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 2), (-1,)), "parents must be one per segment, 2, got 1"),
        (((3, -1), (-1, 0)), "lengths must be >= 0, got -1 for segment 1"),
        (((3, 2), (1, -1)), "parents must be -1 or an earlier segment, got 1 for segment 0"),
        (((3, 2), (-1, 1)), "parents must be -1 or an earlier segment, got 1 for segment 1"),
        (((3, 2), (-1, -2)), "parents must be -1 or an earlier segment, got -2 for segment 1"),
        (((2.7,), (-1,)), "cannot be interpreted as an integer"),
        (((1, 1, 1, 1), (-1, 0, 0, 1)), "parents must be in depth-first order, .* got 1 for segment 3, after"),
        (((1, 1, 1), (-1, -1, 0)), "parents must be in depth-first order, .* got 0 for segment 2"),
        (((3, 2), (-1, 0), ((1, 4),)), r"bidirectional must have spans within one segment each, got \(1, 4\), which is cut"),
        (((3, 2), (-1, 0), ((4, 6),)), r"bidirectional must have spans within one segment each, got \(4, 6\), which is cut"),
        (((3, 2), (-1, 0), ((1, 3), (2, 3))), r"bidirectional must be \(start, stop\) of disjoint spans in ascending order"),
        (((3, 2), (-1, 0), ((2, 2),)), r"bidirectional must be \(start, stop\) of disjoint spans in ascending order"),
    ],
)
def test_bad_layout(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TreeLayout(*arguments)
