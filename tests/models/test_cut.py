"""Division of trees into packs within a token budget, compared with all possible divisions."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trees import leaves, parents

from vlmkernels.models.cut import cut_packs, cut_trees
from vlmkernels.ops.tree_attention import TreeLayout


def num_tokens(lengths, packs):
    """The tokens of all packs, repeated ones included."""
    return sum(lengths[segment] for pack in packs for segment in pack.segments)


def fewest_tokens(lengths, parents, max_tokens):
    """The smallest number of tokens of all packs, from all divisions of the leaves."""
    layout = TreeLayout(lengths, parents)
    paths = [layout.path(leaf) for leaf in leaves(parents)]
    sizes = [
        sum(lengths[s] for s in {s for k, path in enumerate(paths) if chosen >> k & 1 for s in path})
        for chosen in range(1 << len(paths))
    ]

    @cache
    def fewest(left):
        if not left:
            return 0
        first = left & -left
        rest, others, best = left ^ first, left ^ first, None
        while True:  # all subsets of rest
            pack = first | others
            if sizes[pack] <= max_tokens:
                total = sizes[pack] + fewest(left ^ pack)
                best = total if best is None else min(best, total)
            if not others:
                return best
            others = (others - 1) & rest

    return fewest((1 << len(paths)) - 1)


@given(st.data(), parents(max_segments=14), st.integers(0, 200))
def test_packs_own_every_segment_once_within_the_budget(data, parents, slack):
    lengths = data.draw(st.lists(st.integers(0, 50), min_size=len(parents), max_size=len(parents)))
    layout = TreeLayout(lengths, parents)
    packs = cut_trees(lengths, parents, layout.longest_path + slack, hidden_size=64)
    assert sorted(segment for pack in packs for segment in pack.owned) == list(range(len(parents)))
    assert packs == sorted(packs, key=lambda pack: pack.segments)
    for pack in packs:
        own = TreeLayout([lengths[segment] for segment in pack.segments], pack.parents)  # in depth-first order, or it raises
        assert own.num_tokens <= layout.longest_path + slack
        assert set(pack.owned) <= set(pack.segments)
        assert [tuple(pack.segments[s] for s in own.path(k)) for k in range(len(pack.segments))] == [
            layout.path(segment) for segment in pack.segments
        ]
    assert (len(packs) == 1) == (layout.num_tokens <= layout.longest_path + slack)


def random_tree(rng):
    """The lengths and parents of at most 15 segments and nine leaves, and a budget."""
    count, parents, longest = rng.randint(5, 15), [-1], rng.choice([5, 20, 100])
    while len(parents) < count:
        path = [len(parents) - 1]
        while path[-1] >= 0:
            path.append(parents[path[-1]])
        if rng.random() < 0.8:
            path.pop()
        parents.append(rng.choice(path))
    if len(leaves(parents)) > 9:
        return random_tree(rng)
    lengths = [rng.randint(1, longest) for _ in parents]
    return lengths, parents, int(TreeLayout(lengths, parents).longest_path * (1 + 2 * rng.random()))


def test_few_tokens_are_repeated():
    """In most trees as few as possible. These are 1,000 of the trees that the docstring of ``cut_trees`` reports about."""
    rng, best, cut, worst = random.Random(0), 0, 0, 0.0
    while cut < 1000:
        lengths, parents, max_tokens = random_tree(rng)
        if sum(lengths) <= max_tokens:
            continue
        cut += 1
        tokens = num_tokens(lengths, cut_trees(lengths, parents, max_tokens, hidden_size=64))
        fewest = fewest_tokens(lengths, parents, max_tokens)
        assert tokens >= fewest
        best += tokens == fewest
        worst = max(worst, tokens / fewest)
    assert best >= 985
    assert worst < 1.25


def test_a_subtree_that_fits_is_not_divided():
    """Two turns that fork: each fork goes into one pack with its history, although all leaves have the same size."""
    parents = [-1, 0, 1, 1, 1, 0, 5, 5, 5]
    lengths = [10, 30, 5, 5, 5, 30, 5, 5, 5]
    packs = cut_trees(lengths, parents, 60, hidden_size=64)
    assert [pack.segments for pack in packs] == [(0, 1, 2, 3, 4), (0, 5, 6, 7, 8)]
    assert [pack.owned for pack in packs] == [(0, 1, 2, 3, 4), (5, 6, 7, 8)]
    assert [pack.parents for pack in packs] == [(-1, 0, 1, 1, 1)] * 2


def test_error_of_a_small_budget_names_the_longest_path():
    rule = "max_tokens_per_microbatch must be at least 26, the tokens of the path of segments 0, 2, 3, got 25"
    with pytest.raises(ValueError, match=rule):
        cut_trees([10, 5, 9, 7, 3], [-1, 0, 0, 2, -1], 25, hidden_size=64)


def test_parents_must_be_those_of_trees():
    with pytest.raises(ValueError, match="parents must be -1 or an earlier segment, got 1 for segment 0"):
        cut_trees([1, 1], [1, -1], 2, hidden_size=64)


@given(
    prefixes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    sizes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=6, max_size=6),
    slack=st.integers(0, 200),
)
def test_packs_contain_every_completion_once_within_the_budget(prefixes, sizes, slack):
    sizes = sizes[: len(prefixes)]
    group = [g for g, own in enumerate(sizes) for _ in own]
    lengths = [length for own in sizes for length in own]
    budget = max(p + max(own) for p, own in zip(prefixes, sizes, strict=True)) + slack
    packs = cut_packs(prefixes, group, lengths, budget, hidden_size=64)
    assert sorted(k for pack in packs for k in pack) == list(range(len(group)))
    assert all(pack == sorted(pack) for pack in packs)
    tokens = [sum(prefixes[g] for g in {group[k] for k in pack}) + sum(lengths[k] for k in pack) for pack in packs]
    assert max(tokens) <= budget
    whole = sum(prefixes) + sum(lengths)
    assert (len(packs) == 1) == (whole <= budget)
    for g, own in enumerate(sizes):
        times = sum(g in {group[k] for k in pack} for pack in packs)
        if prefixes[g] + sum(own) <= budget:
            assert times == 1
        else:  # first-fit decreasing leaves no two parts that would fit in one
            assert times <= 2 * sum(own) // (budget - prefixes[g]) + 1


def test_packs_are_balanced_by_cost():
    """Of eight short and two long groups, the long ones are in different packs."""
    prefixes, group, lengths = [100] * 8 + [900] * 2, [*range(10)], [10] * 10
    packs = cut_packs(prefixes, group, lengths, 2000, hidden_size=64)
    assert len(packs) == 2
    assert all(len({8, 9} & set(pack)) == 1 for pack in packs)


def test_error_of_a_small_budget_names_the_prompt_and_completion():
    rule = "max_tokens_per_microbatch must be at least 47, a prompt of 40 tokens and a completion of 7, got 46"
    with pytest.raises(ValueError, match=rule):
        cut_packs([40, 3], [0, 0, 1], [2, 7, 40], 46, hidden_size=64)
