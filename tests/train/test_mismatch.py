"""The rollout correction: exact expectations over a small vocabulary, and the trainer against the formulas."""

import math
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.engines import FunctionEngine
from support.groups import amplified, prompts_of
from support.training import FixedGenerate, Gradients, config, fixed_completions, length_reward, perturb, train, vowel_reward
from torch.nn.utils.rnn import pad_sequence

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.decode import decode_groups
from vlmkernels.train import GRPOTrainer

torch.set_num_threads(1)
EOS, PAD, V = 5, 0, tiny.text_model().config.vocab_size


def chosen_from(logits: torch.Tensor, temperature: float, seen: set[int], options: dict) -> torch.Tensor:
    """Compute the sampling probabilities (V,) of the next token from the definitions of the options."""
    scores = {token: value for token, value in enumerate(logits.double().tolist())}
    penalty = options.get("repetition_penalty", 1.0)
    for token in seen:
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    for token in options.get("suppress_tokens", ()):
        scores.pop(token, None)
    weights = {token: math.exp(value / temperature) for token, value in scores.items()}

    def normalized():
        total = sum(weights.values())
        return sorted(((weight / total, token) for token, weight in weights.items()), reverse=True)

    if top_k := options.get("top_k"):
        weights = {token: weights[token] for _, token in normalized()[:top_k]}
    if (top_p := options.get("top_p", 1.0)) < 1:
        kept, mass = {}, 0.0
        for p, token in normalized():
            if mass < top_p:
                kept[token], mass = weights[token], mass + p
        weights = kept
    if min_p := options.get("min_p"):
        ranked = normalized()
        weights = {token: weights[token] for p, token in ranked if p >= min_p * ranked[0][0]}
    q = torch.zeros(len(logits), dtype=torch.float64)
    for p, token in normalized():
        q[token] = p
    return q


OPTIONS = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.7, "temperature": 1.4},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.2},
    "banned": {"suppress_tokens": [7, 8, 9, 21]},
    "penalty": {"repetition_penalty": 1.8},
    "all": {
        "top_p": 0.9, "top_k": 8, "min_p": 0.05, "suppress_tokens": [1, 9], "repetition_penalty": 1.2, "temperature": 0.8,
    },
}  # fmt: skip


def sampled(options: dict, length: int, count: int, uniform=None):
    """Return a model, a prompt and sampled completions."""
    model = amplified(tiny.text_model())
    use_tree_attention(model)
    prompts = prompts_of((0,), model)
    sampling = Sampling(**{"max_new_tokens": length, "eos_token_id": [EOS], "pad_token_id": PAD, **options})
    torch.manual_seed(1)
    return model, prompts, decode_groups(model, prompts, count, sampling, uniform=uniform)


def logits_of(model, prompts, decoded) -> torch.Tensor:
    """Return the logits (B, C, V) of the sampled tokens, with gradients."""
    inputs = prompts.repeat(len(decoded.ids)).append(decoded.ids, decoded.mask.long()).inputs
    return model(**inputs).logits[:, -decoded.ids.shape[1] - 1 : -1]


def logps_of(model, prompts, decoded, temperature=1.0) -> torch.Tensor:
    """Return log-probabilities (B, C) under the model, in fp64 after the forward pass; 0 outside of the mask."""
    logps = (logits_of(model, prompts, decoded).double() / temperature).log_softmax(-1)
    return logps.gather(-1, decoded.ids.unsqueeze(-1)).squeeze(-1).masked_fill(~decoded.mask, 0)


@pytest.mark.parametrize("case", OPTIONS)
def test_log_probability_that_a_token_was_sampled_with(case):
    """logps is over the whole vocabulary, and logps - log_kept_mass is the log-probability that the token was sampled with.

    If the options only exclude tokens, the kept mass is the probability of the remaining tokens.
    """
    options = OPTIONS[case]
    temperature = options.get("temperature", 1.0)
    model, prompts, decoded = sampled(options, 6, 8)
    with torch.no_grad():
        logits, expected = logits_of(model, prompts, decoded), logps_of(model, prompts, decoded, temperature)
    torch.testing.assert_close(decoded.logps.double(), expected, rtol=1e-4, atol=2e-5)
    start = prompts.inputs["input_ids"][0].tolist()
    for row, mask in enumerate(decoded.mask):
        for k in mask.nonzero().flatten().tolist():
            seen = {*start, *decoded.ids[row, :k].tolist()}
            q = chosen_from(logits[row, k], temperature, seen, options)
            log_kept = decoded.log_kept_mass[row, k]
            kept, sampling_logp = log_kept.exp().item(), decoded.logps[row, k] - log_kept
            assert sampling_logp.exp().item() == pytest.approx(q[decoded.ids[row, k]].item(), rel=1e-4)
            if "repetition_penalty" not in options:
                mass = (logits[row, k].double() / temperature).softmax(-1)[q > 0].sum().item()
                assert kept == pytest.approx(mass, rel=1e-4)
    assert (decoded.log_kept_mass.abs().max() > 0.05) == (case not in ("nothing", "temperature"))


def test_greedy_keeps_one_token():
    decoded = sampled({"temperature": 0}, 4, 1)[2]
    assert torch.equal(decoded.log_kept_mass, decoded.logps)
    assert decoded.logps.min() < -0.01


def every_completion(options: dict, length: int):
    """Return every completion that can be sampled, once each, and its probability (n,)."""
    side = 200 if length == 1 else 50
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    uniform = torch.cartesian_prod(*[grid] * length).view(-1, length)
    model, prompts, decoded = sampled(options, length, len(uniform), uniform)
    keys = {(*ids, *mask): row for row, (ids, mask) in enumerate(zip(decoded.ids.tolist(), decoded.mask.tolist(), strict=True))}
    decoded = type(decoded)(*[x[list(keys.values())] for x in decoded if x is not None])
    q = (decoded.logps - decoded.log_kept_mass).double().sum(1).exp()
    # The completions are all that can be sampled, because their probabilities add up to 1.
    assert q.sum().item() == pytest.approx(1, abs=1e-5)
    assert 3 <= len(q) < len(uniform) / 2
    policy = amplified(tiny.text_model())
    perturb(policy)  # differs from the model that sampled
    return model, policy, prompts, decoded, q


SUPPORTS = {
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.5, "temperature": 0.8},
    "banned, with a penalty": {"suppress_tokens": range(6, V), "repetition_penalty": 1.5},
}


def gradient(value, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize("case", SUPPORTS)
@pytest.mark.parametrize(("level", "length"), [("token", 1), ("sequence", 2)])
def test_expected_gradient_equals_the_policy_gradient_on_the_support(case, level, length):
    """E_q[gradient of the corrected loss] = -grad sum over the support of pi(y) A(y), by enumeration."""
    temperature = SUPPORTS[case].get("temperature", 1.0)
    _, policy, prompts, decoded, q = every_completion(SUPPORTS[case], length)
    advantages = torch.randn(len(q), generator=torch.Generator().manual_seed(2))
    logps = logps_of(policy, prompts, decoded, temperature)
    assert (logps.detach() - decoded.logps).abs().max() > 0.01
    loss, _ = grpo_loss(
        logps.float(), advantages * q.float(), loss_mask=decoded.mask, rollout_logps=decoded.logps - decoded.log_kept_mass,
        num_items=1, config=GRPOLossConfig(rollout_correction=f"{level}_truncate", rollout_clip_max=None),
    )  # fmt: skip
    objective = (logps.sum(1).exp() * advantages).sum()
    ours, exact = gradient(loss, policy), gradient(-objective, policy)
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("case", ["top_k", "top_p"])
def test_bias_of_the_ratios(case):
    """The truncated ratio loses at most the probability of the excluded tokens times the largest value.

    The ratio over the full vocabulary is too large by the factor 1 / kept mass.
    """
    temperature = SUPPORTS[case].get("temperature", 1.0)
    model, policy, prompts, decoded, q = every_completion(SUPPORTS[case], 1)
    f = torch.randn(V, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        old = logps_of(policy, prompts, decoded, temperature)[:, 0]
        whole = (policy(**prompts.inputs).logits[0, -1].double() / temperature).softmax(-1)
        engine = (model(**prompts.inputs).logits[0, -1].double() / temperature).softmax(-1)
    support = decoded.ids[:, 0]
    tokens = f[support]
    full, drawn = decoded.logps[:, 0].double(), (decoded.logps - decoded.log_kept_mass)[:, 0].double()
    kept = engine[support].sum()
    exact, restricted = whole @ f, whole[support] @ tokens
    truncated_ratio, full_ratio = (old - drawn).exp(), (old - full).exp()
    assert (q * truncated_ratio * tokens).sum().item() == pytest.approx(restricted.item(), rel=1e-4)
    assert (q * full_ratio * tokens).sum().item() == pytest.approx((restricted / kept).item(), rel=1e-4)
    assert (q * truncated_ratio).sum().item() == pytest.approx(whole[support].sum().item(), rel=1e-4)
    assert abs(exact - restricted) <= (1 - whole[support].sum()) * f.abs().max() + 1e-9
    assert kept < 0.9


# The trainer


class OffEngine(FixedGenerate):
    """An engine whose log-probabilities are the policy's plus noise, and NaN for some tokens."""

    def __init__(self, trainer, kept: bool = True):
        super().__init__(trainer)
        self.kept = kept

    def __call__(self, model, prompts, num_generations, temperature, samples=None):
        rollout = super().__call__(model, prompts, num_generations, temperature)
        batch = rollout.padded(torch.arange(len(rollout.group)))
        with torch.no_grad():
            logits = model(**batch.inputs).logits[:, -rollout.completion_ids.shape[1] - 1 : -1]
        logps = (logits / temperature).log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
        generator = torch.Generator().manual_seed(7)
        logps = logps + 0.3 * torch.randn(logps.shape, generator=generator)
        logps[1, 0] = logps[5, 1] = torch.nan
        log_kept = -0.4 * torch.rand(logps.shape, generator=generator)
        values = {"logps": logps.masked_fill(~rollout.completion_mask, 0), "log_kept_mass": log_kept if self.kept else None}
        return type(rollout)(**vars(rollout) | values)


def run(folder, kept=True, engine=OffEngine, **options):
    args = config(folder, **options)
    model = tiny.vlm()
    trainer = GRPOTrainer(model, [length_reward, vowel_reward], args, tiny.rows(8, "mixed"), processing_class=tiny.processor())
    trainer.engine = engine(trainer, kept)
    gradients = Gradients()
    return trainer, train(trainer, gradients), gradients.steps


def by_hand(trainer):
    """Compute log-probabilities from the full logits of padded inputs.

    Returns:
        The model, its log-probabilities (B, C) with gradients, the rollout's log-probabilities and log kept mass (B, C), all in
        fp64, the loss mask (B, C) and the advantages (B,).
    """
    experience, model = trainer._experience, tiny.vlm()
    rollout = experience.rollout
    inputs = rollout.padded(torch.arange(len(rollout.group))).inputs
    from vlmkernels.models.vision import use_vision_ops

    use_vision_ops(model, trainer.processing_class)
    logits = model(**inputs).logits[:, -rollout.completion_ids.shape[1] - 1 : -1].double()
    logps = logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    fixed = rollout.logps.double(), rollout.log_kept_mass.double()
    return model, logps, *fixed, experience.loss_mask, experience.advantages.double()


CORRECTIONS = {
    "token truncate": {"rollout_correction": "token_truncate", "rollout_clip_min": 0.7, "rollout_clip_max": 1.1},
    "token mask, full": {"rollout_correction": "token_mask", "rollout_clip_max": 1.2, "rollout_policy": "full"},
    "sequence truncate": {
        "rollout_correction": "sequence_truncate", "rollout_clip_max": 0.9, "rollout_sequence_ratio": "mean",
    },
    "sequence mask, full": {"rollout_correction": "sequence_mask", "rollout_clip_max": 1.5, "rollout_policy": "full"},
}  # fmt: skip


@pytest.mark.parametrize("case", CORRECTIONS)
def test_trainer_against_the_formulas(tmp_path, case):
    """Gradient and metrics of a step with an inexact engine, also with a token budget."""
    options = CORRECTIONS[case]
    low, high = options.get("rollout_clip_min", 0), options["rollout_clip_max"]
    trainer, (log,), (gradients,) = run(tmp_path / "whole", **options)
    model, logps, rollout, log_kept, mask, advantages = by_hand(trainer)
    old = logps.detach()
    scored = mask & ~rollout.isnan()
    difference = (old - rollout)[scored].abs()
    gap = torch.where(scored, old - rollout + (0 if "full" in case else log_kept), 0)
    length = mask.sum(1)
    total = gap.sum(1) / length if options.get("rollout_sequence_ratio") == "mean" else gap.sum(1)
    by_sequence = case.startswith("sequence")
    ratio = total.exp()[:, None] if by_sequence else gap.exp()
    weight = ratio.clamp(low, high) if "truncate" in case else torch.where((ratio >= low) & (ratio <= high), ratio, 0)
    loss = -(weight * advantages[:, None] * (logps - old).exp() * mask).sum() / mask.sum()
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))
    size = max(g.abs().max() for g in expected.values())
    assert gradients.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(gradients[name], g, rtol=1e-3, atol=2e-5 * float(size), msg=name)

    units = ratio[:, 0] if by_sequence else ratio[scored]
    outside = (units < low) | (units > high)
    assert 0 < outside.double().mean() < 1
    by_formula = {
        "sampling_logp_difference/mean": difference.mean(),
        "sampling_logp_difference/max": difference.max(),
        "scored_ratio": scored.sum() / mask.sum(),
        "effective_sample_size": total.exp().sum() ** 2 / (len(total) * (2 * total).exp().sum()),
        "importance_sampling_ratio/raw_mean": units.mean(),
        "importance_sampling_ratio/clipped": outside.double().mean(),
        "kept_mass/mean": log_kept[mask].exp().mean(),
        "kept_mass/min": log_kept[mask].exp().min(),
    }
    for name, value in by_formula.items():
        assert log[f"sampling/{name}"] == pytest.approx(value.item(), rel=1e-4), name

    _, (parts,), _ = run(tmp_path / "parts", max_tokens_per_microbatch=43, **options)
    for name in by_formula:
        assert parts[f"sampling/{name}"] == pytest.approx(log[f"sampling/{name}"], rel=1e-4), name


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_gradient_and_differences_equal_trl(tmp_path, monkeypatch, mode):
    """TRL receives the same log-probabilities instead of vLLM's."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    data, funcs, low, high = tiny.rows(4, "none"), [length_reward, vowel_reward], 0.6, 1.5
    generator = torch.Generator().manual_seed(4)
    logps = [[-3.9 + 0.2 * torch.randn((), generator=generator).item() for _ in ids] for ids in fixed_completions(8)]
    logps[2][1] = None

    given = {"mode": mode, "clip_min": low, "clip_max": high}
    given = {f"vllm_importance_sampling_{name}": value for name, value in given.items()}
    args = config(tmp_path / "trl", trl.GRPOConfig, gradient_checkpointing=False, **given)
    dataset = Dataset.from_list(data)
    theirs = trl.GRPOTrainer(tiny.text_model(), funcs, args=args, train_dataset=dataset, processing_class=tiny.tokenizer())
    theirs._generate_single_turn = lambda prompt_ids, *_, **__: (fixed_completions(len(prompt_ids)), logps)
    theirs.use_vllm = True

    given = {"rollout_correction": mode, "rollout_clip_min": low, "rollout_clip_max": high, "rollout_policy": "full"}
    args = config(tmp_path / "ours", **given)
    ours = GRPOTrainer(tiny.text_model(), funcs, args, data, processing_class=tiny.tokenizer())
    fixed = FixedGenerate(ours)
    returned_logps = pad_sequence(
        [torch.tensor([torch.nan if x is None else x for x in row]) for row in logps], batch_first=True
    )
    ours.engine = FunctionEngine(lambda *inputs: replace(fixed(*inputs), logps=returned_logps))

    gradients = Gradients(), Gradients()
    logs = [train(trainer, kept)[0] for trainer, kept in zip((ours, theirs), gradients, strict=True)]
    for name in ("loss", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=2e-4), name
    assert 0 < logs[0]["sampling/importance_sampling_ratio/clipped"] < 1
    (mine,), (other,) = (kept.steps for kept in gradients)
    size = float(max(g.abs().max() for g in other.values()))
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=2e-5 * size, msg=name)


def test_the_trainers_own_engine(tmp_path):
    """The default engine agrees with the trainer, and the mean full ratio under top_p is the kept mass."""
    options = {"top_p": 0.9, "max_completion_length": 16, "per_device_train_batch_size": 16}
    args = config(tmp_path, rollout_correction="token_truncate", **options)
    data = tiny.rows(8, "mixed")
    trainer = GRPOTrainer(amplified(tiny.vlm()), [length_reward, vowel_reward], args, data, processing_class=tiny.processor())
    (log,) = train(trainer, Gradients())
    assert log["sampling/sampling_logp_difference/max"] < 1e-4
    assert log["sampling/kept_mass/mean"] == pytest.approx(log["sampling/importance_sampling_ratio/raw_mean"], rel=1e-4)
    assert 0.4 < log["sampling/kept_mass/min"] < log["sampling/kept_mass/mean"] < 0.95
    assert log["sampling/effective_sample_size"] < 0.9


def test_metrics_without_a_correction(tmp_path):
    """Without a correction the metrics are logged and the loss stays the same. A second pass over a batch measures nothing."""
    options = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 4, "loss_type": "grpo"}
    _, logs, gradients = run(tmp_path / "with", **options)
    _, others, expected = run(tmp_path / "without", engine=lambda trainer, _: FixedGenerate(trainer), **options)
    for one, other in zip(gradients, expected, strict=True):
        assert all(torch.equal(one[name], g) for name, g in other.items())
    names = [[name for name in log if name.startswith("sampling/")] for log in logs]
    assert names[0] == names[1] != []
    assert names[2] == names[3] == []
    assert "sampling/importance_sampling_ratio/clipped" not in names[0]
    assert not any(name.startswith("sampling/") for log in others for name in log)


def test_weights_of_long_completions(tmp_path):
    """Log-weights whose exponentials overflow: equal shifts leave the effective sample size unchanged."""
    trainer, *_ = run(tmp_path, rollout_correction="sequence_truncate", rollout_policy="full")
    rollout, mask = trainer._experience.rollout, trainer._experience.loss_mask
    rollout = replace(rollout, logps=rollout.logps.nan_to_num())
    old = rollout.logps + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    everything, results = torch.arange(len(mask)), []
    for shift in (0.0, -300.0, 300.0):
        trainer.objective.mismatch.add(rollout, everything, mask, torch.where(mask, old + shift / mask.sum(1, keepdim=True), 0))
        results.append(trainer.objective.mismatch.flush(trainer.accelerator)["sampling/effective_sample_size"])
    assert results == pytest.approx([results[0]] * 3, rel=1e-3)
    assert results[0] < 0.9


def test_log_probabilities_of_sampling_without_those_of_the_vocabulary(tmp_path):
    """What vLLM returns for truncated sampling at a temperature: the same correction; the difference is not known."""
    options = {"top_p": 0.9, "rollout_correction": "token_truncate"}
    trainer, *_ = run(tmp_path, **options)
    rollout, mask = trainer._experience.rollout, trainer._experience.loss_mask
    alone = replace(rollout, logps=None, log_kept_mass=None, sampling_logps=rollout.logps - rollout.log_kept_mass)
    everything, old, found = torch.arange(len(mask)), rollout.logps.nan_to_num() - 0.1, []
    for each in (rollout, alone):
        trainer.objective.mismatch.add(each, everything, mask, old)
        found.append(trainer.objective.mismatch.flush(trainer.accelerator))
    torch.testing.assert_close(
        *(trainer.objective.mismatch.rollout_logps(each, everything) for each in (rollout, alone)), equal_nan=True
    )
    unknown = {"sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    kept = {"sampling/kept_mass/mean", "sampling/kept_mass/min"}
    assert found[0].keys() - found[1].keys() == kept
    for name, value in found[1].items():
        assert value == (None if name in unknown else pytest.approx(found[0][name]))
    trainer.objective.mismatch.policy = "full"
    with pytest.raises(
        ValueError, match="rollout_policy must be 'truncated' with an engine that does not return log-probabilities"
    ):
        trainer.objective.mismatch.rollout_logps(alone, everything)


def test_off_policy_mask_uses_the_log_probabilities_of_the_engine(tmp_path):
    """The mean log-ratio of the sampling policy to the policy uses the engine's log-probabilities over the full vocabulary."""
    drift = {"off_policy_mask_threshold": 0.05}
    trainer, (log,), _ = run(tmp_path, **drift)
    _, logps, rollout, _, mask, advantages = by_hand(trainer)
    gaps = torch.where(mask & ~rollout.isnan(), rollout - logps.detach(), 0).sum(1) / mask.sum(1)
    out = (advantages < 0) & (gaps > 0.05)
    assert 0 < out.sum() < len(out)
    # The logged value is the mean of two micro-batches.
    assert log["effective_tokens"] == pytest.approx((mask & ~out[:, None]).sum().item() / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_correction": "mask"}, "rollout_correction must be None or one of token_truncate, .* got 'mask'"),
        ({"rollout_policy": "vllm"}, "rollout_policy must be one of truncated, full, got 'vllm'"),
        ({"rollout_clip_min": 5.0}, "rollout_clip_min must be <= rollout_clip_max = 3.0, got 5.0"),
        (
            {"rollout_correction": "sequence_mask", "top_p": 0.9},
            "rollout_sequence_ratio must be 'mean', or rollout_policy 'full', with a correction per sequence .*, got 'sum'",
        ),
        (
            {"rollout_correction": "sequence_mask", "generation_kwargs": {"top_k": 20}},
            "rollout_sequence_ratio must be 'mean', .*, got 'sum'",
        ),
    ],
)
def test_config_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
    if "rollout_sequence_ratio" in message:
        config(tmp_path, **options, rollout_policy="full")
        config(tmp_path, **options, rollout_sequence_ratio="mean")


def test_values_that_an_engine_must_return(tmp_path):
    with pytest.raises(
        ValueError, match="rollout_policy must be 'full' with an engine that does not return the kept probability mass, got"
    ):
        run(tmp_path / "kept", kept=False, rollout_correction="token_mask")
    run(tmp_path / "full", kept=False, rollout_correction="token_mask", rollout_policy="full")
    message = "rollout_correction must be None with an engine that returns no log-probabilities, got 'token_mask'"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "none", engine=lambda trainer, _: FixedGenerate(trainer), rollout_correction="token_mask")
