"""Options of training with tools, against plain code that runs each trajectory by itself."""

import math

import pytest
import torch
from support.tool_models import picture, tool_model
from support.tool_runs import Seen, build, logs_of, per_turn
from support.training import Gradients, lora

from vlmkernels.models.trajectories import chain

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made():
    return tool_model("qwen2_5_vl")


def image_reward(completions, **kwargs):
    """Different for trajectories that are equal, so that their advantages are not 0."""
    parts = [[p for m in c if isinstance(m["content"], list) for p in m["content"]] for c in completions]
    return [sum(p["type"] == "image" for p in row) + k * k % 7 / 3 for k, row in enumerate(parts)]


def plain_logits(model, rollout, k):
    """The logits of each token of trajectory k after its prompt, from a forward pass of its own, and these tokens."""
    prompt = rollout.prompts.select(rollout.group[[k]]).trim()
    whole = chain([prompt, *(rollout.turns.inputs.select(torch.tensor([s])).trim() for s in rollout.turns.members[k])])
    count = int(rollout.completion_mask[k].sum())
    logits = model(**whole.inputs, use_cache=False).logits[0].float() / TEMPERATURE
    return logits[-count - 1 : -1], whole.inputs["input_ids"][0, -count:], whole.inputs["input_ids"][0]


def plain_scores(model, rollout):
    """The log-probability and the entropy of each token that the model sampled, a list of (T,) each."""
    logps, entropies = [], []
    for k in range(len(rollout.group)):
        logits, targets, _ = plain_logits(model, rollout, k)
        all_logps = logits.log_softmax(-1)[rollout.sampled_mask[k][rollout.completion_mask[k]]]
        targets = targets[rollout.sampled_mask[k][rollout.completion_mask[k]]]
        logps.append(all_logps.gather(1, targets[:, None])[:, 0])
        entropies.append(-(all_logps.exp() * all_logps).sum(-1).detach())
    return logps, entropies


def turns_of_tokens(rollout, k):
    """The number of the turn of each token of trajectory k that the model sampled."""
    turns = rollout.turns
    lengths = torch.tensor([turns.lengths[s] for s in turns.members[k] if turns.sampled[s]])
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def plain_loss(options, samples, window, logps, entropies, old, ref, advantages, counted):
    """The loss of one step over the given trajectories, from the formulas of the papers.

    Args:
        options: those of the run.
        samples: the trajectories of the step, in micro-batches.
        window: how many steps use the batch once.
        logps, entropies, old, ref, advantages: a list of (T,) each, by trajectory.
        counted: for each trajectory whether the loss counts it.
    """
    kind, level = options.get("loss_type", "dapo"), options.get("importance_sampling_level", "token")
    total = sum(len(x) for x, c in zip(logps, counted, strict=True) if c) / window
    quantile, loss = options.get("top_entropy_quantile", 1.0), 0.0
    for micro_batch in samples:
        micro_batch = [k for k in micro_batch if counted[k]]
        high = [torch.ones_like(entropies[k]) for k in micro_batch]
        if quantile < 1:
            threshold = torch.cat([entropies[k] for k in micro_batch]).quantile(1 - quantile)
            high = [(entropies[k] >= threshold).float() for k in micro_batch]
        for k, kept in zip(micro_batch, high, strict=True):
            log_ratio = logps[k] - old[k]
            ratio = log_ratio.exp()
            if level == "sequence" or kind == "luspo":
                ratio = log_ratio.mean().exp().expand_as(ratio)
            a = advantages[k]
            value = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * kept
            if ref is not None:
                x = ref[k] - logps[k]
                value = value + options["beta"] * (x.exp() - x - 1) * ratio
            if kind == "grpo":
                loss = loss + value.mean() / len(micro_batch) / len(samples)
            elif kind == "luspo":
                loss = loss + value.mean() * len(value) / len(micro_batch) / len(samples)
            else:
                loss = loss + value.sum() / total
    return loss


DIVERSE = {"temperature": (TEMPERATURE := 1.25), "seed": 51}  # so that trajectories of a group differ
TWO_STEPS = {"max_steps": 2, "learning_rate": 0.01}
LOSSES = {
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "grpo, accumulation": {"gradient_accumulation_steps": 2, "loss_type": "grpo"},
    "two steps per generation": {"steps_per_generation": 2, **TWO_STEPS},
    "halves of groups": {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        **TWO_STEPS,
    },
    "two iterations": {"num_iterations": 2, **TWO_STEPS},
    "two iterations, copies": {"num_iterations": 2, "share_prefix": False, **TWO_STEPS},
    "two iterations, sequence level": {"num_iterations": 2, "importance_sampling_level": "sequence", **TWO_STEPS},
    "two iterations, luspo": {"num_iterations": 2, "loss_type": "luspo", "max_steps": 2, "learning_rate": 5e-4},
    "two iterations, entropy": {"num_iterations": 2, "top_entropy_quantile": 0.3, **TWO_STEPS},
    "two iterations, kl": {"num_iterations": 2, "beta": 0.5, **TWO_STEPS},
    "kl, adapters": {"num_iterations": 2, "beta": 0.5, "lora": True, **TWO_STEPS},
    "without truncated ones": {
        **{"mask_truncated_completions": True, "max_completion_length": 51, "per_device_train_batch_size": 8},
        **{"num_iterations": 2, **TWO_STEPS},
    },
    "rewards of turns": {"rewards": [per_turn, image_reward], "reward_weights": [0.5, 2.0], "num_iterations": 2, **TWO_STEPS},
    "rewards of turns, by batch": {"rewards": [per_turn], "scale_rewards": "batch", "steps_per_generation": 2, **TWO_STEPS},
}


def plain_advantages(options, completions):
    """By trajectory, and by turn: (r - mean) / (std + 1e-4) over groups of 4; NaN for turns that a trajectory lacks."""
    rewards, weights = options.get("rewards", [image_reward]), options.get("reward_weights", [1.0, 1.0])
    by_batch = options.get("scale_rewards") == "batch"

    def normalized(values):  # (N,)
        groups = [g[~g.isnan()] for g in values.view(-1, 4)]
        std = [values[~values.isnan()].std()] * len(groups) if by_batch else [g.std() if len(g) > 1 else 0.0 for g in groups]
        rows = zip(values.view(-1, 4), groups, std, strict=True)
        return torch.cat([(row - g.mean()) / (s + 1e-4) if s > 0 else 0 * row for row, g, s in rows])

    outcomes, returns = torch.zeros(len(completions)), torch.full((len(completions), 8), math.nan)
    for function, weight in zip(rewards, weights, strict=False):
        values = function(completions)
        if function is not per_turn:
            outcomes += weight * torch.tensor(values)
            continue
        for row, turns in zip(returns, values, strict=True):
            row[: len(turns)] = weight * torch.tensor(turns).flip(0).cumsum(0).flip(0)
    of_turns = torch.stack([normalized(column) for column in returns.T], 1)
    return normalized(outcomes) if rewards != [per_turn] else torch.zeros(len(completions)), of_turns.nan_to_num()


@pytest.mark.parametrize("name", LOSSES)
def test_steps_equal_those_of_trajectories_by_themselves(made, tmp_path, name):
    """The losses and the parameters after all steps that use one generation batch, against plain SGD on plain losses."""
    options = dict(LOSSES[name])
    functions, adapters = options.pop("rewards", [image_reward]), options.pop("lora", False)
    trainer = build(tmp_path, made, functions, peft_config=lora() if adapters else None, **DIVERSE, **options)
    gradients = Gradients()
    trainer.add_callback(gradients)
    model = trainer.policy
    before = {key: x.detach().clone() for key, x in model.state_dict().items()}
    trainer.train()
    after = {key: x.detach().clone() for key, x in model.named_parameters() if x.requires_grad}
    args, experience = trainer.args, trainer._experience
    rollout, mask = experience.rollout, experience.rollout.sampled_mask
    assert experience.uses == args.steps_per_rollout  # of one generation batch
    counted = (~rollout.truncated if args.mask_truncated_completions else torch.ones_like(rollout.truncated)).tolist()
    assert any(counted)
    assert all(counted) != args.mask_truncated_completions
    completions = trainer._last_scored[0].completions
    whole, of_turns = plain_advantages(LOSSES[name], completions)
    advantages = [whole[k] + of_turns[k][turns_of_tokens(rollout, k)] for k in range(len(mask))]
    for k, expected in enumerate(advantages):
        found = experience.advantages[k].expand_as(mask[k])[mask[k]]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    model.load_state_dict(before)
    as_reference = model.disable_adapter() if adapters else None
    with torch.no_grad():
        ref = None
        if args.beta:
            if as_reference is None:
                ref = plain_scores(model, rollout)[0]
            else:
                with as_reference:
                    ref = plain_scores(model, rollout)[0]
        start = plain_scores(model, rollout)[0]
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    for step, log in enumerate(logs_of(trainer)):
        first = step * accumulated % args.steps_per_generation
        samples = [range(size * m, size * (m + 1)) for m in range(first, first + accumulated)]
        model.zero_grad()
        logps, entropies = plain_scores(model, rollout)
        window = args.steps_per_generation / accumulated
        loss = plain_loss(options, samples, window, logps, entropies, start, ref, advantages, counted)
        loss.backward()
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-5), step
        expected = {key: x.grad for key, x in model.named_parameters() if x.grad is not None and x.requires_grad}
        largest = max(float(x.abs().max()) for x in expected.values())
        assert largest > 1e-3
        for key, x in expected.items():
            found = gradients.steps[step][key]
            torch.testing.assert_close(found, x, rtol=1e-4, atol=2e-5 * largest, msg=lambda m, n=(step, key): f"{n}: {m}")
        with torch.no_grad():
            for key, x in model.named_parameters():
                if key in expected:
                    x -= args.learning_rate * gradients.steps[step][key]
    for key, x in model.named_parameters():
        if key in after:
            torch.testing.assert_close(after[key], x.detach(), rtol=1e-5, atol=1e-6)


def test_autocast_to_bfloat16(made, tmp_path):
    """Sampling and training agree, and both with a forward pass of each trajectory under autocast."""
    trainer = build(tmp_path, made, image_reward, bf16=True, use_cpu=True, beta=0.1, **DIVERSE)
    model = trainer.policy
    before = {key: x.detach().clone() for key, x in model.state_dict().items()}
    trainer.train()
    experience, log = trainer._experience, logs_of(trainer)[0]
    rollout, mask = experience.rollout, experience.rollout.sampled_mask
    model.load_state_dict(before)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = torch.cat(plain_scores(model, rollout)[0])
    assert (rollout.logps[mask] - plain).abs().mean() < 0.02
    assert (experience.ref_logps[mask] - plain).abs().mean() < 0.02
    assert log["sampling/sampling_logp_difference/mean"] < 0.02
    assert 0 < log["grad_norm"] < math.inf


# ---- Sampling ----


@pytest.mark.parametrize("share_prefix", [True, False])
def test_options_of_sampling_apply_across_turns(made, tmp_path, share_prefix):
    """Each greedy token is the best one after the repetition penalty for all tokens before it, also those of results; each turn
    has at least four tokens, and ends with the token that completes a stop string."""
    seen = Seen()
    penalty, stop, least = 1.1, "</tool_call>", 4
    sampling = {"repetition_penalty": penalty, "stop_strings": [stop], "min_new_tokens": least}
    options = {"share_prefix": share_prefix, "generation_kwargs": sampling, "learning_rate": 0.0, "top_k": 1}
    trainer = build(tmp_path, made, seen, steps_per_generation=2, **options)
    trainer.train()
    model, rollout, tokenizer = trainer.policy, trainer._experience.rollout, made.processor.tokenizer
    suppressed, eos = trainer.engine.sampling.suppress_tokens, tokenizer.eos_token_id
    assert rollout.turns.num_turns >= 2
    for k in range(0, 8, 4):
        with torch.no_grad():
            logits, targets, ids = plain_logits(model, rollout, k)
        logits, first = logits * TEMPERATURE, len(ids) - len(targets)
        turn = []
        for place in range(len(targets)):
            if not rollout.sampled_mask[k, place]:
                assert not turn or tokenizer.decode(turn).endswith(stop) or turn[-1] == eos
                turn = []
                continue
            scores, before = logits[place].clone(), ids[: first + place].unique()
            scores[before] = torch.where(scores[before] < 0, scores[before] * penalty, scores[before] / penalty)
            scores[[token for token in suppressed if token < len(scores)]] = -math.inf
            if len(turn) < least:
                scores[eos] = -math.inf
            assert scores[targets[place]] == pytest.approx(float(scores.max()), abs=1e-4), (k, place)
            turn.append(int(targets[place]))


# ---- Evaluation, logs, epochs ----


def test_evaluation_epochs_and_stored_completions(made, tmp_path):
    """Two epochs of two steps; after each, greedy evaluation of three rows, one trajectory each."""
    options = {"max_steps": -1, "num_train_epochs": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
    evaluates = {"eval_strategy": "epoch", "num_generations_eval": 1, "eval_temperature": 0.0, "log_completions": True}
    seen = Seen()
    trainer = build(tmp_path, made, seen, eval_dataset=made.rows[:3], learning_rate=0.0, **options, **evaluates)
    trainer.train()
    assert [len(call["completions"]) for call in seen.calls] == [8, 8, 3, 8, 8, 3]
    usual = [[k, k + 1] for k in range(3)]
    for call in (seen.calls[2], seen.calls[5]):
        calls = [[c["function"] for m in messages for c in m.get("tool_calls", ())] for messages in call["completions"]]
        assert [[c["arguments"]["index"] for c in of_row] for of_row in calls] == usual
        assert [len(images) for images in call["tool_images"]] == [2, 2, 3]  # index 3 has two
    evaluated = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluated) == 2
    for log in evaluated:
        values = [log[f"eval_{key}"] for key in ("reward", "tools/call_frequency", "tools/turns/mean", "tools/zoom/calls")]
        assert values == [1, 2, 3, 2]
        assert 0 < log["eval_tools/frac_sampled_tokens"] < 1
    assert [log["epoch"] for log in logs_of(trainer)] == [0.5, 1, 1.5, 2]
    assert list(tmp_path.rglob("*completions*"))


def test_a_text_model(tmp_path):
    """Its log-probabilities equal those of each trajectory alone, and an image as a result stops the run."""
    made = tool_model("text", images=False)
    trainer = build(tmp_path, made, Seen(), **DIVERSE)
    before = {key: x.detach().clone() for key, x in trainer.policy.state_dict().items()}
    trainer.train()
    rollout = trainer._experience.rollout
    trainer.policy.load_state_dict(before)
    with torch.no_grad():
        plain = torch.cat(plain_scores(trainer.policy, rollout)[0])
    assert rollout.turns.num_turns == 3
    torch.testing.assert_close(rollout.logps[rollout.sampled_mask], plain, rtol=1e-4, atol=1e-4)

    def describe(index: int) -> list:
        """Describe a part of the image.

        Args:
            index: which part.
        """
        return picture(index)

    with pytest.raises(NotImplementedError, match="results of tools must be text, got an image: a text model has no images"):
        build(tmp_path, made, Seen(), tools={"tools": [describe]}).train()
