"""Multi-turn decoding, packs and padded rows of trajectories, against runs of each trajectory by itself."""

import pytest
import torch
from support.double import InDouble
from support.groups import PAD, SHARING, amplified
from support.trajectories import ScriptedEpisodes, media_tokens, sample_of, setting, vocabulary_ends

from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.trajectories import Turns, chain, text_inputs
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.decode import decode_trajectories

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2


@torch.no_grad()
def by_itself(model, prompt, results, sampling, ends, ids):
    """The greedy tokens of a trajectory and their log-probabilities, from one forward pass over it.

    ``ids`` is the whole trajectory, with its results in their places. It is the greedy one if the tokens are those of ``ids``:
    each then is the greedy token after those before it.
    """
    parts, turn, is_sampled, number, ended = [prompt], [], [], 0, False
    while not ended:
        token = ids[len(is_sampled)]
        turn.append(token)
        is_sampled.append(True)
        ended = token in ends or len(is_sampled) == sampling.max_new_tokens
        if token in ends and number < len(results):
            result = results[number].inputs["input_ids"][0].tolist()
            if len(is_sampled) + len(result) < sampling.max_new_tokens:
                assert ids[len(is_sampled) :][: len(result)] == result
                parts += [text_inputs([turn], prompt.family, "cpu", PAD), results[number]]
                is_sampled += [False] * len(result)
                turn, number, ended = [], number + 1, False
    assert len(is_sampled) == len(ids)
    whole = chain([*parts, text_inputs([turn], prompt.family, "cpu", PAD)])
    logits = model(**whole.inputs, use_cache=False).logits[0, -len(ids) - 1 : -1].float()
    allowed = logits.index_fill(-1, torch.tensor(sampling.suppress_tokens, dtype=torch.int64), -torch.inf)
    is_sampled, tokens = torch.tensor(is_sampled), allowed.argmax(-1)
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens.where(is_sampled, torch.tensor(ids)).tolist(), logps * is_sampled


@pytest.mark.parametrize("name", SHARING)
def test_decoding_equals_each_trajectory_by_itself(name):
    model, prompts, group, results = setting(name)
    model = amplified(model)
    ends = vocabulary_ends(model)
    media = media_tokens(model)
    longest = max(r.inputs["input_ids"].shape[1] for rs in results for r in rs)
    sampling = Sampling(3 * longest + 6, ends, PAD, temperature=0, suppress_tokens=media)
    found = []
    use_tree_attention(model)
    try:
        for slots in (None, 2):
            decoded = decode_trajectories(model, prompts, ScriptedEpisodes(group, results), sampling, max_num_seqs=slots)
            found.append(
                [(decoded.ids[k][decoded.mask[k]].tolist(), decoded.logps[k][decoded.mask[k]]) for k in range(len(group))]
            )
    finally:
        undo_tree_attention(model)
    for k, (p, r) in enumerate(zip(group, results, strict=True)):
        (ids, logps), (others, other_logps) = found[0][k], found[1][k]
        assert others == ids
        tokens, expected = by_itself(model, sample_of(prompts, p), r, sampling, ends, ids)
        assert tokens == ids
        for actual in (logps, other_logps):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def rollout_of(name, images=True):
    """A model and a rollout of five random trajectories, two of which share their first turn and its result."""
    model, prompts, group, results = setting(name, images)
    rng = torch.Generator().manual_seed(1)
    free = torch.tensor([token for token in range(30) if token not in media_tokens(model)])
    words = [free[torch.randint(len(free), (1 + k % 4,), generator=rng)].tolist() for k in range(8)]
    parts = [
        [words[0], results[0][0], words[1], results[0][1], words[2]],
        [words[0], results[0][0], words[3]],
        [words[0], results[0][0], words[3], results[1][0], words[4]],
        [words[5], results[3][0], words[6], results[3][1]],
        [words[7]],
    ]
    turns = Turns.from_parts(parts, prompts.family, "cpu", PAD)
    ids = [[t for p in row for t in (p if isinstance(p, list) else p.inputs["input_ids"][0].tolist())] for row in parts]
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(row) for row in ids]).unsqueeze(1)
    padded = torch.full(mask.shape, PAD)
    padded[mask] = torch.tensor([t for row in ids for t in row])
    rollout = Rollout(prompts, torch.tensor(group), padded, mask, torch.zeros(5, dtype=torch.bool), turns=turns)
    return model, parts, rollout


def in_double(inputs):
    return {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def hidden_states(model, inputs):
    return model.base_model(**in_double(inputs), use_cache=False).last_hidden_state.flatten(0, 1)


def logps_by_itself(model, prompts, group, parts):
    """The log-probabilities of the model's tokens of each trajectory, from a forward pass of its own, one after another."""
    found, head = [], model.get_output_embeddings().weight
    for prompt, row in zip(group, parts, strict=True):
        segments = [text_inputs([p], prompts.family, "cpu", PAD) if isinstance(p, list) else p for p in row]
        logits = hidden_states(model, chain([sample_of(prompts, prompt), *segments]).inputs) @ head.T
        place = int(prompts.inputs["attention_mask"][prompt].sum())
        for p, segment in zip(row, segments, strict=True):
            count = segment.inputs["input_ids"].shape[1]
            if isinstance(p, list):
                logps = logits[place - 1 : place + count - 1].log_softmax(-1)
                found.append(logps.gather(1, torch.tensor(p).unsqueeze(1)).squeeze(1))
            place += count
    return torch.cat(found)


def score(model, batch):
    logits = hidden_states(model, batch.inputs)[batch.rows] @ model.get_output_embeddings().weight.T
    return logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", SHARING)
def test_scores_and_gradients_equal_each_trajectory_by_itself(name):
    """In packs and in padded rows, in fp64. A turn of several trajectories is scored once for each of them."""
    model, parts, rollout = rollout_of(name)
    model = model.double()
    model.set_experts_implementation("eager")  # the others have no fp64
    samples = torch.arange(len(parts))
    with InDouble():
        expected = logps_by_itself(model, rollout.prompts, rollout.group.tolist(), parts)
        weight = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
        reference = gradients(model, (weight * expected).sum())
        use_tree_attention(model)
        packed = rollout.packed(samples, model)
        for batch in (packed, rollout.padded(samples)):
            actual = score(model, batch)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
            found = gradients(model, (weight * actual).sum())
            assert found.keys() == reference.keys()
            largest = max(float(x.abs().max()) for x in reference.values())
            for key, x in reference.items():
                torch.testing.assert_close(found[key], x, rtol=0, atol=1e-9 * max(float(x.abs().max()), 1e-3 * largest))
    sampled = rollout.sampled_mask
    assert torch.equal(rollout.completion_ids[sampled], packed.targets)
    copies = rollout.prompts.inputs["attention_mask"].sum(1)[rollout.group].sum() + rollout.completion_mask.sum()
    assert packed.inputs["input_ids"].numel() < copies


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_parts_within_a_budget_score_every_trajectory_once(name):
    model, parts, rollout = rollout_of(name)
    use_tree_attention(model)
    width = model.config.get_text_config().hidden_size
    everything = torch.arange(len(parts))
    whole = score(model, rollout.packed(everything, model))
    counts = rollout.sampled_mask.sum(1).tolist()
    longest = int((rollout.prompts.inputs["attention_mask"].sum(1)[rollout.group] + rollout.completion_mask.sum(1)).max())
    total = rollout.packed(everything, model).inputs["input_ids"].numel()
    for budget in (longest, (longest + total) // 2, total):
        found = rollout.parts(slice(None), budget, shared=True, hidden_size=width)
        assert sorted(torch.cat(found).tolist()) == everything.tolist()
        for part in found:
            batch = rollout.packed(part, model)
            assert batch.inputs["input_ids"].numel() <= budget
            expected = [whole.split(counts)[k] for k in part.tolist()]
            torch.testing.assert_close(score(model, batch), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert len(rollout.parts(slice(None), total, shared=True, hidden_size=width)) == 1
    with pytest.raises(ValueError, match=f"max_tokens_per_microbatch must be at least {longest}"):
        rollout.parts(slice(None), longest - 1, shared=True, hidden_size=width)
