"""verl 0.9: its losses, advantages, FSDP engine on the CPU, and agent loop with an engine that returns given completions.

``loss`` is ``ppo_loss`` of the actor; log-probabilities are those of ``FSDPEngineWithLMHead.forward_step`` without
``use_remove_padding``, which needs flash attention. verl's patches of models, for sequence parallelism and fused kernels, are
not applied: they need transformers < 5.11. ``sample`` is missing because verl samples with vLLM or SGLang.
"""

import asyncio
import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import transformers

from vlmkernels.conformance import (
    Adapter,
    AdvantageBatch,
    Documented,
    GRPOLossConfig,
    LossBatch,
    NeedsCUDA,
    NotApplicable,
    Sample,
)
from vlmkernels.conformance.foreign import restored, stand_ins
from vlmkernels.conformance.models import images_by_sample

UNUSED = ("ray", "hydra", "cachetools", "torchdata", "wandb", "uvicorn", "fastapi")
with warnings.catch_warnings(), restored(), stand_ins(*UNUSED):
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
    options: ClassVar = {"delta": 4.0, "entropy_coef": 0.25}
    masks = ("padding", "holes")
    scales = ("group", "none")
    baselines = ("mean", "leave_one_out")
    unequal_groups = True
    advantage_eps = 1e-6
    models = ("text", "qwen2_5_vl")  # verl refuses processors that it does not know, as LLaVA's
    documented = (
        Documented(
            "loss/gradient[*-sequence-token_*]",
            "with the ratio sg[s] pi / sg[pi] of GSPO-token, the correction of a token weights the gradient of this token",
            "comment in compute_policy_loss_gspo, verl/trainer/ppo/core_algos.py; arXiv 2507.18071, section 4.3",
        ),
        Documented(
            "advantages/group_of_one[*-mean]",
            "the mean of a group of one is 0, so that its reward is the advantage",
            "docstring of verl/utils/groupwise.py",
        ),
    )

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
        actor = _actor_config(config)
        rows, width = batch.loss_mask.shape
        reach = batch.loss_mask.flip(1).cummax(1).values.flip(1)  # from the first token to the last one in the loss
        data = {
            "prompts": torch.zeros(rows, 1, dtype=torch.long),
            "responses": torch.zeros(rows, width, dtype=torch.long),
            "attention_mask": torch.nn.functional.pad(reach, (1, 0), value=True).long(),
            "response_mask": batch.loss_mask.long(),
            "old_log_probs": batch.known_old_logps,
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
        return ppo_loss(actor, outputs, data)[0]

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        _require_samples(targets)
        if logits.dtype != torch.float32 and logits.device.type == "cpu":
            raise NeedsCUDA("verl relies on autocast, which computes log_softmax in fp32 on a GPU but not on the CPU")
        rows, width = targets.shape
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # verl computes a log-probability after the last token, too
        data = {
            "prompts": targets.new_zeros(rows, 1),
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
        _require_samples(targets)
        return FusedLinearForPPO()(hidden, weight, targets, temperature)[0]

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        batch = asyncio.run(_training_batch(model.config, processor, samples)).to_tensordict()
        engine = _Engine(model, next(model.parameters()).dtype)
        rows = engine.score(left_right_2_no_padding(batch), temperature)
        return [row[: len(sample.completion_ids)] for row, sample in zip(rows, samples, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        rows = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")}
        batch = tensordict_utils.get_tensordict({**rows, "multi_modal_inputs": images_by_sample(inputs, num_images)})
        out = []
        for chunk in tensordict_utils.chunk_tensordict(batch, num_chunks):
            out.append({name: chunk[name] for name in rows} | extract_multi_modal_inputs(chunk["multi_modal_inputs"]))
        return out

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        worker = _worker(_processor_of(model.config), model.config)
        starts = inputs["input_ids"] == getattr(model.config, "vision_start_token_id", -1)
        images = images_by_sample(inputs, starts.sum(1).tolist())
        out = []
        for row, own in enumerate(images):
            kinds = {"mm_token_type_ids": inputs["mm_token_type_ids"]} if "mm_token_type_ids" in inputs else {}
            tokens = [inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")]
            out.append(worker._compute_position_ids(*tokens, {**own, **kinds}))
        return torch.cat(out).movedim(0, -2)

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        kind = "qwen2_5_vl" if hasattr(processor, "image_processor") else "qwen2"
        worker = _worker(processor, types.SimpleNamespace(model_type=kind))
        rows, images = [], []
        for output in asyncio.run(_agent_loops(worker, kind, samples)):
            width = {"max_length": PROMPT_LENGTH, "padding_side": "left", "return_attention_mask": True}
            rows.append(worker._pad_token_ids(output.prompt_ids, **width))
            images.append(worker._compute_multi_modal_inputs(output, rows[-1]["input_ids"]))
        tokens = {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
        return tokens | extract_multi_modal_inputs(images)


def _processor_of(config: Any) -> Any:
    """Return what verl reads of a processor for position ids; None for a model without images."""
    if not hasattr(config, "image_token_id"):
        return None
    processor = object.__new__(transformers.Qwen2_5_VLProcessor)
    processor.image_processor = None
    processor.image_token_id, processor.video_token_id = config.image_token_id, config.video_token_id
    return processor


class _Server:
    """An inference engine that returns a given completion."""

    def __init__(self, completion_ids: Sequence[int]) -> None:
        self.completion_ids = [*completion_ids]

    async def generate(self, **request: Any) -> TokenOutput:
        return TokenOutput(token_ids=self.completion_ids)


def _bound_processor(processor: Any, config: Any) -> Any:
    """Return a copy of the processor with the methods that verl adds for positions; None for a tokenizer."""
    if not hasattr(processor, "image_processor"):
        return None
    copied = copy.copy(processor)
    # verl 0.9.1 requires transformers < 5.11, whose processors do not count placeholders.
    copied.validate_inputs = lambda *args, **kwargs: None
    found = {"AutoProcessor": copied, "AutoConfig": config}
    with contextlib.ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(mock.patch(f"transformers.{name}.from_pretrained", return_value=value))
        return verl_tokenizer.hf_processor("")


def _worker(processor: Any, config: Any) -> agent_loop.AgentLoopWorker:
    worker = object.__new__(agent_loop.AgentLoopWorker)
    worker.tokenizer = copy.copy(getattr(processor, "tokenizer", processor))
    worker.processor = _bound_processor(processor, config)
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


async def _agent_loops(worker: agent_loop.AgentLoopWorker, model_type: str, samples: Sequence[Sample]) -> list[Any]:
    """Return the outputs of verl's agent loop, whose engine returns the completions."""
    longest = max(len(sample.completion_ids) for sample in samples)
    worker.rollout_config = types.SimpleNamespace(prompt_length=PROMPT_LENGTH, response_length=longest)
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
            hf_model_type=model_type,
        )
        outputs.append(await loop.run({}, raw_prompt=_messages(sample)))
    return outputs


async def _training_batch(config: Any, processor: Any, samples: Sequence[Sample]) -> DataProto:
    worker = _worker(processor, config)
    outputs = await _agent_loops(worker, config.model_type, samples)
    return worker._postprocess([await worker._agent_loop_postprocess(each, False, raw_prompt=None) for each in outputs])


def _require_samples(targets: torch.Tensor) -> None:
    if not len(targets):
        raise NotApplicable("verl has no batch without samples")


def _packed(rows: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Return a value for each token of a prompt of one token and a completion, all rows in one sequence, as verl's engine."""
    pad = torch.nn.functional.pad
    return pad(rows, (0, 1))[pad(reach, (1, 0), value=True)]


def _actor_config(config: GRPOLossConfig) -> FSDPActorConfig:
    modes, aggregation = LOSSES[config.loss_type]
    unsupported = [
        (config.level not in modes, f"verl has no {config.loss_type} with ratios per {config.level}"),
        (config.delta is not None and modes.get(config.level) != "vanilla", "only the loss vanilla bounds the ratio"),
        (
            config.delta is not None and config.delta < 1 + config.clip_high,
            "clip_ratio_c bounds the ratio for negative advantages only",
        ),
        (config.entropy_coef and aggregation != "token-mean", "verl averages the entropy over tokens with token-mean only"),
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
    if high is None or (bound == "truncate" and low is not None):
        raise NotApplicable("verl truncates at an upper bound, and masks outside of a lower and an upper bound")
    weights, _, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=batch.known_old_logps,
        rollout_log_prob=batch.rollout_logps,
        response_mask=batch.loss_mask.long(),
        rollout_is=level,
        rollout_is_threshold=high if bound == "truncate" else f"{low or 1 / NO_BOUND}_{high}",
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
