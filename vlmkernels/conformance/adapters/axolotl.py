"""Axolotl: its asynchronous GRPO trainer, with its own scoring and loss. Its synchronous trainer has those of TRL.

The trainer is constructed without its ``__init__``, which needs a server of vLLM. What the suite provides (log-probabilities,
rewards, completions) replaces the methods that run the model, the reward functions and the sampler.
"""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, NotApplicable, Sample
from vlmkernels.conformance.adapter import group_size
from vlmkernels.conformance.foreign import stand_ins
from vlmkernels.conformance.models import encode

# trl.experimental.prm is of the older TRL that Axolotl pins; only its trainer of reward models uses it.
with stand_ins("numba", "requests", "urllib3", "trl.experimental.prm"):
    from axolotl.core.trainers.grpo.async_trainer import AsyncGRPOConfig, AsyncGRPOTrainer

CAP = 3.0  # the default of vllm_importance_sampling_cap


def accelerator(num_processes: int = 1) -> SimpleNamespace:
    """Return the methods of an Accelerator that the trainer calls, for one of ``num_processes``."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=num_processes,
        process_index=0,
        is_main_process=False,  # the main process logs
        gather=lambda x: x,
        pad_across_processes=lambda x, **_: x,
        unwrap_model=lambda model, **_: model,
    )


class Trainer(AsyncGRPOTrainer):
    """A trainer with the attributes that the methods under test read."""

    def __init__(self, **attributes: Any) -> None:
        defaults = {
            "accelerator": accelerator(),
            "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
            "is_fsdp_enabled": False,
            "use_liger_kernel": False,
            "use_vllm": False,
            "beta": 0.0,
            "num_iterations": 1,
            "temperature": 1.0,
            "top_entropy_quantile": 1.0,
            "importance_sampling_level": "token",
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_cap": CAP,
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "group",
            "num_generations": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "mask_truncated_completions": False,
            "chat_template_kwargs": {},
            "tools": None,
            "reward_funcs": [None],
            "reward_func_names": ["reward"],
            "reward_weights": torch.ones(1),
            "processing_class": SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
            "state": SimpleNamespace(num_input_tokens_seen=0, global_step=0),
        }
        vars(self).update(defaults | attributes)
        self._metrics = defaultdict(lambda: defaultdict(list))
        self._logs = {"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)}

    def scored(self, rewards: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        """Return the batch after scoring of completions with these rewards, (N, R), and log-probabilities, (N, T)."""
        self._launch_reward_workers = lambda *_: None
        self._collect_reward_workers = lambda *_: rewards
        self._get_per_token_logps_and_entropies = lambda *_, **__: (logps, None)
        count, ids = len(rewards), torch.zeros_like(mask, dtype=torch.int64)
        rollout = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "_deferred_inputs": [{}] * count,
            "_deferred_prompts": [""] * count,
            "_deferred_completions": [""] * count,
            "_deferred_completion_ids_list": [[0]] * count,
            "_pending_policy_logps": True,
        }
        return self._compute_deferred_scores({**rollout, **inputs})


def arguments(**fields: Any) -> SimpleNamespace:
    """Return the fields of AsyncGRPOConfig that the methods under test read."""
    names = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg", "gradient_checkpointing_kwargs")
    defaults = {name: AsyncGRPOConfig.__dataclass_fields__[name].default for name in names}
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    return SimpleNamespace(**{**defaults, **sizes, "batch_flattening": False, "report_to": [], **fields})


class Axolotl(Adapter):
    name = "axolotl (async GRPO)"
    packages = ("axolotl", "trl")
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
    levels = ("token", "sequence")
    kl_estimators = ("k3",)
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options: ClassVar = {
        "delta": 4.0,
        "off_policy_mask_threshold": 0.25,
        "top_entropy_quantile": 0.5,
        "use_bias_correction_kl": True,
    }
    masks = ("padding", "holes")
    scales = ("group", "batch", "none")
    several_rewards = unscored = True
    documented = (
        Documented(
            ("loss/accumulation[bnpo-*]", "loss/processes[bnpo-*]"),
            "bnpo is the mean over the tokens of a micro-batch",
            "trl.GRPOConfig, loss_type",
        ),
        Documented(
            tuple(f"loss/extreme_ratios[{loss}-*-rollout]" for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")),
            "the weights of the rollout correction are at least 1 / cap",
            "comment at is_floor in AsyncGRPOTrainer._compute_deferred_scores",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        names = [f"reward {index}" for index in range(batch.rewards.shape[1])]
        trainer = Trainer(
            args=arguments(),
            num_generations=group_size(batch),
            scale_rewards=batch.scale,
            reward_funcs=names,
            reward_func_names=names,
            reward_weights=torch.tensor(batch.weights),
        )
        nothing = torch.zeros(len(batch.rewards), 1)
        return trainer.scored(batch.rewards, nothing, torch.ones_like(nothing, dtype=torch.bool))["advantages"]

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        if config.kl != "none" and config.kl_estimator != "k3":
            raise NotApplicable("the KL estimator is k3")
        trainer = Trainer(
            args=arguments(**{name: getattr(config, name) for name in ARGUMENTS}),
            accelerator=accelerator(batch.num_processes),
            importance_sampling_level=config.level,
            epsilon_high=config.clip_high,
            current_gradient_accumulation_steps=batch.accumulation_steps,
            use_vllm=config.rollout_correction is not None,
            **{name: getattr(config, name) for name in ATTRIBUTES},
        )
        mask = batch.loss_mask.long()
        inputs = {
            "prompt_ids": mask[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": batch.advantages,
            "old_per_token_logps": batch.old_logps,
            "ref_per_token_logps": batch.ref_logps,
            "num_items_in_batch": torch.tensor(batch.tokens),
        }
        if batch.rollout_logps is not None:
            inputs["sampling_per_token_logps"] = batch.rollout_logps
        if config.rollout_correction:
            inputs["importance_sampling_ratio"] = ratio(batch, config)
        entropy = torch.zeros_like(batch.logps) if batch.entropy is None else batch.entropy
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (batch.logps, entropy)
        return trainer._compute_loss(trainer.model, inputs)


ARGUMENTS = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
ATTRIBUTES = (
    *("loss_type", "beta", "epsilon_low", "max_completion_length", "top_entropy_quantile", "off_policy_mask_threshold"),
)


def ratio(batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
    """Return the weights that the trainer computes when it scores completions."""
    cap = config.rollout_clip_max
    if config.rollout_sequence_ratio != "sum" or cap is None:
        raise NotApplicable("the ratio of a sequence is that of its sum, and has an upper bound")
    trainer = Trainer(
        args=arguments(),
        use_vllm=True,
        vllm_importance_sampling_mode=config.rollout_correction,
        vllm_importance_sampling_cap=cap,
    )
    old = batch.known_old_logps
    rewards = torch.zeros(len(old), 1)
    scored = trainer.scored(rewards, old, batch.loss_mask, sampling_per_token_logps=batch.rollout_logps)
    return scored["importance_sampling_ratio"]


class AxolotlModel(Adapter):
    """The forward pass in the loss. The trainer always runs it under autocast in bf16.

    The log-softmax is then in bf16 on the CPU, and in fp32 on a GPU.
    """

    name = "axolotl (async GRPO, forward pass)"
    packages = ("axolotl", "trl")
    dtypes = (torch.bfloat16,)
    models = ("text", "qwen2_5_vl", "llava")
    batch_size = 1000  # all samples

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        tokenizer = getattr(processor, "tokenizer", processor)
        trainer = Trainer(
            args=arguments(),
            model_kwarg_keys={"logits_to_keep"},
            temperature=temperature,
            processing_class=processor,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        prompts = encode(processor, samples)
        rows = zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True)
        prompt_ids = [ids[where].tolist() for ids, where in rows]
        completion_ids = [[*sample.completion_ids] for sample in samples]
        trainer._generate = lambda _: (prompt_ids, completion_ids, None, [""] * len(samples), torch.tensor(1), None, {})
        batch = trainer._generate_only([row(sample, samples) for sample in samples])
        names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "image_sizes", "mm_token_type_ids")
        logps, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
            batch_size=min(self.batch_size, len(samples)),
            compute_entropy=True,
            **{name: batch[name] for name in names if name in batch},
        )
        return [row[: len(sample.completion_ids)] for row, sample in zip(logps, samples, strict=True)]


class AxolotlScoring(AxolotlModel):
    """The same forward pass in chunks, as the trainer scores completions that it streams."""

    name = "axolotl (async GRPO, scoring)"
    batch_size = 2  # with per_device_train_batch_size = 1


def row(sample: Sample, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the row of a dataset with this prompt."""
    with_images = any(each.images for each in samples)
    return {"prompt": [{"role": "user", "content": sample.text}], **({"images": sample.pictures} if with_images else {})}
