"""OpenRLHF 0.11: the training step of its actor, its advantages, its actor's forward pass, and its single-turn agent.

Batches are padded: packing needs flash attention. ``positions`` is missing because the model computes them for models with
images, and ``sample`` because OpenRLHF samples with vLLM. An inference engine returns the given completions.
"""

import asyncio
import copy
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vlmkernels.conformance import (
    Adapter,
    AdvantageBatch,
    Documented,
    GRPOLossConfig,
    LossBatch,
    NotApplicable,
    Sample,
)
from vlmkernels.conformance.foreign import stand_ins
from vlmkernels.conformance.models import images_by_sample, tiny

with stand_ins("ray", "vllm", "deepspeed", "flash_attn", "pylatexenc", "aiohttp", "torchdata"):
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import PolicyLoss
    from openrlhf.models.utils import log_probs_from_logits
    from openrlhf.trainer.ppo_utils.experience import (
        Experience,
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from openrlhf.utils.loss_utils import _optimizer_step_loss_norm
    from openrlhf.utils.vlm_utils import merge_mm_train_inputs

# (loss_type, level) -> (loss_agg_mode, policy_loss_type)
LOSSES = {
    ("grpo", "token"): ("seq-mean-token-mean", "ppo"),
    ("dapo", "token"): ("token-mean", "ppo"),
    ("grpo", "sequence"): ("seq-mean-token-mean", "gspo"),
}
ESTIMATORS = {("group", "mean"): "group_norm", ("none", "mean"): "dr_grpo", ("none", "leave_one_out"): "rloo"}
MAX_LENGTH = 2048
CLIP_RANGE = (-1e9, 1e9)  # that of advantages; by default (-10, 10)


class OpenRLHF(Adapter):
    name = "OpenRLHF"
    packages = ("openrlhf", "transformers")
    dtypes = (torch.float32,)  # the actor converts logits to fp32
    loss_types = ("grpo", "dapo")
    levels = ("token", "sequence")
    kl_estimators = ("k1", "k2", "k3")
    corrections = ("token_truncate", "token_mask")
    options: ClassVar = {"delta": 4.0, "entropy_coef": 0.25, "rollout_clip_min": 0.5}
    masks = ("padding", "holes")
    scales = ("group", "none")
    baselines = ("mean", "leave_one_out")
    advantage_eps = 1e-9
    models = ("text", "qwen2_5_vl")
    documented = (
        Documented(
            ("loss/value[grpo-*-k?*]", "loss/gradient[grpo-*-k?*]"),
            "loss_agg_mode is the aggregation of the policy loss; the KL term is averaged over all tokens",
            "help of --actor.loss_agg_mode, openrlhf/cli/train_ppo_ray.py",
        ),
        Documented(
            "loss/empty[grpo-*-one_empty_sequence]",
            "completions without tokens do not count in the number of completions",
            "docstring of _optimizer_step_loss_norm, openrlhf/utils/loss_utils.py",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if (batch.scale, batch.baseline) not in ESTIMATORS:
            raise NotApplicable("the estimator rloo does not divide by a standard deviation")
        size = batch.group_sizes[0]
        if size == 1:
            raise NotApplicable("OpenRLHF's estimators with a baseline require n_samples_per_prompt > 1")
        maker = object.__new__(RemoteExperienceMaker)
        maker.advantage_estimator = ESTIMATORS[batch.scale, batch.baseline]
        maker.strategy = types.SimpleNamespace(
            args=_namespace(
                {
                    "algo.advantage": {"estimator": maker.advantage_estimator, "gamma": 1.0},
                    "rollout": {"n_samples_per_prompt": size, "max_new_tokens": 1},
                    "reward": {"clip_range": CLIP_RANGE, "overlong_buffer_len": None, "stop_properly_penalty_coef": None},
                }
            )
        )
        maker.kl_ctl = types.SimpleNamespace(value=0.0)
        rows = len(batch.rewards)
        experience = Experience(
            rewards=batch.rewards[:, 0].clone(),
            index=[*range(rows)],
            action_mask=torch.ones(rows, 1, dtype=torch.long),
            kl=torch.zeros(rows, 1),
        )
        return maker.compute_advantages_and_returns([experience])[0].advantages[:, 0]

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        trainer = _trainer(config)
        losses: list[torch.Tensor] = []
        trainer.strategy = types.SimpleNamespace(
            ring_attn_group=None,
            backward=lambda loss, *_: losses.append(loss),
            optimizer_step=lambda *_, **__: None,
            get_grad_norm=lambda _: 0.0,
        )
        trainer.actor = _GivenActor(batch)
        trainer.actor_scheduler = types.SimpleNamespace(get_last_lr=lambda: [0.0])
        rows, width = batch.loss_mask.shape
        mask = batch.loss_mask.long()
        experience = Experience(
            sequences=torch.zeros(rows, width + 1, dtype=torch.long),
            attention_mask=torch.ones(rows, width + 1, dtype=torch.long),
            action_mask=mask,
            action_log_probs=batch.known_old_logps,
            base_action_log_probs=batch.ref_logps,
            rollout_log_probs=batch.rollout_logps,
            advantages=batch.advantages.unsqueeze(1).expand(rows, width),
        )
        trainer.training_step(experience, config.beta, 0, _batch_info(batch, mask))
        return losses[0] / batch.accumulation_steps  # as DeepSpeed

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return log_probs_from_logits(logits.clone(), targets, temperature)  # a clone: it divides its argument in place

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        rollouts = [_rollout(processor, sample) for sample in samples]
        pad = getattr(processor, "tokenizer", processor).pad_token_id
        items = remove_padding_in_sequences(split_experience_batch(Experience.concat_experiences(rollouts, pad)))
        batch = make_experience_batch(items)
        images = merge_mm_train_inputs(batch.mm_train_inputs, "cpu")
        rows = _actor(model, temperature)(batch.sequences, batch.action_mask, batch.attention_mask, **images)
        return [row[mask.bool()] for row, mask in zip(rows, batch.action_mask, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        whole = Experience(
            sequences=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_train_inputs=[images or None for images in images_by_sample(inputs, num_images)],
        )
        items = split_experience_batch(whole)
        size = len(items) // num_chunks
        chunks = [make_experience_batch(items[start : start + size]) for start in range(0, len(items), size)]
        return [_model_inputs(chunk, inputs) for chunk in chunks]

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        rollouts = [_rollout(processor, Sample(sample.text, sample.images)) for sample in samples]
        pad = getattr(processor, "tokenizer", processor).pad_token_id
        batch = Experience.concat_experiences(rollouts, pad)
        tokens = {"input_ids": batch.sequences, "attention_mask": batch.attention_mask}
        return tokens | merge_mm_train_inputs(batch.mm_train_inputs, "cpu")


def _namespace(settings: dict[str, Any]) -> types.SimpleNamespace:
    """Return arguments with dotted names as nested namespaces, as OpenRLHF's parser does."""
    root = types.SimpleNamespace()
    for path, values in settings.items():
        node = root
        for part in path.split("."):
            if not hasattr(node, part):
                setattr(node, part, types.SimpleNamespace())
            node = getattr(node, part)
        vars(node).update(values)
    return root


def _trainer(config: GRPOLossConfig) -> ActorPPOTrainer:
    """Return the trainer of the actor, without its constructor, which needs Ray."""
    if (config.loss_type, config.level) not in LOSSES:
        raise NotApplicable("OpenRLHF's gspo averages over completions")
    aggregation, policy_loss = LOSSES[config.loss_type, config.level]
    low, high = config.rollout_clip_min, config.rollout_clip_max
    unsupported = [
        (config.use_bias_correction_kl, "OpenRLHF does not multiply the KL term by the ratio"),
        (config.top_entropy_quantile < 1, "OpenRLHF does not select tokens by their entropy"),
        (config.off_policy_mask_threshold is not None, "OpenRLHF has no mask of off-policy sequences"),
        (config.rollout_correction and policy_loss == "gspo", "gspo takes the ratio to the sampler instead of a correction"),
        (config.rollout_correction and high is None, "OpenRLHF's corrections have an upper bound"),
        (
            config.delta is not None and config.delta < 1 + config.clip_high,
            "dual_clip bounds the ratio for negative advantages only",
        ),
    ]
    for wrong, message in unsupported:
        if wrong:
            raise NotApplicable(message)
    trainer = object.__new__(ActorPPOTrainer)
    trainer.args = _namespace(
        {
            "actor": {"entropy_coef": config.entropy_coef or None},
            "algo.kl": {
                "use_loss": config.beta > 0,
                "init_coef": config.beta,
                "estimator": config.kl_estimator,
                "unbiased_gradient": False,
            },
            "train": {"dynamic_batch_enable": False},
        }
    )
    trainer.aux_loss = trainer.ema_model = trainer.actor_optim = None
    modes = {"truncate": "clip", "mask": "mask"}
    trainer.actor_loss_fn = PolicyLoss(
        clip_eps_low=config.epsilon_low,
        clip_eps_high=config.clip_high,
        dual_clip=config.delta,
        token_level_loss=aggregation == "token-mean",
        policy_loss_type=policy_loss,
        is_correction_level="token" if config.rollout_correction else "off",
        is_correction_mode=modes[(config.rollout_correction or "token_mask").split("_")[1]],
        is_correction_threshold=[low or 0.0, high],
    )
    return trainer


def _batch_info(batch: LossBatch, mask: torch.Tensor) -> dict[str, Any]:
    """Return what OpenRLHF gathers over the micro-batches of a step; those of others have no completion without tokens."""
    steps, processes = batch.accumulation_steps, batch.num_processes
    own = _optimizer_step_loss_norm([mask], None, processes, steps)
    others = len(mask) * (steps * processes - 1)
    return own | {
        "batch_num_tokens": torch.tensor(batch.tokens / steps),
        "global_batch_size": own["global_batch_size"] + others / steps,
    }


class _GivenActor:
    """An actor with given log-probabilities and entropies."""

    def __init__(self, batch: LossBatch) -> None:
        self.batch = batch

    def train(self) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, types.SimpleNamespace]:
        return self.batch.logps, types.SimpleNamespace(entropy=self.batch.entropy)


def _actor(model: Any, temperature: float) -> Actor:
    actor = Actor(model, temperature=temperature)
    # What the constructor sets for a model that it loads.
    actor.packing_samples = False
    actor.is_vlm = hasattr(model.config, "vision_config")
    actor._vlm_config = model.config
    return actor


class _Recorder:
    """A model that keeps its inputs."""

    config = tiny("qwen2_5_vl")[0].config

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        self.inputs = {"input_ids": input_ids, **inputs}
        return {"logits": torch.zeros(*input_ids.shape, 1)}


def _model_inputs(chunk: Experience, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs that the actor passes to the model for a micro-batch; it adds the types of tokens."""
    recorder = _Recorder()
    images = merge_mm_train_inputs(chunk.mm_train_inputs, "cpu")
    _actor(recorder, 1.0)(chunk.sequences, attention_mask=chunk.attention_mask, return_output=True, **images)
    return {name: value for name, value in recorder.inputs.items() if name in inputs}


class _Engine:
    """An inference engine that returns a given completion."""

    def __init__(self, completion_ids: Sequence[int]) -> None:
        output = types.SimpleNamespace(token_ids=[*completion_ids], finish_reason="stop", logprobs=None)
        self.request = types.SimpleNamespace(outputs=[output])

    async def generate(self, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
        return self.request


def _rollout(processor: Any, sample: Sample) -> Experience:
    """Return OpenRLHF's experience of a prompt and a completion."""
    tokenizer = copy.copy(processor)
    prompt = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
    executor = SingleTurnAgentExecutor()
    sampling = types.SimpleNamespace(max_tokens=max(1, len(sample.completion_ids)), logprobs=None)
    images = sample.pictures or None
    engine = _Engine(sample.completion_ids)
    response = asyncio.run(executor.execute(prompt, "", sampling, MAX_LENGTH, tokenizer, engine, images=images))
    return SamplesGenerator._process_response_into_experience(None, response, max_len=MAX_LENGTH)
