"""Packs of groups in real models, compared with a copy of the prompt for each completion."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_families
from support.groups import MODELS, SHARING, completions_of, processed, prompts_of

from vlmkernels.models.attention import use_group_attention
from vlmkernels.models.families import prefix_sharing_unsupported
from vlmkernels.models.group import cut_packs, pack_groups, prompt_positions
from vlmkernels.ops.linear_logps import linear_logps


def unshared(model, prompts, group, ids, mask):
    """Return log-probabilities, computed completion by completion."""
    parts = []
    for k in range(len(group)):
        length = int(mask[k].sum())
        if length:
            one = prompts.select(group[k : k + 1]).trim().append(ids[k : k + 1, :length], mask[k : k + 1, :length])
            logits = model(**one.inputs, use_cache=False).logits[0, -length - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(-1, ids[k, :length, None]).squeeze(-1))
    return torch.cat(parts)


def shared(model, prompts, group, ids, mask):
    batch = pack_groups(prompts.inputs, prompt_positions(model, prompts.inputs), group, ids, mask)
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return linear_logps(hidden, model.lm_head.weight, batch.targets, rows=batch.rows)


CASES = {
    "one image each": ((1, 1), (4, 4), [5, 3, 6, 6, 2, 7, 1, 4]),
    "several, none, one": ((2, 0, 1), (2, 3, 1), [4, 4, 1, 6, 2, 5]),
    "text only": ((0, 0), (3, 2), [3, 5, 2, 4, 4]),
    "empty completions": ((1, 1), (3, 1), [0, 4, 0, 0]),
}


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in MODELS for c in CASES if n != "qwen2" or c == "text only"])
def test_equals_unshared(name, case):
    """Compares log-probabilities and the gradients of all parameters, including the vision tower."""
    images, sizes, lengths = CASES[case]
    model = MODELS[name]().double()
    prompts = prompts_of(images, model)
    prompts.inputs.update({n: x.double() for n, x in prompts.inputs.items() if x.is_floating_point()})
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ids, mask = completions_of(lengths)
    results = []
    for compute in (unshared, shared):
        model.zero_grad()
        logps = compute(model, prompts, group, ids, mask)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters()}))
        use_group_attention(model)
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    assert {n for n, g in ours.items() if g is None} == {n for n, g in gradients.items() if g is None}
    # Rotary angles are fp32 even in an fp64 model.
    bad = [n for n, g in gradients.items() if g is not None and (ours[n] - g).abs().max() > 1e-6 * g.abs().max()]
    assert not bad


WITH_POSITIONS = [n for n in tiny_families.BUILDERS if hasattr(tiny_families.case(n).model.base_model, "get_rope_index")]


@pytest.mark.parametrize("name", WITH_POSITIONS)
@pytest.mark.parametrize("videos", [False, True])
def test_positions_equal_those_of_the_model(monkeypatch, name, videos):
    """The model's own function is called only where ``mrope_positions`` does not support the inputs."""
    model, batch = tiny_families.case(name).model, processed(name)
    inputs = (batch if videos else batch.select((batch.rows["video"] == 0).nonzero()[:, 0])).inputs
    own, calls = model.base_model.get_rope_index, []
    expected = own(**{n: x for n, x in inputs.items() if not n.startswith("pixel")})[0]

    @functools.wraps(own)  # prompt_positions reads the signature
    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "get_rope_index", counted)
    assert torch.equal(prompt_positions(model, inputs), expected)
    # transformers versions round the seconds of Qwen2.5-VL's videos differently.
    supported = name in ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe") or (name == "qwen2_5_vl" and not videos)
    assert bool(calls) == (not supported)


def test_positions_raise_if_the_model_ignores_an_input(monkeypatch):
    model, batch = tiny_families.case("qwen2_5_vl").model, processed("qwen2_5_vl")
    monkeypatch.setattr(model.base_model, "get_rope_index", lambda input_ids, image_grid_thw, video_grid_thw: None)
    inputs = batch.inputs | {"second_per_grid_ts": torch.ones(1)}
    with pytest.raises(NotImplementedError, match=r"position ids from second_per_grid_ts, got Qwen2_5_VL.* does not accept"):
        prompt_positions(model, inputs)


def test_every_family_that_supports_sharing_is_tested():
    refused = {name for name in tiny_families.BUILDERS if prefix_sharing_unsupported(tiny_families.case(name).model.config)}
    assert refused == {*tiny_families.BUILDERS} - {*SHARING}


@pytest.mark.parametrize("name", SHARING)
def test_every_family_equals_copies(name):
    """Compares the hidden states that predict completions, and the gradients of all parameters."""
    model, batch = copy.deepcopy(tiny_families.case(name).model), processed(name)
    group = torch.arange(len(batch)).repeat_interleave(2)
    ids, mask = completions_of([3, 5] * len(batch), vocab=20)
    ids += tiny_families.token_id("a")

    def of_copies():
        inputs = batch.repeat(2).append(ids, mask).inputs
        return model.base_model(**inputs, use_cache=False).last_hidden_state[:, -mask.shape[1] - 1 : -1][mask]

    def of_pack():
        use_group_attention(model)
        pack = pack_groups(batch.inputs, prompt_positions(model, batch.inputs), group, ids, mask)
        return model.base_model(**pack.inputs, use_cache=False).last_hidden_state[0, pack.rows]

    results = []
    for compute in (of_copies, of_pack):
        model.zero_grad()
        hidden = compute()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    size = max(g.abs().max() for g in gradients.values())
    bad = {n: (ours[n] - g).abs().max().item() for n, g in gradients.items() if (ours[n] - g).abs().max() > 1e-5 * size}
    assert not bad


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


def test_error_of_a_small_budget_names_the_required_one():
    rule = "max_tokens_per_microbatch must be at least 47, a prompt of 40 tokens and a completion of 7, got 46"
    with pytest.raises(ValueError, match=rule):
        cut_packs([40, 3], [0, 0, 1], [2, 7, 40], 46, hidden_size=64)
