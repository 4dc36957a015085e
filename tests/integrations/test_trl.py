"""TRL's own trainers with and without this package beneath them: the same losses, metrics, gradients and parameters."""

from dataclasses import dataclass, field

import pytest

trl = pytest.importorskip("trl")

import torch  # noqa: E402
from trl_runs import STEPS, FixedEngine, build, rows, tiny_model, train  # noqa: E402

from vlmkernels.integrations.trl import patch_trl  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT, ONE, SEVERAL = [[]], [[(28, 28)], [(56, 28)]], [[(28, 28)], [(56, 28), (28, 28)]]
SEQUENCE = {"importance_sampling_level": "sequence"}
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_clip_max": 2.0}


@dataclass
class Case:
    """images: the sizes of a row's, see ``rows``. shares: whether prompts run once."""

    model: str
    images: list
    options: dict = field(default_factory=dict)
    trainer: str = "GRPO"
    shares: bool = True
    lora: bool = False


# fmt: off
CASES = {
    # every family, every loss
    "dapo": Case("qwen2_5_vl", SEVERAL, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "grpo": Case("qwen3_vl", ONE, {"loss_type": "grpo", "beta": 0.1}),
    "bnpo, LoRA": Case("llava", ONE, {"loss_type": "bnpo", "beta": 0.1}, lora=True),
    "dr_grpo": Case("smolvlm", ONE, {"loss_type": "dr_grpo", "delta": 1.5, "steps_per_generation": 2}),
    "cispo": Case("gemma3", [[(28, 28)]], {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 5.0}, shares=False),
    "sapo": Case("internvl", ONE, {"loss_type": "sapo", "top_entropy_quantile": 0.6, "entropy_coef": 0.01}),
    "vespo": Case("text", TEXT, {"loss_type": "vespo", "use_adaptive_entropy": True, "entropy_target": 5.56}),
    "luspo, LoRA": Case("text", TEXT, {"loss_type": "luspo", **SEQUENCE, "beta": 0.05}, lora=True),
    # other options
    "gspo, evaluated": Case("text", TEXT, {"loss_type": "grpo", **SEQUENCE, "eval_strategy": "steps", "eval_steps": 5}),
    "masks": Case("text", TEXT, {"mask_truncated_completions": True, "off_policy_mask_threshold": 0.001, "beta": 0.1}),
    "fp32 head": Case("text", TEXT, {"cast_lm_head_to_fp32": True, "temperature": 0.7, "pad_to_multiple_of": 8}),
    "experts": Case("moe", TEXT, {"router_aux_loss_coef": 0.1}, shares=False),
    "engine, tokens": Case("text", TEXT, {**VLLM, "vllm_importance_sampling_mode": "token_truncate"}),
    "engine, sequences": Case("text", TEXT, {**VLLM, "vllm_importance_sampling_mode": "sequence_mask"}),
    "rloo": Case("qwen2_5_vl", ONE, {"beta": 0.1, "gradient_accumulation_steps": 2}, trainer="RLOO"),
}
# fmt: on


def options_of(case: Case) -> dict:
    options = {"config": getattr(trl, f"{case.trainer}Config"), **case.options}
    if case.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return options


def assert_same(mine, theirs):
    assert len(mine.logs) == len(theirs.logs) > STEPS
    for own, other in zip(mine.logs, theirs.logs, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert own[name] == pytest.approx(value, rel=2e-5, abs=2e-6, nan_ok=True), (other["step"], name)
    for name, parameter in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], parameter, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_same_as_without_the_line(tmp_path, monkeypatch, name):
    case = CASES[name]
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FixedEngine)
    arguments = (tmp_path, getattr(trl, f"{case.trainer}Trainer"), *tiny_model(case.model), rows(4, case.images))
    theirs = train(build(*arguments, **options_of(case)))
    with patch_trl():
        mine = train(build(*arguments, **options_of(case)))
    assert mine.trainer._scoring.shares == case.shares
    assert any(log.get("grad_norm", 0) > 0 for log in theirs.logs)
    assert_same(mine, theirs)
