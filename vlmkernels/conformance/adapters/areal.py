"""AReaL: its losses, advantages and scaling of micro-batches in the FSDP engine, and the packs with which it runs models."""

import io
import logging
import os
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch

import vlmkernels.integrations.transformers  # noqa: F401  registers the attention "vlmkernels", which takes packed sequences
from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, NotApplicable, Sample
from vlmkernels.conformance.foreign import stand_ins
from vlmkernels.conformance.models import encode

# Clusters, inference engines, servers, trackers, the command line, and Megatron.
_UNUSED = (
    *("ray", "uvloop", "sglang", "aiohttp", "aiofiles", "fastapi", "uvicorn", "flask", "zmq", "redis", "awex", "litellm"),
    *("anthropic", "megatron", "mbridge", "torch_memory_saver", "hydra", "torchdata", "pynvml", "numba", "pybase64", "blosc"),
    *("h5py", "pebble", "pylatexenc", "math_verify", "swanlab", "swanboard", "trackio", "tensorboardX", "wandb", "msgspec"),
)
with (
    stand_ins(*_UNUSED),
    mock.patch.dict(os.environ),
    # AReaL replaces the root of all loggers when it makes one, and prints its log.
    mock.patch.object(logging.Logger, "root", logging.root),
    mock.patch.object(logging.Logger, "manager", logging.Logger.manager),
    redirect_stdout(io.StringIO()),
):
    from areal.api.cli_args import MicroBatchSpec, NormConfig, PPOActorConfig, RejectionSamplingConfig
    from areal.engine.core import train_engine
    from areal.engine.fsdp_engine import FSDPEngine, FSDPTrainContext
    from areal.trainer.ppo import actor as ppo_actor
    from areal.utils import stats_tracker
    from areal.utils.data import concat_batch, pack_tensor_dict
    from areal.utils.functional import gather_logprobs

ppo_actor.logger.setLevel(logging.ERROR)
LEVELS = {"group": "group", "batch": "batch", "none": None}


class AReaL(Adapter):
    name = "AReaL"
    packages = ("areal", "transformers")
    dtypes = (torch.float32, torch.bfloat16)
    loss_types = ("dapo", "sapo")
    levels = ("token", "sequence")
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options: ClassVar = {"delta": 4.0, "rollout_sequence_ratio": "mean"}
    masks = ("padding", "holes", "nonfinite")
    scales = ("group", "batch", "none")
    baselines = ("mean", "leave_one_out")
    advantage_eps = 1e-5
    models = ("text", "qwen2_5_vl")
    documented = (
        Documented(
            ("loss/value[dapo-sequence-token_mask]", "loss/gradient[dapo-sequence-token_mask]"),
            "Rejected tokens leave the loss mask before the ratio of the sequence",
            "areal/utils/functional/functional.py, docstring of ppo_actor_loss_fn",
        ),
        Documented(
            ("loss/value[sapo-*]", "loss/gradient[sapo-*]", "loss/long[sapo-*]", "loss/empty[sapo-*-one_empty_sequence]"),
            "The loss is a mean over tokens: AReaL does not normalize by length",
            "https://github.com/areal-project/AReaL, docs/en/algorithms/grpo_series.md, SAPO",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if batch.baseline == "leave_one_out" and batch.scale != "none":
            raise NotApplicable("the deviations are those from the means of the others")
        norm = NormConfig(
            mean_level="group",
            mean_leave1out=batch.baseline == "leave_one_out",
            std_level=LEVELS[batch.scale],
            group_size=batch.group_sizes[0],
        )
        actor = ppo_actor.PPOActor(_config(reward_norm=norm, reward_clip=torch.inf, kl_ctl=0.0), engine=None)
        # One token of the prompt and one of the completion.
        rewards = (batch.rewards * torch.tensor(batch.weights)).sum(1)
        rows = torch.ones(len(rewards), 2)
        data = {
            "input_ids": rows.long(),
            "attention_mask": rows.bool(),
            "loss_mask": torch.tensor([0, 1]).expand(len(rewards), -1),
            "logprobs": 0 * rows,
            "rewards": rewards,
        }
        return actor._compute_advantages(data)["advantages"][:, 0]

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        if batch.logps.dtype != torch.float32:
            raise NotApplicable("log-probabilities are in fp32 in every mode")
        if not batch.tokens:
            raise NotApplicable("the engine refuses a batch without a token in the loss")
        stats_tracker.DEFAULT_TRACKER.__init__()  # without the statistics of batches of other shapes
        out: list[torch.Tensor] = []

        def train_batch(data: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
            out.append(_micro_batch_loss(batch, data, loss_fn, loss_weight_fn))
            return {}

        engine = SimpleNamespace(train=lambda: None, get_version=lambda: 1, train_batch=train_batch)
        ppo_actor.PPOActor(_settings(config), engine)._ppo_update(_trajectories(batch))
        return out[0]

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        if not targets.numel():
            raise NotApplicable("a pack has at least one token")
        with torch.compiler.set_stance("force_eager"):
            return gather_logprobs(logits.flatten(0, 1), targets.flatten(), temperature).view_as(targets)

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        if hasattr(model.config, "vision_config"):
            raise NotApplicable("AReaL 1.0.4 passes images to transformers up to 5.3: later vision towers read cu_seqlens")
        engine = _engine(model, temperature)
        out: list[torch.Tensor] = []

        def process_output(logits: torch.Tensor, context: dict[str, Any]) -> None:
            with torch.compiler.set_stance("force_eager"):
                result, _ = engine._compute_logprobs_entropy(logits, context["model_inputs"])
            out.append(result)

        data = _batch(processor, samples)
        lengths = data["attention_mask"].sum(1).tolist()
        with _one_process():
            micro_batches = engine._prepare_mb_list(data)
            engine.forward_backward_batch(micro_batches, process_output, forward_only=True)
        (pack,) = out  # all samples in one pack, in order
        rows = pack[: sum(lengths)].split(lengths)
        return [row[len(row) - len(sample.completion_ids) - 1 : -1] for row, sample in zip(rows, samples, strict=True)]

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if inputs["attention_mask"][:, 0].min() == 0:
            raise NotApplicable("batches are padded on the right")
        if hasattr(model.config, "vision_config") and "pixel_values" not in inputs:
            raise NotApplicable("the workflow for vision-language models needs images in each prompt")
        engine = _engine(model, 1.0)
        vision = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        data = {key: value for key, value in inputs.items() if key not in vision} | {"multi_modal_input": [vision]}
        data["multi_modal_input"] += [{} for _ in inputs["input_ids"][1:]]  # only the concatenation of the list is used
        with _one_process():
            (micro,) = engine._prepare_mb_list(data).padded_mbs
        lengths = inputs["attention_mask"].sum(1).tolist()
        positions = micro["position_ids"][..., : sum(lengths)]
        rows = positions.reshape(-1, sum(lengths)).split(lengths, dim=1)
        padded = torch.stack([torch.nn.functional.pad(row, (0, max(lengths) - row.shape[1])) for row in rows], dim=1)
        return padded if len(padded) > 1 else padded[0]


def _config(**settings: Any) -> Any:
    return PPOActorConfig(experiment_name="", trial_name="", path="", ppo_n_minibatches=1, **settings)


def _settings(config: GRPOLossConfig) -> Any:
    """Return AReaL's configuration of the objective."""
    if config.beta or config.entropy_coef or config.top_entropy_quantile < 1 or config.off_policy_mask_threshold is not None:
        raise NotApplicable("the loss has only a policy term")
    is_sapo = config.loss_type == "sapo"
    if is_sapo and (config.rollout_correction or config.delta):
        raise NotApplicable("SAPO has neither a dual clip nor corrections")
    if config.delta is not None and config.delta < 1 + config.clip_high:
        raise NotApplicable("dual clip bounds the ratio of negative advantages only")
    return _config(
        eps_clip=config.epsilon_low,
        eps_clip_higher=config.clip_high,
        c_clip=config.delta,
        use_sapo_loss=is_sapo,
        sapo_tau_pos=config.sapo_temperature_pos,
        sapo_tau_neg=config.sapo_temperature_neg,
        importance_sampling_level=config.level,
        use_decoupled_loss=config.rollout_correction is not None,
        rejection_sampling=_rejection_sampling(config),
    )


def _micro_batch_loss(batch: LossBatch, data: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> torch.Tensor:
    """Return the loss on which the engine calls backward for one of the micro-batches of a step of the optimizer."""
    packed = pack_tensor_dict(data)
    others = {"loss_mask": torch.ones(batch.tokens - int(batch.loss_mask.sum()))}
    with _one_process():
        micro_batches = SimpleNamespace(mbs=[packed, others])
        total = train_engine.compute_total_loss_weight(micro_batches, loss_weight_fn, None)
    logps = packed.pop("new_logps")
    zeros = torch.zeros_like(logps)
    engine = SimpleNamespace(
        config=SimpleNamespace(is_critic=False),
        enable_tree_training=False,
        _compute_logprobs_entropy=lambda logits, inputs, padding: (logits[:, 0], zeros),
        _get_vocab_min_max_logits=lambda logits, padding: (zeros, zeros),
    )
    context = FSDPTrainContext(model_inputs={}, mb_input=packed)
    return FSDPEngine._compute_logprobs_and_loss(
        engine, logps[:, None], context, loss_fn, loss_weight_fn, total, loss_multiplier=batch.num_processes
    )


def _rejection_sampling(config: GRPOLossConfig) -> Any:
    if config.rollout_correction is None:
        return None
    level, action = config.rollout_correction.split("_")
    if level == "sequence" and config.rollout_sequence_ratio != "mean":
        raise NotApplicable("the ratio of a sequence is the geometric mean of its tokens' ratios")
    high = torch.inf if config.rollout_clip_max is None else config.rollout_clip_max
    action = {"truncate": "clamp", "mask": "mask"}[action]
    return RejectionSamplingConfig(level=level, action=action, upper=high, lower=config.rollout_clip_min, agg="mean")


def _trajectories(batch: LossBatch) -> dict[str, Any]:
    """Return the batch after the computation of advantages. Tokens after the last one in the loss are padding."""
    logps, mask = batch.logps.detach(), batch.loss_mask
    columns = torch.arange(1, mask.shape[1] + 1)
    lengths = (mask * columns).amax(1, keepdim=True).clamp(min=1)
    old = batch.known_old_logps
    zeros = torch.zeros_like(logps)
    return {
        "attention_mask": columns <= lengths,
        "loss_mask": mask.float(),
        "input_ids": zeros.long(),
        "advantages": batch.advantages[:, None] * mask,
        "logprobs": old if batch.rollout_logps is None else batch.rollout_logps,
        "prox_logp": old,
        "new_logps": batch.logps,  # not read by AReaL, which splits and packs it with the others
        **{name: zeros for name in ("kl_rewards", "tot_rewards")},
        "rewards": batch.advantages,  # for statistics
    }


@contextmanager
def _one_process() -> Any:
    """Stand in for a process group of one process."""
    distributed = torch.distributed
    with mock.patch.object(distributed, "all_reduce"), mock.patch.object(distributed, "get_rank", return_value=0):
        yield


def _engine(model: Any, temperature: float) -> Any:
    """Return an engine on a model that exists, with an attention of packed sequences for the CPU instead of FlashAttention."""
    model.set_attn_implementation("vlmkernels")
    engine = object.__new__(FSDPEngine)
    engine.model = model
    engine.model_config = model.config
    engine.enable_tree_training = engine.is_vision_model = False
    engine.config = SimpleNamespace(
        mb_spec=MicroBatchSpec(n_mbs=1), pad_to_maximum=False, temperature=temperature, is_critic=False
    )
    engine.parallel_helper = SimpleNamespace(sp_size=1, tp_size=1)
    engine.logger = logging.getLogger("AReaL")
    return engine


def _batch(processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the batch that AReaL makes of the trajectories of its workflows."""
    trajectories = []
    for sample in samples:
        inputs = encode(processor, [sample], completions=True)
        vision = {key: inputs.pop(key) for key in ("pixel_values", "image_grid_thw") if key in inputs}
        trajectories.append({**inputs, "attention_mask": inputs["attention_mask"].bool(), "multi_modal_input": [vision]})
    batch, _ = concat_batch(trajectories)
    return batch
