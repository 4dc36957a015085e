"""ms-swift 4.6: the loss, the advantages and the log-probabilities of ``GRPOTrainer`` (without Liger, padded batches).

The methods of the trainer run on a trainer whose constructor did not run: it has the parameters of the algorithm, no model and
no data. Packages of datasets and servers are imported but not used.
"""

import types
from dataclasses import MISSING, fields
from typing import Any, ClassVar

import torch

from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, NotApplicable
from vlmkernels.conformance.foreign import stand_ins

with stand_ins("cryptography", "aiohttp", "dacite", "msgspec", "trl.experimental.ppo"):
    from swift.rl_core.advantage import compute_advantages, compute_advantages_dynamic, expand_advantage_to_per_token
    from swift.rl_core.data import GRPOBatch
    from swift.rlhf_trainers.arguments import GRPOConfig
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

DOCS = "https://swift.readthedocs.io/en/latest/Instruction/GRPO"
LOSS_TYPES = f"{DOCS}/DeveloperGuide/loss_types.html"
ESTIMATORS = {"mean": "grpo", "leave_one_out": "rloo"}


class MsSwift(Adapter):
    name = "ms-swift"
    packages = ("ms-swift", "trl", "transformers")
    dtypes = (torch.float32, torch.float64)  # accelerate converts the logits of a bf16 model to fp32
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
    levels = ("token", "sequence")
    kl_estimators = ("k3",)
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options: ClassVar = {
        "delta": 4.0,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": 0.25,
        "rollout_sequence_ratio": "mean",
        "sapo_temperature_pos": 2.0,
    }
    masks = ("padding", "holes")
    scales = ("group", "batch", "none")
    baselines = ("mean", "leave_one_out")
    unequal_groups = several_rewards = True
    documented = (
        Documented("loss/accumulation[bnpo*]", "bnpo averages over the tokens of the batch of one process", LOSS_TYPES),
        Documented("loss/processes[bnpo*]", "bnpo averages over the tokens of the batch of one process", LOSS_TYPES),
        Documented(
            "loss/*[bnpo-*-off_policy_mask_threshold*]",
            "off-policy sequences are filtered out, so that their tokens do not count in the average",
            "docstring of _compute_off_policy_sequence_mask, swift/rlhf_trainers/grpo_trainer.py",
        ),
        Documented(
            "loss/value[*-k3-token_*]",
            "importance sampling corrects the expectation of the whole loss of a token, KL term included",
            f"{DOCS}/AdvancedResearch/training_inference_mismatch.html",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        settings = {
            "rewards_per_func": batch.rewards,
            "reward_weights": torch.tensor(batch.weights),
            "advantage_estimator": ESTIMATORS[batch.baseline],
            "scale_rewards": batch.scale,
        }
        if len(set(batch.group_sizes)) == 1:
            return compute_advantages(num_generations=batch.group_sizes[0], **settings)[0]
        groups = [f"prompt {index}" for index, size in enumerate(batch.group_sizes) for _ in range(size)]
        requests = [f"request {index}" for index in range(len(groups))]
        return compute_advantages_dynamic(prompt_ids=groups, request_ids=requests, **settings)[0]

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        trainer = _Trainer(config, batch)
        rows, width = batch.loss_mask.shape
        data = GRPOBatch(
            completion_mask=batch.loss_mask,
            truncated_mask=torch.zeros(rows, dtype=torch.bool),
            seq_lengths=torch.full((rows,), width),
            old_per_token_logps=batch.old_logps,
            ref_per_token_logps=batch.ref_logps,
            rollout_per_token_logps=batch.rollout_logps,
            advantages=expand_advantage_to_per_token(batch.advantages, batch.loss_mask),
            num_items_in_batch=batch.tokens,
            logits_to_keep=width,
        )
        loss, _ = trainer._compute_loss_and_metrics(None, {}, data)
        return loss / batch.accumulation_steps  # transformers.Trainer.training_step

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        if not targets.numel():
            raise NotApplicable("ms-swift has no batch without tokens")
        trainer = _Trainer(GRPOLossConfig())
        trainer.temperature = temperature
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # ms-swift removes the logits after the last token
        ids = torch.nn.functional.pad(targets, (1, 0))
        model = lambda **inputs: types.SimpleNamespace(logits=padded)  # noqa: E731
        return trainer._get_logps_via_local_forward(model, {}, targets.shape[1], ids)[0]


def _arguments(config: GRPOLossConfig) -> types.SimpleNamespace:
    """Return ms-swift's arguments for a configuration."""
    unsupported = [
        (config.entropy_coef, "ms-swift has no entropy term"),
        (config.use_bias_correction_kl, "ms-swift does not multiply the KL term by the ratio"),
        (config.rollout_clip_min is not None, "ms-swift's corrections have an upper bound only"),
        (
            (config.rollout_correction or "").startswith("sequence") and config.rollout_sequence_ratio == "sum",
            "ms-swift's ratio of a sequence is the geometric mean",
        ),
    ]
    for wrong, message in unsupported:
        if wrong:
            raise NotApplicable(message)
    defaults = {}
    for field in fields(GRPOConfig):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        defaults[field.name] = None if made is MISSING else made
    own = {
        "loss_type": config.loss_type,
        "importance_sampling_level": config.level,
        "epsilon": config.epsilon_low,
        "epsilon_high": config.clip_high,
        "delta": config.delta,
        "tau_pos": config.sapo_temperature_pos,
        "tau_neg": config.sapo_temperature_neg,
        "top_entropy_quantile": config.top_entropy_quantile,
        "rollout_importance_sampling_mode": config.rollout_correction,
        "rollout_importance_sampling_threshold": config.rollout_clip_max,
        "off_policy_sequence_mask_delta": config.off_policy_mask_threshold,
        "dataset_shuffle": False,
    }
    return types.SimpleNamespace(**{**defaults, **own})


class _Trainer(GRPOTrainer):
    """ms-swift's trainer with given log-probabilities."""

    def __init__(self, config: GRPOLossConfig, batch: LossBatch | None = None) -> None:
        self.args = _arguments(config)
        self._prepare_algorithm_params()
        self.beta = config.beta
        self.max_completion_length = config.max_completion_length
        self.compute_entropy = config.top_entropy_quantile < 1
        self.disable_rollout_importance_sampling = False
        self.chord_sft_iterator = self.compute_loss_func = None
        self.model_accepts_loss_kwargs = self._has_teacher = False
        self.model = types.SimpleNamespace(training=True)
        self.model_kwarg_keys: tuple[str, ...] = ()
        self.template = types.SimpleNamespace(padding_free=False, sequence_parallel_size=1)
        self.current_gradient_accumulation_steps = batch.accumulation_steps if batch else 1
        self.accelerator = types.SimpleNamespace(
            num_processes=batch.num_processes if batch else 1, gather_for_metrics=lambda values: values
        )
        self.batch = batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.batch.logps, self.batch.entropy
