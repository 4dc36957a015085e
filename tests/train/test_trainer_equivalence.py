"""Training with shared prefixes equals training with a copy of the prompt for every completion."""

import copy
import re

import pytest
import torch
from support import tiny
from support.groups import SHARING
from support.training import FixedGenerate, Gradients, config, length_reward, lora, run_ours, train, vowel_reward
from support.trl_runs import rows, tiny_model

from vlmkernels.models.families import prefix_sharing_unsupported
from vlmkernels.rollout.base import Rollout
from vlmkernels.train import GRPOTrainer

PAPO = {"perception_loss_weight": 0.3, "der_loss_weight1": 0.02, "der_loss_weight2": 0.05}
CASES = {
    "images": {"images": "one", "loss_type": "dapo"},
    "mixed": {"images": "mixed", "loss_type": "grpo", "num_iterations": 2},
    "text": {"images": "none", "beta": 0.1, "importance_sampling_level": "sequence"},
    "kl": {"images": "several", "beta": 0.1, "gradient_checkpointing": True},
    "lora": {"images": "one", "beta": 0.1, "peft_config": True, "steps_per_generation": 4},
    "masks": {"images": "mixed", "num_iterations": 2, "peft_config": True, "mask_truncated_completions": True, **PAPO},
}


def run(folder, images="one", peft_config=None, **options):
    torch.manual_seed(0)
    trainer, logs, gradients = run_ours(
        folder, tiny.rows(8, images), funcs=(length_reward, vowel_reward), peft_config=lora() if peft_config else None,
        learning_rate=1e-3, **options,
    )  # fmt: skip
    return trainer, (logs, gradients, {n: p.detach() for n, p in trainer.model.named_parameters()})


def assert_same(run, other, tolerance=2e-5):
    (ours, gradients, parameters), (logs, expected, others) = run, other
    for mine, other in zip(ours, logs, strict=True):
        for name in {name for name in other if not re.search("time|_run$|per_second", name)}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for mine, other in zip(gradients, expected, strict=True):
        size = max(g.abs().max() for g in other.values())
        assert mine.keys() == other.keys()
        errors = {n: float((mine[n] - g).abs().max() / size) for n, g in other.items()}
        assert max(errors.values()) <= tolerance, max(errors.items(), key=lambda item: item[1])
    for name, parameter in others.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_same_losses_gradients_and_parameters(tmp_path, case):
    runs = []
    for share in ("auto", False):
        trainer, result = run(tmp_path / str(share), max_steps=3, share_prefix=share, **CASES[case])
        assert trainer.prepared.shares_prefix == (share == "auto")
        runs.append(result)
    assert_same(*runs)


TEXT_ONLY = {"text", "qwen3_next"}


@pytest.mark.parametrize("name", [name for name in SHARING if not name.endswith("_videos")])
def test_families(tmp_path, name):
    runs, images = [], [] if name in TEXT_ONLY else [(28, 28)]
    for share in ("auto", False):
        model, processor = tiny_model(name)
        args = config(tmp_path / str(share), max_steps=2, share_prefix=share, beta=0.1, learning_rate=1e-3)
        rewards = [length_reward, vowel_reward]
        trainer = GRPOTrainer(copy.deepcopy(model), rewards, args, rows(8, [images]), processing_class=processor)
        assert trainer.prepared.shares_prefix == (share == "auto")
        trainer.engine = FixedGenerate(trainer, first=150)
        gradients = Gradients()
        logs = train(trainer, gradients)
        runs.append((logs, gradients.steps, {n: p.detach() for n, p in trainer.model.named_parameters()}))
    assert_same(*runs, tolerance=5e-5)  # the large weights of these models amplify rounding


def test_mixed_precision(tmp_path):
    """Under autocast, sampling, log-probabilities and gradients are close to those with copies of the prompts."""
    results = []
    for share in ("auto", False):
        options = {"images": "mixed", "bf16": True, "use_cpu": True, "max_steps": 2, "num_iterations": 2, "entropy_coef": 0.1}
        assert run(tmp_path / str(share), share_prefix=share, fixed=False, **options)[0].prepared.shares_prefix == (
            share == "auto"
        )
        results.append(run(tmp_path / str(share), share_prefix=share, **options)[1])
    (ours, gradients, _), (theirs, expected, _) = results
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["entropy"] == pytest.approx(other["entropy"], rel=1e-2)
    for mine, other in zip(gradients, expected, strict=True):
        assert mine.keys() == other.keys()
        flat, reference = (torch.cat([g[name].flatten() for name in other]) for g in (mine, other))
        assert (flat - reference).norm() < 0.1 * reference.norm()


BUDGETS = {
    "cut groups": ("auto", 43, {"loss_type": "dapo", "entropy_coef": 0.1}),
    "tokens": ("auto", 43, {"loss_type": "bnpo", "images": "mixed"}),
    "completions": ("auto", 43, {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "images": "mixed"}),
    "per sequence": ("auto", 43, {"importance_sampling_level": "sequence", "epsilon": 0.003, "steps_per_generation": 4}),
    "masked": (False, 43, {"loss_type": "vespo", "mask_truncated_completions": True, "num_iterations": 2}),
    "entropy": (False, 43, {"loss_type": "grpo", "entropy_coef": 0.1, "mask_truncated_completions": True}),
    "copies": (False, 100, {"loss_type": "luspo", "steps_per_generation": 4}),
    "masks": ("auto", 90, {"images": "mixed", "loss_type": "grpo", **PAPO}),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_token_budget_changes_nothing_but_the_parts(tmp_path, monkeypatch, case):
    share, budget, options = BUDGETS[case]
    sizes = []
    for engine in ("packed", "padded", "branches"):
        make = getattr(Rollout, engine)
        monkeypatch.setattr(Rollout, engine, lambda *args, make=make: sizes.append(b := make(*args)) or b)
    whole = run(tmp_path / "whole", max_steps=2, share_prefix=share, **options)[1]
    uncut, most = len(sizes), max(batch.inputs["input_ids"].numel() for batch in sizes)
    sizes.clear()
    cut = run(tmp_path / "cut", max_steps=2, share_prefix=share, max_tokens_per_microbatch=budget, **options)[1]
    assert max(batch.inputs["input_ids"].numel() for batch in sizes) <= budget < most
    assert len(sizes) > uncut
    assert_same(cut, whole)


@pytest.mark.parametrize("share", ["auto", False])
def test_a_budget_less_than_a_prompt_and_a_completion(tmp_path, share):
    message = r"max_tokens_per_microbatch must be at least (\d+), a prompt of (\d+) tokens and a completion of (\d+), got 20"
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, max_steps=1, share_prefix=share, max_tokens_per_microbatch=20)
    needed, prompt, completion = map(int, re.search(message, str(error.value)).groups())
    assert needed == prompt + completion
    run(tmp_path / "enough", max_steps=1, share_prefix=share, max_tokens_per_microbatch=needed)
    if share == "auto":  # copies of other prompts may be shorter
        with pytest.raises(ValueError, match=message.replace("got 20", f"got {needed - 1}")):
            run(tmp_path / "less", max_steps=1, share_prefix=share, max_tokens_per_microbatch=needed - 1)
    with pytest.raises(ValueError, match="max_tokens_per_microbatch must be >= 1, got 0"):
        run(tmp_path, max_tokens_per_microbatch=0)


def test_reasons_why_prefixes_are_not_shared(tmp_path):
    model = tiny.text_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert prefix_sharing_unsupported(model) == "Qwen2ForCausalLM: its decoder has layers of type chunked_attention"
    model.config.layer_types = ["full_attention"] * 2
    model.config.attention_dropout = 0.1
    assert prefix_sharing_unsupported(model) == "attention_dropout must be 0, got 0.1"
    with pytest.raises(ValueError, match=r"share_prefix must be 'auto' or False: attention_dropout must be 0, got 0.1"):
        run_ours(tmp_path, tiny.rows(4, "none"), model=model, share_prefix=True)
    with pytest.raises(ValueError, match="share_prefix must be auto, true or false, got 'maybe'"):
        run_ours(tmp_path, tiny.rows(4, "none"), model=model, share_prefix="maybe")
