"""ms-swift 4.6: ``GRPOTrainer`` (without Liger, padded batches), its templates and its collator.

The methods of the trainer run on a trainer whose constructor did not run: it has the parameters of the algorithm, no model and
no data. Packages of datasets and servers are imported but not used. ``split`` is missing because ms-swift encodes each
micro-batch from its samples, and ``sample`` because it samples with its inference engines.
"""

import contextlib
import copy
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any, ClassVar

import torch

from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, NotApplicable, Sample
from vlmkernels.conformance.foreign import restored, stand_ins

UNUSED = ("cryptography", "aiohttp", "dacite", "msgspec", "trl.experimental.ppo")
CHANGED = ("trl.trainer.grpo_trainer", "transformers.trainer", "peft", "datasets")
with restored(*CHANGED), stand_ins(*UNUSED):
    from swift.rl_core.advantage import compute_advantages, compute_advantages_dynamic, expand_advantage_to_per_token
    from swift.rl_core.data import GRPOBatch, GRPOSample
    from swift.rlhf_trainers.arguments import GRPOConfig
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
    from swift.rlhf_trainers.utils import collate_to_grpo_micro_batch, encode_sample
    from swift.template import TEMPLATE_MAPPING, Template, get_template

DOCS = "https://swift.readthedocs.io/en/latest"
MIN_PIXELS = 28 * 28
ESTIMATORS = {"mean": "grpo", "leave_one_out": "rloo"}


class MsSwift(Adapter):
    name = "ms-swift"
    packages = ("ms-swift", "trl", "transformers")
    dtypes = (torch.float32,)  # accelerate converts the logits of a bf16 model to fp32
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
    models = ("text", "qwen2_5_vl")
    documented = (
        Documented(
            ("loss/accumulation[bnpo*]", "loss/processes[bnpo*]"),
            "bnpo averages over the tokens of the batch of one process",
            f"{DOCS}/Instruction/GRPO/DeveloperGuide/loss_types.html",
        ),
        Documented(
            ("loss/value[bnpo-*-off_policy_mask_threshold*]", "loss/gradient[bnpo-*-off_policy_mask_threshold*]"),
            "off-policy sequences are filtered out, so that their tokens do not count in the average",
            "docstring of _compute_off_policy_sequence_mask, swift/rlhf_trainers/grpo_trainer.py",
        ),
        Documented(
            ("loss/value[*-off_policy_mask_threshold*-k3]", "loss/gradient[*-off_policy_mask_threshold*-k3]"),
            "an off-policy sequence is masked out from loss computation, the KL term included",
            f"{DOCS}/Megatron-SWIFT/Command-line-parameters.html",
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

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        template = _template(processor, model.config)
        template.model = model
        items = [_sample(sample) for sample in samples]
        for item in items:
            item.encoded = encode_sample(item, template)
        inputs, data = collate_to_grpo_micro_batch(items, template, device=torch.device("cpu"), use_logits_to_keep=True)
        del inputs["labels"]
        trainer = _Trainer(GRPOLossConfig())
        trainer.temperature, trainer.template = temperature, template
        with _hooks(template, model):
            rows, _ = trainer._get_per_token_logps_and_entropies_single(model, inputs, data)
        return [row[mask] for row, mask in zip(rows, data.completion_mask, strict=True)]

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if not hasattr(model.config, "vision_config"):
            raise NotApplicable("ms-swift leaves the position ids of text models to the model")
        template = object.__new__(TEMPLATE_MAPPING["qwen2_5_vl"].template_cls)
        template.model, template.dummy_model = model, None
        return template._get_position_ids(inputs)["position_ids"]

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        template = _template(processor)
        template.model = types.SimpleNamespace(get_rope_index=_no_positions)
        encoded = [encode_sample(_sample(sample), template, encode_prompt_only=True) for sample in samples]
        return template.data_collator(encoded)


def _template(processor: Any, config: Any = None) -> Template:
    """Return ms-swift's template for a processor, with the ids of this tokenizer and without a system prompt."""
    kind = "qwen2_5_vl" if hasattr(processor, "image_processor") else "qwen2_5"
    processor = copy.copy(processor)
    processor.model_info = types.SimpleNamespace(config=config, task_type="causal_lm", max_model_len=2048, model_dir="")
    processor.model_meta = types.SimpleNamespace(is_multimodal=kind == "qwen2_5_vl", template=kind)
    template = get_template(processor, default_system="")
    template.image_token_id = getattr(processor, "image_token_id", None)
    template.set_mode("train")
    return template


def _no_positions(input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Stand in for the positions of a model, which the collator adds to the inputs."""
    return torch.zeros(3, *input_ids.shape, dtype=torch.long), None


def _sample(sample: Sample) -> GRPOSample:
    messages = [
        {"role": "user", "content": "<image>" * len(sample.images) + sample.text},
        {"role": "assistant", "content": ""},
    ]
    # By default, qwen_vl_utils enlarges images to four tokens.
    settings = {"chat_template_kwargs": {"min_pixels": MIN_PIXELS}}
    return GRPOSample(messages=messages, images=sample.pictures, response_token_ids=[[*sample.completion_ids]], extra=settings)


@contextlib.contextmanager
def _hooks(template: Template, model: Any) -> Iterator[None]:
    """Within the block, the model has ms-swift's hook, which embeds images."""
    if not hasattr(model.config, "vision_config"):
        yield
        return
    # ms-swift 4.6 requires transformers < 5.20, where the vision tower is an attribute of the model.
    object.__setattr__(model, "visual", model.model.visual)
    template.register_post_encode_hook([model])
    try:
        yield
    finally:
        template.remove_post_encode_hook()
        object.__delattr__(model, "visual")


def _arguments(config: GRPOLossConfig) -> types.SimpleNamespace:
    """Return ms-swift's arguments for a configuration."""
    unsupported = [
        (config.entropy_coef, "ms-swift has no entropy term"),
        (config.use_bias_correction_kl, "ms-swift does not multiply the KL term by the ratio"),
        (config.rollout_clip_min is not None, "ms-swift's corrections have an upper bound only"),
        # Each is a choice: a correction of the samples' distribution applies to the KL term as well; TRL leaves it out.
        (config.rollout_correction and config.beta, "ms-swift's corrections also weight the KL term; the reference's do not"),
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
