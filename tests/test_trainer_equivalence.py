"""Training with a prompt run once per group, against training with a copy of it for every completion."""

import pytest
import tiny
import torch
from test_trainer import length_reward, lora, run_ours, vowel_reward

from vlmkernels.models.group import why_not_shared

CASES = {
    "images": {"images": "one", "loss_type": "dapo"},
    "mixed": {"images": "mixed", "loss_type": "grpo", "num_iterations": 2},
    "text": {"images": "none", "beta": 0.1, "importance_sampling_level": "sequence"},
    "kl": {"images": "several", "beta": 0.1, "gradient_checkpointing": True},
    "lora": {"images": "one", "beta": 0.1, "peft_config": True, "steps_per_generation": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_same_losses_gradients_and_parameters(tmp_path, case):
    options = CASES[case] | {"max_steps": 5, "learning_rate": 1e-3}
    data = tiny.rows(8, options.pop("images"))
    peft = options.pop("peft_config", None)
    runs = []
    for share in ("auto", False):
        torch.manual_seed(0)
        trainer, logs, gradients = run_ours(
            tmp_path / str(share), data, funcs=(length_reward, vowel_reward), peft_config=lora() if peft else None,
            share_prefix=share, **options,
        )  # fmt: skip
        assert trainer.shares_prefix == (share == "auto")
        runs.append((logs, gradients, {n: p.detach() for n, p in trainer.model.named_parameters()}))
    (ours, gradients, parameters), (logs, expected, others) = runs
    for mine, other in zip(ours, logs, strict=True):
        for name in {name for name in other if "time" not in name}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for mine, other in zip(gradients, expected, strict=True):
        size = max(g.abs().max() for g in other.values())
        assert mine.keys() == other.keys()
        assert all((mine[n] - g).abs().max() <= 2e-5 * size for n, g in other.items())
    for name, parameter in others.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-6)


def test_what_cannot_share_says_why(tmp_path):
    model = tiny.text_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert why_not_shared(model) == "Qwen2ForCausalLM: its decoder has layers of type sliding_attention"
    model.config.layer_types = ["full_attention"] * 2
    model.config.attention_dropout = 0.1
    assert why_not_shared(model) == "attention_dropout must be 0, got 0.1"
    with pytest.raises(ValueError, match=r"share_prefix must be 'auto' or False: attention_dropout must be 0, got 0.1"):
        run_ours(tmp_path, tiny.rows(4, "none"), model=model, share_prefix=True)
    with pytest.raises(ValueError, match="share_prefix must be auto, true or false, got 'maybe'"):
        run_ours(tmp_path, tiny.rows(4, "none"), model=model, share_prefix="maybe")
