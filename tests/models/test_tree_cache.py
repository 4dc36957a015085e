"""The memory of ``TreeCache``; tests/rollout compares what models compute with it, with ``generate``."""

import pytest
import torch

from vlmkernels.models.tree_cache import TreeCache

HEADS, WIDTH = 2, 9


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def filled(lengths, slots=4, rng=None, **options):
    """A cache with prompts 0, 1, ... of these lengths, in one layer, and their keys and values."""
    rng, cache = rng or torch.Generator().manual_seed(0), TreeCache(slots, "cpu", **options)
    prompts = {}
    for prompt, length in enumerate(lengths):
        prompts[prompt] = randn(rng, 2, HEADS, length, WIDTH)
        cache.begin([prompt], [length])
        cache.fill(0, *prompts[prompt].unsqueeze(1))
    return cache, prompts


def attention(query, keys, values):
    """query: (Hq, D); keys, values: (Hkv, L, D)."""
    keys, values = (x.repeat_interleave(2, 0) for x in (keys, values))
    scores = (keys @ query.unsqueeze(2)).squeeze(2) * WIDTH**-0.5
    return (scores.softmax(1).unsqueeze(1) @ values).squeeze(1)


@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 1, 1], [0, 1, 1], [1, None, 0]], ids=str)
def test_steps_equal_attention_over_the_path_of_each_slot(owners):
    """Over prompts of different lengths, for more steps than the first buffers hold, while slots begin and end."""
    rng = torch.Generator().manual_seed(0)
    cache, prompts = filled([5, 70], len(owners), rng)
    own = [torch.empty(2, HEADS, 0, WIDTH, dtype=torch.float64) for _ in owners]
    cache.arrange(owners, [0] * len(owners))
    for step in range(70):
        if step % 7 == 3:  # the last slot begins again
            own[-1] = own[-1][:, :, :0]
            cache.arrange(owners, [x.shape[2] for x in own], steps=7)
        query = randn(rng, 2 * HEADS, len(owners), WIDTH)
        new = randn(rng, 2, HEADS, len(owners), WIDTH)
        if step < 3:
            cache.arrange(owners, [x.shape[2] for x in own])
        out = cache.attend(0, query.unsqueeze(0), *new.unsqueeze(1), None)
        cache.advance(torch.tensor([owner is not None for owner in owners]))
        for slot, owner in enumerate(owners):
            if owner is not None:
                own[slot] = torch.cat([own[slot], new[:, :, slot : slot + 1]], 2)
                expected = attention(query[:, slot], *torch.cat([prompts[owner], own[slot]], 2))
                torch.testing.assert_close(out[0, slot], expected)
    assert cache.capacity == 128


def test_memory_of_prompts_is_used_again():
    """A prompt that takes the row of another replaces no buffer; a longer one does."""
    rng = torch.Generator().manual_seed(0)
    cache, _ = filled([60, 60], rng=rng)
    cache.arrange([0, 1], [0, 0])
    version, address = cache.version, cache._prefix[0][0].data_ptr()
    cache.keep({1})
    new = randn(rng, 2, HEADS, 3, WIDTH)
    cache.begin([7], [3])
    cache.fill(0, *new.unsqueeze(1))
    cache.arrange([7, 1], [0, 4], steps=20)
    assert (cache.version, cache._prefix[0][0].data_ptr()) == (version, address)
    query, token = randn(rng, 2 * HEADS, 2, WIDTH), randn(rng, 2, HEADS, 2, WIDTH)
    out = cache.attend(0, query.unsqueeze(0), *token.unsqueeze(1), None)
    torch.testing.assert_close(out[0, 0], attention(query[:, 0], *torch.cat([new, token[:, :, :1]], 2)))
    cache.begin([8], [65])
    assert cache.version > version


def test_states_of_prompts_and_slots():
    cache = TreeCache(3, "cpu")
    cache.begin([4, 5], [2, 2])
    states = torch.arange(6.0).view(2, 3)
    cache.fill_states(1, "conv", states)
    cache.arrange([5, 4], [0, 0])
    assert torch.equal(cache.states(1, "conv"), states.flip(0))
    cache.set_states(1, "conv", states + 10)
    cache.arrange([5, 4, 4], [1, 1, 0])
    assert torch.equal(cache.states(1, "conv"), torch.cat([states + 10, states[:1]]))
    stored = cache.take_out(0, 1)
    cache.move([2], [0])
    assert torch.equal(cache.states(1, "conv")[0], states[0])
    cache.put_back(2, 5, stored)
    assert torch.equal(cache.states(1, "conv")[2], states[0] + 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.arrange([0] * 5, [0] * 5), "prompts must be those of at most 4 slots, got 5"),
        (lambda cache: cache.arrange([3], [0]), r"prompts must be stored, got 3 with \[0, 1\]"),
        (lambda cache: cache.arrange([0], [40]), "lengths must leave room in slots for 40 tokens, got 41 with the next ones"),
        (lambda cache: cache.arrange([0], [31], 10), "lengths must leave room in slots for 40 tokens, got 41"),
        (lambda cache: cache.extend([0], [0], [38], [3]), "lengths must leave room in slots for 40 tokens, got 41"),
        (lambda cache: cache.put_back(0, 2, cache.take_out(0, 0)), r"prompts must be stored, got 2 with \[0, 1\]"),
    ],
)
def test_bad_calls(call, message):
    cache, _ = filled([5, 6], max_tokens=40)
    with pytest.raises(ValueError, match=message):
        call(cache)
