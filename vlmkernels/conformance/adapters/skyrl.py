"""SkyRL: its losses, reductions and scaling of micro-batches in the FSDP worker, its advantages, and its model wrapper."""

import typing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import typing_extensions
from loguru import logger

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
from vlmkernels.conformance.foreign import stand_ins
from vlmkernels.conformance.models import captured_positions, encode, images_by_sample

with mock.patch.object(typing, "TypedDict", typing_extensions.TypedDict):  # pydantic refuses that of typing in Python 3.11
    import skyrl.tinker.types  # noqa: F401
from skyrl.backends.skyrl_train.utils.torch_utils import logprobs_from_logits  # without a stand-in for flash_attn

# Clusters, inference engines, servers, and functions for packed sequences on a GPU.
with stand_ins("ray", "vllm", "flash_attn", "func_timeout", "torchdata", "skyrl_gym", "fastapi", "uvicorn", "aiohttp"):
    import ray

    ray.is_initialized = lambda: False
    from skyrl.backends.skyrl_train.training_batch import TensorList, TrainingInputBatch
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper
    from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
    from skyrl.backends.skyrl_train.workers.worker_utils import BaseBatchIterator
    from skyrl.train.config import AlgorithmConfig
    from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
    from skyrl.train.trainer import RayPPOTrainer

logger.disable("skyrl")

# Our loss type -> SkyRL's policy loss with a ratio per token, and its reduction.
LOSSES = {
    "grpo": ("regular", "sequence_mean"),
    "bnpo": ("regular", "token_mean_legacy"),
    "dr_grpo": ("regular", "seq_mean_token_sum_norm"),
    "dapo": ("regular", "token_mean"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
}
LOSSES_FILE = "skyrl/backends/skyrl_train/utils/ppo_utils.py, line"
ESTIMATORS = {"mean": "grpo", "leave_one_out": "rloo"}
KL_BY_COMPLETIONS = ("bnpo", "dr_grpo", "dapo", "cispo")


class SkyRL(Adapter):
    name = "SkyRL"
    packages = ("skyrl", "transformers")
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
    models = ("text", "qwen2_5_vl")
    documented = (
        Documented(
            tuple(f"loss/{part}[{loss}-*-k?*]" for loss in KL_BY_COMPLETIONS for part in ("value", "gradient")),
            "The reduction is that of the policy loss; the KL term is a mean over completions, averaged over micro-batches",
            "comment in skyrl/backends/skyrl_train/workers/worker.py, line 987",
        ),
        Documented(
            ("loss/gradient[*-sequence-token_truncate]", "loss/gradient[*-sequence-token_mask]"),
            "The variant of GSPO is GSPO-token",
            f"docstring in {LOSSES_FILE} 680",
        ),
        Documented(
            ("loss/accumulation[bnpo-*]", "loss/processes[bnpo-*]"),
            "token_mean_legacy averages over micro-batches",
            f"comment in {LOSSES_FILE} 1126",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if batch.baseline == "leave_one_out" and batch.scale != "none":
            raise NotApplicable("the estimator rloo does not divide by a standard deviation")
        if batch.scale == "batch":
            raise NotApplicable("advantage_batch_normalize normalizes tokens, not completions")
        algorithm = AlgorithmConfig(advantage_estimator=ESTIMATORS[batch.baseline], grpo_norm_by_std=batch.scale == "group")
        cfg = SimpleNamespace(
            generator=SimpleNamespace(step_wise_trajectories=False), trainer=SimpleNamespace(algorithm=algorithm)
        )
        # One token per completion: SkyRL sums the rewards of the tokens, and repeats the advantage for each token.
        rewards = (batch.rewards * torch.tensor(batch.weights)).sum(1, keepdim=True)
        data = TrainingInputBatch({"rewards": rewards, "response_mask": torch.ones_like(rewards), "values": None})
        uids = np.repeat(np.arange(len(batch.group_sizes)), batch.group_sizes).tolist()
        data.metadata = {"uids": uids, "avg_response_length": 1.0}
        trainer = SimpleNamespace(cfg=cfg, all_metrics={})
        out = RayPPOTrainer.compute_advantages_and_returns(trainer, data)
        return out["advantages"].squeeze(1)

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        algorithm = _algorithm(batch, config)
        data = _mini_batch(batch)
        trainer = SimpleNamespace(algorithm=algorithm, micro_train_batch_size_per_gpu=len(batch.logps))
        normalizing = SimpleNamespace(cfg=SimpleNamespace(trainer=trainer))
        data = RayPPOTrainer._normalize_advantages(normalizing, data, [(0, data.batch_size)])
        micro = data[: len(batch.logps)]
        width = micro["loss_mask"].shape[1]
        micro.metadata = {"response_length": width}
        out: list[torch.Tensor] = []
        worker = SimpleNamespace(
            model=_Model(_widen(batch.logps, width), _widen(batch.entropy, width)),
            cfg=SimpleNamespace(algorithm=algorithm),
            policy_loss_fn=PolicyLossRegistry.get(algorithm.policy_loss_type),
            mesh_rank=SimpleNamespace(dp_size=batch.num_processes),
            strategy=SimpleNamespace(backward=lambda loss, model, optimizer: out.append(loss)),
            optimizer=None,
            scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
        )
        experience = BaseBatchIterator.batch_to_experience(micro)
        with _on_cpu():
            PolicyWorkerBase._forward_backward_micro(worker, experience, microbatch_weight=1 / batch.accumulation_steps)
        return out[0]

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        if logits.dtype != torch.float32:
            raise NeedsCUDA("in 16 bits SkyRL calls the kernel of flash-attn")
        if not len(logits):
            raise NotApplicable("a micro-batch has at least one completion")
        # As the model wrapper does, which divides its own logits in place.
        return logprobs_from_logits(logits / temperature, targets)

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        prompts = [encode(processor, [sample]) for sample in samples]  # the renderer of vLLM processes each by itself
        data, lengths = _training_input(processor, prompts, samples)
        wrapper = _wrap(model)
        width = data["response_mask"].shape[1]
        with _on_cpu():
            out = wrapper(
                data["sequences"],
                width,
                attention_mask=data["attention_mask"],
                temperature=temperature,
                pixel_values=data.get("pixel_values"),
                image_grid_thw=data.get("image_grid_thw"),
            )
        return [row[width - length :] for row, length in zip(out, lengths, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        if "image_grid_thw" not in inputs:
            raise NotApplicable("images need image_grid_thw")
        if not all(num_images):
            raise NotApplicable("SkyRL fails before, when it makes a batch of prompts with and without images")
        # SkyRL receives pixels and grids of each sample from the renderer of vLLM, and cuts lists of them.
        images = images_by_sample(inputs, num_images)
        lists = {key: TensorList([each[key] for each in images]) for key in _LISTS}
        rows = {key: value for key, value in inputs.items() if len(value) == len(num_images) and key not in _LISTS}
        chunks = TrainingInputBatch(rows | lists).chunk(len(num_images) // num_chunks)
        return [{key: _flat(value) for key, value in chunk.items()} for chunk in chunks]

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return captured_positions(_Wrapped(model), inputs)


_LISTS = ("pixel_values", "image_grid_thw")


class _Model(torch.nn.Module):
    """Returns given log-probabilities and entropies with the interface of ``HFModelWrapper``."""

    def __init__(self, logps: torch.Tensor, entropy: torch.Tensor) -> None:
        super().__init__()
        self.out = logps, {"entropy": torch.nn.functional.pad(entropy, (0, 1))}  # one position more than actions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.out


class _Wrapped:
    """A model that is called through SkyRL's wrapper."""

    def __init__(self, model: Any) -> None:
        self.wrapper, self.get_decoder = _wrap(model), model.get_decoder

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        vision = {key: inputs.get(key) for key in _LISTS}
        return self.wrapper(input_ids, 1, attention_mask=attention_mask, **vision)


def _on_cpu() -> Any:
    """The worker moves its batch to the current GPU."""
    return mock.patch.object(torch.cuda, "current_device", return_value="cpu")


def _wrap(model: Any) -> Any:
    wrapper = HFModelWrapper(model)
    wrapper.is_vlm = getattr(model.config, "vision_config", None) is not None  # the wrapper sets it if it loads the model
    return wrapper


def _flat(value: Any) -> torch.Tensor:
    return torch.cat(value.tensors) if isinstance(value, TensorList) else value


def _algorithm(batch: LossBatch, config: GRPOLossConfig) -> Any:
    """Return SkyRL's configuration of the objective."""
    loss, reduction = LOSSES[config.loss_type]
    if config.level == "sequence":
        if loss != "regular":
            raise NotApplicable(f"the loss {loss} has a ratio per token")
        loss = "gspo"
    if config.delta is not None:
        if loss != "regular":
            raise NotApplicable(f"the loss {loss} has no dual clip")
        if config.delta < 1 + config.clip_high:
            raise NotApplicable("dual clip bounds the ratio of negative advantages only")
        loss = "dual_clip"
    for name, default in (
        ("use_bias_correction_kl", False),
        ("off_policy_mask_threshold", None),
        ("top_entropy_quantile", 1.0),
    ):
        if getattr(config, name) != default:
            raise NotApplicable(f"there is no {name}")
    out = AlgorithmConfig(
        policy_loss_type=loss,
        loss_reduction=reduction,
        max_seq_len=config.max_completion_length,
        eps_clip_low=config.epsilon_low,
        eps_clip_high=config.clip_high,
        use_kl_loss=config.beta > 0,
        kl_loss_coef=config.beta,
        kl_estimator_type=config.kl_estimator,
        use_entropy_loss=config.entropy_coef > 0,
        entropy_loss_coef=config.entropy_coef,
        temperature=1.0,
    )
    out.clip_ratio_c = config.delta or out.clip_ratio_c
    out.cispo.cispo_eps_clip_low, out.cispo.cispo_eps_clip_high = 1.0, config.clip_high - 1  # offsets from 1
    out.sapo.tau_pos, out.sapo.tau_neg = config.sapo_temperature_pos, config.sapo_temperature_neg
    _correct(out.off_policy_correction, config)
    return out


def _correct(correction: Any, config: GRPOLossConfig) -> None:
    if config.rollout_correction is None:
        return
    level, action = config.rollout_correction.split("_")
    low, high = config.rollout_clip_min, config.rollout_clip_max
    high = torch.inf if high is None else high
    if level == "sequence" and config.rollout_sequence_ratio != "sum":
        raise NotApplicable("the ratio of a sequence is the product of its tokens' ratios")
    if action == "truncate" and low is not None:
        raise NotApplicable("truncation has no lower bound")
    correction.tis_ratio_type = level
    correction.token_tis_ratio_clip_high = correction.sequence_tis_ratio_clip_high = high
    if config.rollout_correction == "token_mask":
        correction.token_mask_is_threshold_low, correction.token_mask_is_threshold_high = low or 0.0, high
    if config.rollout_correction == "sequence_mask":
        correction.sequence_mask_metric = "product"
        correction.product_mask_low, correction.product_mask_high = low or 0.0, high


def _widen(x: torch.Tensor | None, width: int) -> torch.Tensor:
    return torch.zeros(1, width) if x is None else torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _mini_batch(batch: LossBatch) -> Any:
    """Return the whole batch, of which only this micro-batch has values: the reduction needs the masks of the others."""
    rows, steps = len(batch.logps), batch.accumulation_steps * batch.num_processes
    others = rows * (steps - 1)
    tokens = batch.tokens - int(batch.loss_mask.sum())
    lengths = [tokens // others + (i < tokens % others) for i in range(others)]
    width = max([batch.loss_mask.shape[1], *lengths])
    mask = torch.zeros(rows + others, width)
    mask[:rows, : batch.loss_mask.shape[1]] = batch.loss_mask
    for row, length in zip(mask[rows:], lengths, strict=True):
        row[:length] = 1

    def whole(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.cat([_widen(x, width), x.new_zeros(others, width)])

    logps = batch.logps.detach()
    return TrainingInputBatch(
        {
            "sequences": torch.zeros(rows + others, width + 1, dtype=torch.long),
            "attention_mask": torch.ones(rows + others, width + 1, dtype=torch.long),
            "advantages": whole(batch.advantages[:, None].expand_as(logps)),
            "loss_mask": mask,
            "response_mask": mask,
            "action_log_probs": whole(batch.known_old_logps),
            "base_action_log_probs": whole(batch.ref_logps),
            "rollout_logprobs": whole(batch.rollout_logps),
        }
    )


def _training_input(processor: Any, prompts: Sequence[dict[str, torch.Tensor]], samples: Sequence[Sample]) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    responses = [[*sample.completion_ids] for sample in samples]
    ones = [[1] * len(response) for response in responses]
    sequences, attention, response_mask, *_ = convert_prompts_responses_to_batch_tensors(
        tokenizer, [prompt["input_ids"][0].tolist() for prompt in prompts], responses, [[0.0] * len(r) for r in responses], ones
    )
    vision = {}
    if any("pixel_values" in prompt for prompt in prompts):
        vision = {key: TensorList([prompt.get(key) for prompt in prompts]) for key in _LISTS}
    data = TrainingInputBatch({"sequences": sequences, "attention_mask": attention, "response_mask": response_mask, **vision})
    return data, [len(response) for response in responses]
