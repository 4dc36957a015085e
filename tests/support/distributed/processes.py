"""Training cases that give the same result with any number of processes, and the comparison of two results."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support import tiny
from support.engines import FunctionEngine
from vlmkernels.rollout.base import Rollout
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.parallel import gathered

torch.set_num_threads(1)

WRAPPED = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
SAVES = {
    "optim": "adamw_torch", "adam_epsilon": 1e-4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
CORRECTED = {"rollout_correction": "sequence_mask", "rollout_sequence_ratio": "mean", "rollout_clip_max": 1.0}
# A mask of everything is the same on every number of processes.
MASKS = {"perception_loss_weight": 0.1, "der_loss_weight1": 0.02, "der_loss_weight2": 0.05, "mask_ratio": 1.0}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED}}
# The stage of DeepSpeed; parameters of every size are sharded.
ZERO2, ZERO3 = {"zero": 2}, {"zero": 3}
DEEPSPEED = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True},
    **dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto"),
    "gradient_clipping": "auto",
}
# The environment variables in which `accelerate launch` passes on its configuration, one of configs/ (see conftest.py).
CONFIGURED = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(("ACCELERATE_", "FSDP_"))}
# `images` are those of each row (tiny.rows). With three processes, each has one row of a step.
CASES = {
    "ddp": {"images": "mixed", "beta": 0.1, "evaluates": True, "rollout_correction": "token_truncate", "teaches": True},
    "fsdp": {"images": "mixed", "beta": 0.1, "evaluates": True, **FSDP},
    "fsdp, videos": {"images": "videos", **FSDP},
    "fsdp, text": {"images": "none", "loss_type": "grpo", **FSDP},
    "fsdp, no shared prefix": {"images": "mixed", "share_prefix": "false", **FSDP},
    "fsdp, frozen tower": {"images": "one", "frozen": True, "num_iterations": 2, "max_steps": 4, **FSDP},
    "fsdp, token budget": {"images": "mixed", "max_tokens_per_microbatch": 45, "teaches": True, **CORRECTED, **FSDP},
    "fsdp, masks": {"images": "mixed", "max_tokens_per_microbatch": 90, **MASKS, **FSDP},
    "fsdp, lora": {"images": "one", "beta": 0.1, "lora": ["q_proj", "v_proj"], **FSDP},
    "fsdp, saved": {"images": "mixed", **SAVES, **FSDP},
    "fsdp, resumed": {"images": "mixed", "max_steps": 4, "resumes": True, **SAVES, **FSDP},
    "ddp, sampled": {"images": "mixed", "samples": True, "max_completion_length": 12, "learning_rate": 1e-4},
    "fsdp, sampled": {"images": "mixed", "samples": True, "max_completion_length": 12, "learning_rate": 1e-4, **FSDP},
    "as configured": {"images": "mixed", "beta": 0.1, "teaches": True, "configured": True},
    "zero2": {"images": "mixed", "beta": 0.1, "evaluates": True, **ZERO2},
    "zero2, token budget": {"images": "mixed", "max_tokens_per_microbatch": 45, **ZERO2},
    "zero3": {"images": "mixed", "beta": 0.1, "evaluates": True, **ZERO3},
    "zero3, videos": {"images": "videos", **ZERO3},
    "zero3, text": {"images": "none", "loss_type": "grpo", **ZERO3},
    "zero3, token budget": {"images": "mixed", "max_tokens_per_microbatch": 45, "teaches": True, **CORRECTED, **ZERO3},
    "zero3, masks": {"images": "mixed", "max_tokens_per_microbatch": 90, **MASKS, **ZERO3},
    "zero3, lora": {"images": "one", "beta": 0.1, "lora": ["q_proj", "lm_head"], **ZERO3},
    "zero3, saved": {"images": "mixed", **SAVES, **ZERO3},
    "zero3, resumed": {"images": "mixed", "max_steps": 4, "resumes": True, **SAVES, **ZERO3},
    "zero3, sampled": {"images": "mixed", "samples": True, "max_completion_length": 12, "learning_rate": 1e-4, **ZERO3},
}
SAMPLED = ("ddp, sampled", "fsdp, sampled")
LAUNCHES = {
    2: [name for name in CASES if not name.startswith("zero") and name != "fsdp, resumed"],
    # One of three has no images or videos, one has fewer splits, one evaluates fewer rows. "resumed" loads what two saved.
    3: ["as configured", "ddp", "fsdp", "fsdp, videos", "fsdp, token budget", "fsdp, masks", "fsdp, resumed"],
}


def options_alone(name: str) -> dict:
    """The options of a case when one process runs it."""
    return {key: value for key, value in CASES[name].items() if key not in (*FSDP, "zero", "configured")}


def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]


def completions_of(model, prompts, num_generations, temperature):
    """Stands in for sampling: completions and log-probabilities that depend only on the prompt."""
    group = torch.arange(len(prompts)).repeat_interleave(num_generations)
    sums = (prompts.inputs["input_ids"] * prompts.inputs["attention_mask"]).sum(1) % 7
    member = torch.arange(num_generations).repeat(len(sums))
    ids = (sums[group, None] + 3 * member[:, None] + torch.arange(4)) % 30
    lengths = 1 + sums[group] % 3 + member % 2  # processes have unequal numbers of tokens
    logps, log_kept_mass = -3.0 - 0.2 * (ids % 5), -0.1 * (ids % 3)
    return Rollout(prompts, group, ids, torch.arange(4) < lengths[:, None], lengths < 3, logps, log_kept_mass)


def build(output_dir, name: str) -> GRPOTrainer:
    options = {"optim": "sgd", "max_completion_length": 4, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options |= CASES[name] if processes > 1 else options_alone(name)
    options.pop("resumes", None)
    images, samples, frozen, adapters, evaluates, zero, configured, teaches = (
        options.pop(key, False) for key in ("images", "samples", "frozen", "lora", "evaluates", "zero", "configured", "teaches")
    )
    if evaluates:
        options |= {"num_generations_eval": 2, "eval_strategy": "steps", "eval_steps": 1}
    unset_hf_deepspeed_config()  # of the last case: transformers would shard the models while they are created
    torch.manual_seed(0)
    model, teacher = tiny.vlm(tied=False), tiny.vlm(3, tied=False) if teaches else None
    if frozen:
        model.model.visual.requires_grad_(False)
    environment = CONFIGURED if configured else {}
    if zero:
        config = {**DEEPSPEED, "zero_optimization": {**DEEPSPEED["zero_optimization"], "stage": zero}}
        file = Path(output_dir, f"zero{zero}_{os.environ['RANK']}.json")
        file.write_text(json.dumps(config))
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "FSDP_")):  # of the last case
            del os.environ[name]
    os.environ |= environment
    deepspeed = "ACCELERATE_USE_DEEPSPEED" in environment
    AcceleratorState._reset_state(reset_partial_state=deepspeed)
    if deepspeed:
        options |= {"ddp_backend": "gloo"}  # without a backend, accelerate runs DeepSpeed on accelerators only
    args = GRPOConfig(
        output_dir=str(output_dir), per_device_train_batch_size=12 // processes, num_generations=2 if samples else 4,
        gradient_accumulation_steps=2, logging_steps=1, max_grad_norm=0.0, disable_tqdm=True,
        use_cpu=not deepspeed, bf16=False, report_to="none", **options,
    )  # fmt: skip
    if processes > 1 and not deepspeed:
        # accelerate enables FSDP only when it sees several accelerators.
        sharded = "fsdp" in options or "ACCELERATE_USE_FSDP" in environment
        kind = DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = kind
    if configured:  # the models are loaded from folders under that configuration
        paths = [str(Path(output_dir, name)) for name in ("model", "teacher")]
        for loaded, path in zip((model, teacher), paths, strict=True):
            loaded.save_pretrained(path)  # only one process writes
        args.distributed_state.wait_for_everyone()
        model, teacher = paths
    data = tiny.rows(12, images)
    trainer = GRPOTrainer(
        model, length, args, data, data[:5] if evaluates else None, processing_class=tiny.processor(),
        peft_config=LoraConfig(r=4, target_modules=adapters, init_lora_weights=False) if adapters else None,
        teacher=teacher,
    )  # fmt: skip
    if not samples:
        trainer.engine = FunctionEngine(completions_of)
    return trainer


def run(output_dir, name: str) -> dict:
    """The logs, and the sum of squares of every parameter at the end (read from the saved model if "configured")."""
    trainer = build(output_dir, name)
    several = "WORLD_SIZE" in os.environ
    trainer.train(resume_from_checkpoint=True if several and "resumes" in CASES[name] else None)
    sharded = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in trainer.policy.parameters())
    if "configured" in CASES[name]:
        trainer.save_model(folder := str(Path(output_dir, "saved")))
        trainer.accelerator.wait_for_everyone()
        parameters = load_file(Path(folder, "model.safetensors"))
    else:
        parameters = whole_parameters(trainer)
    size = {key: p.double().square().sum().item() for key, p in parameters.items()}
    return {"logs": trainer.state.log_history[:-1], "parameters": size, "sharded": sharded}


def whole_parameters(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    with gathered(trainer.accelerator, trainer.policy, trainer.prepared.head), torch.no_grad():
        parameters = trainer.policy.named_parameters()
        return {key: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for key, p in parameters}


def assert_same(result: dict, other: dict) -> None:
    """Equal logs and parameters, up to the order of floating-point sums."""
    assert len(result["logs"]) == len(other["logs"]) > 0
    for one, two in zip(result["logs"], other["logs"], strict=True):
        # Not compared: means over processes instead of tokens, what each process counts for itself, and samples of its shards.
        own = r"weights_changed|time|per_second|tokens$|_run$|entropy|^kl|divergence|clip_ratio|policy_loss|ratio/m|perception"
        names = [name for name in two if not re.search(own, name)]
        assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-4, abs=1e-6)
    assert result["parameters"] == pytest.approx(other["parameters"], rel=1e-4)
