"""verl 0.9: losses, advantages, log-probabilities of the FSDP engine, and the batches of its agent loop.

Ray, inference engines and CUDA kernels are imported by these files but not used by what runs here.
"""

import asyncio
import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
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

UNUSED = ("ray", "hydra", "cachetools", "torchdata", "wandb", "uvicorn", "fastapi")
with warnings.catch_warnings(), stand_ins(*UNUSED):
    warnings.simplefilter("ignore")  # verl warns about engines that are not installed
    from tensordict import TensorDict
    from verl.experimental.agent_loop import agent_loop, single_turn_agent_loop
    from verl.protocol import DataProto
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.utils import tensordict_utils
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.model import extract_multi_modal_inputs
    from verl.utils.tokenizer import tokenizer as verl_tokenizer
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.rollout.replica import TokenOutput
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

PROMPT_LENGTH = 1024
MIN_PIXELS = 28 * 28
NO_BOUND = 1e9  # of a ratio: verl clamps log-ratios to 20

# loss_type -> (loss_mode for each level, loss_agg_mode)
LOSSES = {
    "grpo": ({"token": "vanilla", "sequence": "gspo"}, "seq-mean-token-mean"),
    "dr_grpo": ({"token": "vanilla", "sequence": "gspo"}, "seq-mean-token-sum-norm"),
    "dapo": ({"token": "vanilla", "sequence": "gspo"}, "token-mean"),
    "luspo": ({"token": "vanilla", "sequence": "gspo"}, "seq-mean-token-sum"),
    "cispo": ({"token": "cispo"}, "token-mean"),
    "sapo": ({"token": "sapo"}, "seq-mean-token-mean"),
}
ESTIMATORS = {("group", "mean"): ("grpo", True), ("none", "mean"): ("grpo", False), ("none", "leave_one_out"): ("rloo", None)}


class Verl(Adapter):
    name = "verl"
    packages = ("verl", "tensordict", "omegaconf")
    dtypes = (torch.float32, torch.bfloat16)
    loss_types = tuple(LOSSES)
    levels = ("token", "sequence")
    kl_estimators = ("k1", "k2", "k3")
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options = {"delta": 4.0, "entropy_coef": 0.25}
    masks = ("padding", "holes")
    scales = ("group", "none")
    baselines = ("mean", "leave_one_out")
    unequal_groups = True
    advantage_eps = 1e-6
    models = ("text", "qwen2_5_vl")

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if (batch.scale, batch.baseline) not in ESTIMATORS:
            raise NotApplicable("the estimator rloo does not divide by a standard deviation")
        name, normalized = ESTIMATORS[batch.scale, batch.baseline]
        options = {} if normalized is None else {"norm_adv_by_std_in_grpo": normalized}
        rewards = torch.nn.functional.pad(batch.rewards, (1, 0))  # verl puts the reward on the last of two tokens
        uids = np.repeat([f"group {index}" for index in range(len(batch.group_sizes))], batch.group_sizes).astype(object)
        out, _ = get_adv_estimator_fn(name)(rewards, torch.ones_like(rewards), uids, **options)
        return out[:, 0]

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        rows, width = batch.loss_mask.shape
        reach = batch.loss_mask.flip(1).cummax(1).values.flip(1)  # from the first token to the last one in the loss
        data = {
            "prompts": torch.zeros(rows, 1, dtype=torch.long),
            "responses": torch.zeros(rows, width, dtype=torch.long),
            "attention_mask": torch.nn.functional.pad(reach, (1, 0), value=True).long(),
            "response_mask": batch.loss_mask.long(),
            "old_log_probs": batch.logps.detach() if batch.old_logps is None else batch.old_logps,
            "advantages": batch.advantages.unsqueeze(1) * batch.loss_mask,
        }
        if config.beta:
            data["ref_log_prob"] = batch.ref_logps
        if config.rollout_correction:
            data["rollout_is_weights"] = _rollout_weights(batch, config)
        data = TensorDict(data, batch_size=rows)
        tensordict_utils.assign_non_tensor(
            data,
            dp_size=batch.num_processes,
            batch_num_tokens=batch.tokens,
            global_batch_size=rows * batch.accumulation_steps * batch.num_processes,
        )
        outputs = {"log_probs": _packed(batch.logps, reach)}
        if config.entropy_coef:
            outputs["entropy"] = _packed(batch.entropy, reach)
        return ppo_loss(_actor_config(config), outputs, data)[0]

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        rows, width = targets.shape
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # verl computes a log-probability after the last token, too
        data = {
            "prompts": torch.zeros_like(targets[:, :1]),
            "responses": targets,
            "input_ids": torch.nn.functional.pad(targets, (1, 0)),
            "response_mask": torch.ones_like(targets),
            "attention_mask": targets.new_ones(rows, width + 1),
            "position_ids": torch.arange(width + 1).expand(rows, -1),
        }
        return _Engine(lambda **inputs: types.SimpleNamespace(logits=padded), logits.dtype).score(
            left_right_2_no_padding(TensorDict(data, batch_size=rows)), temperature
        )

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return FusedLinearForPPO()(hidden, weight, targets, temperature)[0]

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        batch = asyncio.run(_rollout(model.config, processor, samples)).to_tensordict()
        engine = _Engine(model, next(model.parameters()).dtype)
        rows = engine.score(left_right_2_no_padding(batch), temperature)
        return [row[: len(sample.completion_ids)] for row, sample in zip(rows, samples, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        # verl processes each sample by itself, so its batch has one dict of inputs of images per sample.
        vision = _by_sample(inputs, num_images)
        rows = {name: value for name, value in inputs.items() if name not in VISION}
        batch = tensordict_utils.get_tensordict({**rows, "multi_modal_inputs": vision})
        out = []
        for chunk in tensordict_utils.chunk_tensordict(batch, num_chunks):
            out.append({name: chunk[name] for name in rows} | extract_multi_modal_inputs(chunk["multi_modal_inputs"]))
        return out

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        processor = _processor(inputs_processor(model), model.config)
        raise NotImplementedError

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class _Server:
    """An inference engine that returns a given completion."""

    def __init__(self, completion_ids: Sequence[int]) -> None:
        self.completion_ids = [*completion_ids]

    async def generate(self, **request: Any) -> TokenOutput:
        return TokenOutput(token_ids=self.completion_ids)


def _bound_processor(processor: Any, config: Any) -> Any:
    """Return a copy of the processor with the methods that verl adds for positions; None for a tokenizer."""
    copied = copy.copy(processor)
    # verl 0.9.1 requires transformers < 5.11, whose processors do not count placeholders.
    copied.validate_inputs = lambda *args, **kwargs: None
    found = {"AutoProcessor": copied, "AutoConfig": config}
    with contextlib.ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(mock.patch(f"transformers.{name}.from_pretrained", return_value=value))
        return verl_tokenizer.hf_processor("")


def _worker(processor: Any, config: Any, response_length: int) -> agent_loop.AgentLoopWorker:
    worker = object.__new__(agent_loop.AgentLoopWorker)
    worker.tokenizer = copy.copy(getattr(processor, "tokenizer", processor))
    worker.processor = _bound_processor(processor, config)
    worker.rollout_config = types.SimpleNamespace(prompt_length=PROMPT_LENGTH, response_length=response_length)
    worker.mm_processor_kwargs = {}
    worker.reward_loop_worker_handles = None
    worker.distillation_enabled = False
    return worker


def _messages(sample: Sample) -> list[dict[str, Any]]:
    """Return the prompt, with the minimal size of an image. By default, qwen_vl_utils enlarges images to four tokens."""
    messages = sample.messages
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["min_pixels"] = MIN_PIXELS
    return messages


async def _rollout(config: Any, processor: Any, samples: Sequence[Sample]) -> DataProto:
    """Return verl's training batch for these prompts and completions."""
    worker = _worker(processor, config, max(len(sample.completion_ids) for sample in samples))
    trainer = types.SimpleNamespace(actor_rollout_ref=types.SimpleNamespace(rollout=worker.rollout_config))
    outputs = []
    for sample in samples:
        loop = single_turn_agent_loop.SingleTurnAgentLoop(
            trainer_config=agent_loop.DictConfigWrap(trainer),
            server_manager=_Server(sample.completion_ids),
            tokenizer=worker.tokenizer,
            processor=worker.processor,
            dataset_cls=RLHFDataset,
            data_config=agent_loop.DictConfigWrap({}),
            hf_model_type=config.model_type,
        )
        messages = _messages(sample)
        output = await loop.run({}, raw_prompt=messages)
        outputs.append(await worker._agent_loop_postprocess(output, validate=False, raw_prompt=messages))
    return worker._postprocess(outputs)


def _packed(rows: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Return a value for each token of a prompt of one token and a completion, all rows in one sequence, as verl's engine."""
    pad = torch.nn.functional.pad
    return pad(rows, (0, 1))[pad(reach, (1, 0), value=True)]


def _actor_config(config: GRPOLossConfig) -> FSDPActorConfig:
    modes, aggregation = LOSSES[config.loss_type]
    unsupported = [
        (config.level not in modes, f"verl has no {config.loss_type} with ratios per {config.level}"),
        (config.delta is not None and modes.get(config.level) != "vanilla", "only the loss vanilla bounds the ratio"),
        (config.use_bias_correction_kl, "verl does not multiply the KL term by the ratio"),
        (config.off_policy_mask_threshold is not None, "verl has no mask of off-policy sequences by the sign of the advantage"),
        (config.top_entropy_quantile < 1, "verl does not select tokens by their entropy"),
    ]
    for wrong, message in unsupported:
        if wrong:
            raise NotApplicable(message)
    # cispo: our bound is that of the ratio itself, and there is none from below.
    low, high = (1.0, config.clip_high - 1) if config.loss_type == "cispo" else (config.epsilon_low, config.clip_high)
    return FSDPActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=modes[config.level]),
        loss_agg_mode=aggregation,
        loss_scale_factor=config.max_completion_length,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=NO_BOUND if config.delta is None else config.delta,
        tau_pos=config.sapo_temperature_pos,
        tau_neg=config.sapo_temperature_neg,
        use_kl_loss=config.beta > 0,
        kl_loss_coef=config.beta,
        kl_loss_type=config.kl_estimator,
        entropy_coeff=config.entropy_coef,
    )


def _rollout_weights(batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
    level, bound = config.rollout_correction.split("_")
    low, high = config.rollout_clip_min, config.rollout_clip_max
    if config.rollout_sequence_ratio == "mean" and level == "sequence":
        raise NotApplicable("verl's ratio of a sequence is a product")
    if high is None or (bound == "truncate") != (low is None):
        raise NotApplicable("verl truncates at an upper bound, and masks outside of a lower and an upper bound")
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=batch.logps.detach() if batch.old_logps is None else batch.old_logps,
        rollout_log_prob=batch.rollout_logps,
        response_mask=batch.loss_mask.long(),
        rollout_is=level,
        rollout_is_threshold=high if bound == "truncate" else f"{low}_{high}",
    )
    return weights.batch["rollout_is_weights"]


class _Engine(transformer_impl.FSDPEngineWithLMHead):
    """verl's engine, without FSDP and padding-free attention, around a model on the CPU."""

    def __init__(self, module: Callable[..., Any], dtype: torch.dtype) -> None:
        self.module = module
        self._autocast_dtype = dtype
        self.use_ulysses_sp = self.pad_to_length = False

    def get_data_parallel_group(self) -> None:
        return None

    def score(self, data: TensorDict, temperature: float) -> torch.Tensor:
        """Return the log-probabilities of the responses, padded."""
        results = []

        def keep(model_output, data, dp_group):
            results.append(model_output["log_probs"])
            return torch.zeros(()), {}

        tensordict_utils.assign_non_tensor(data, temperature=temperature, use_remove_padding=False, use_fused_kernels=False)
        on_cpu = {"get_device_id": lambda: "cpu", "get_device_name": lambda: "cpu"}
        with mock.patch.multiple(transformer_impl, **on_cpu):
            self.forward_step(data, keep, forward_only=False)
        return no_padding_2_padding(results[0], data)
