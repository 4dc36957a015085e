"""OpenPipe ART: its group-relative advantages, packs, loss, and log-probabilities from hidden states."""

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import trl  # noqa: F401  before the stand-ins
from transformers import masking_utils

from vlmkernels.conformance import Adapter, AdvantageBatch, Documented, GRPOLossConfig, LossBatch, NotApplicable, Sample
from vlmkernels.conformance.foreign import stand_ins
from vlmkernels.conformance.models import encode

# Clients of inference engines, tables, and a package that lets event loops nest. Importing ART replaces a function of
# transformers by that of version 5.2; other versions need theirs.
_ORIGINAL = mock.patch.object(masking_utils, "_preprocess_mask_arguments", masking_utils._preprocess_mask_arguments)
with stand_ins("litellm", "weave", "nest_asyncio", "polars", "setproctitle", "tblib"), mock.patch.dict(os.environ), _ORIGINAL:
    from art.loss import loss_fn
    from art.preprocessing import tokenize
    from art.preprocessing.inputs import create_train_inputs
    from art.preprocessing.pack import packed_tensors_from_tokenized_results
    from art.trajectories import Trajectory
    from art.types import TrainConfig
    from art.unsloth import train

PROMPT = [1, 2]  # ids of a prompt where only completions matter


class ART(Adapter):
    name = "ART"
    packages = ("openpipe-art", "trl")
    dtypes = (torch.float32, torch.bfloat16)
    loss_types = ("grpo",)
    levels = ("token", "sequence")
    corrections = ("token_truncate",)
    options: ClassVar = {"delta": 4.0}
    masks = ("padding", "holes")
    scales = ("group", "none")
    unequal_groups = True
    advantage_eps = 1e-6
    advantage_ddof = 0
    documented = (
        Documented(
            "loss/empty[*-one_empty_sequence]",
            "Trajectories without tokens in the loss are skipped and do not count",
            "art/preprocessing/pack.py, line 63",
        ),
    )

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        rewards = (batch.rewards * torch.tensor(batch.weights)).sum(1).tolist()
        results = []
        for group in torch.tensor(rewards, dtype=torch.float64).split([*batch.group_sizes]):
            trajectories = [Trajectory(reward=reward) for reward in group.tolist()]
            results += _tokenized(trajectories, [[3]] * len(trajectories), scale_rewards=batch.scale == "group")
        return torch.tensor([result.advantage for result in results])

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        settings = _settings(config)
        if not batch.loss_mask.any():
            raise NotApplicable("a pack has at least one token in the loss")
        inputs, rows, columns, positions = _loss_inputs(batch)

        def spread(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """Write values of the completions' tokens into a row of a pack."""
            empty = torch.zeros(inputs["tokens"].shape[1], dtype=x.dtype)
            return empty.index_put((positions,), x[rows, columns])[None]

        inputs["advantages"] = spread(batch.advantages[:, None].expand_as(batch.logps), positions)
        inputs["logprobs"] = spread(batch.known_old_logps, positions)
        if batch.rollout_logps is not None:
            inputs["original_logprobs"] = spread(batch.rollout_logps, positions)
        out = loss_fn(inputs, spread(batch.logps, positions - 1), None, None, settings, reduction="sum")
        # Megatron sums the gradients of all micro-batches and processes, and divides by all tokens in the loss.
        return out.policy_loss / batch.tokens * batch.num_processes

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        if temperature != 1:
            raise NotApplicable("log-probabilities have no temperature")
        return train._calculate_logprobs(weight.t(), hidden, targets, chunk_size=1024)[0]

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        if temperature != 1:
            raise NotApplicable("log-probabilities have no temperature")
        prompts = [encode(processor, [sample])["input_ids"][0].tolist() for sample in samples]
        results = _tokenized(
            [Trajectory(reward=index) for index in range(len(samples))], [sample.completion_ids for sample in samples], prompts
        )
        length = max(len(result.token_ids) for result in results)
        with mock.patch("random.shuffle"):
            packed = packed_tensors_from_tokenized_results(results, length, pad_token_id=0, pack_results=False)
        out = []
        for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
            settings = {"logprob_calculation_chunk_size": 1}
            logps = _row_logps(model, create_train_inputs(packed, row, TrainConfig(), settings, warmup=False))
            out.append(logps[0, len(prompt) - 1 :][: len(sample.completion_ids)])
        return out


def _settings(config: GRPOLossConfig) -> dict[str, Any]:
    """Return ART's configuration of the objective."""
    if config.beta:
        raise NotApplicable("the KL term changes advantages")
    if config.entropy_coef or config.top_entropy_quantile < 1 or config.off_policy_mask_threshold is not None:
        raise NotApplicable("there are no such options")
    if config.rollout_clip_min is not None and config.rollout_correction:
        raise NotApplicable("truncation has no lower bound")
    if config.delta is not None and config.delta < 1 + config.clip_high:
        raise NotApplicable("the bound of the ratio comes before its clip")
    return {
        "ppo": True,
        "epsilon": config.epsilon_low,
        "epsilon_high": config.clip_high,
        "importance_sampling_level": config.level,
        "max_negative_advantage_importance_sampling_weight": config.delta,
        "truncated_importance_sampling": config.rollout_clip_max if config.rollout_correction else None,
    }


def _tokenized(
    trajectories: Sequence[Any],
    completions: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]] | None = None,
    masks: Sequence[Sequence[int]] | None = None,
    scale_rewards: bool = False,
) -> list[Any]:
    """Return the tokenized trajectories of one group, in order. ``tokenize_trajectory``, of chats, is replaced by given ids."""
    indices = {id(trajectory): index for index, trajectory in enumerate(trajectories)}

    def tokenize_trajectory(*args: Any, **kwargs: Any) -> Any:
        _tokenizer, _processor, _history, advantage, _, trajectory = args
        index = indices[id(trajectory)]
        prompt, completion = PROMPT if prompts is None else [*prompts[index]], [*completions[index]]
        ids = prompt + completion
        return tokenize.TokenizedResult(
            advantage=advantage,
            chat="",
            token_ids=ids,
            input_pos=[*range(len(ids))],
            assistant_mask=[0] * len(prompt) + ([1] * len(completion) if masks is None else [*masks[index]]),
            logprobs=[math.nan] * len(prompt) + [0.0] * len(completion),
            pixel_values=None,
            image_grid_thw=None,
            trajectory=trajectory,
            choice_offsets=[],
            extra_logprobs={},
            _tokenizer=None,
        )

    with mock.patch.object(tokenize, "tokenize_trajectory", tokenize_trajectory):
        results = tokenize.tokenize_trajectory_groups(
            None,
            [[*trajectories]],
            allow_training_without_logprobs=False,
            scale_rewards=scale_rewards,
            shuffle_group_trajectories=False,
            drop_zero_advantage_trajectories=False,
        )
        return [*results]


def _loss_inputs(batch: LossBatch) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of the loss for one row that packs the micro-batch, and where it has which tokens of the completions.

    ART normalizes the weights of completions over all rows of the batch. It also divides the advantages by their mean absolute
    value; the loss is checked with the advantages that are given. Tokens after the last one in the loss are padding.
    """
    others = len(batch.loss_mask) * (batch.accumulation_steps * batch.num_processes - 1)
    tokens = batch.tokens - int(batch.loss_mask.sum())
    lengths = (batch.loss_mask * torch.arange(1, batch.loss_mask.shape[1] + 1)).amax(1).tolist()
    masks = [row[:length].int().tolist() for row, length in zip(batch.loss_mask, lengths, strict=True)]
    masks += [[1] * (tokens // others + (index < tokens % others)) for index in range(others)]
    trajectories = [Trajectory(reward=index) for index in range(len(masks))]
    results = [_tokenized([each], [[3] * len(mask)], masks=[mask])[0] for each, mask in zip(trajectories, masks, strict=True)]
    kept = [index for index, mask in enumerate(masks) if any(mask)]  # ART leaves out the others
    length = sum(len(results[index].token_ids) for index in kept)
    packed = packed_tensors_from_tokenized_results(results, length, pad_token_id=0)
    rows, columns, positions, stop = [], [], [], 0
    for row in kept:
        if row < len(lengths):
            rows += [row] * lengths[row]
            columns += range(lengths[row])
            positions += range(stop + len(PROMPT), stop + len(PROMPT) + lengths[row])
            stop += len(PROMPT) + lengths[row]
    inputs = {name: value[:, :stop] for name, value in packed.items() if isinstance(value, torch.Tensor)}
    return inputs, torch.tensor(rows), torch.tensor(columns), torch.tensor(positions)


def _row_logps(model: Any, inputs: Any) -> torch.Tensor:
    """Return the log-probabilities that ART's ``compute_loss`` computes for a packed row."""
    seen = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(calculate(*args, **kwargs))
        return seen[-1]

    calculate = train.calculate_logprobs
    trainer = SimpleNamespace(
        model=_Unsloth(model), accelerator=SimpleNamespace(device="cpu"), optimizer=None, _metrics={"train": {}}
    )
    trainer._metrics["train"] = {name: [] for name in ("loss/learning_rate", "loss/train", "loss/entropy")}
    with mock.patch.object(train, "calculate_logprobs", record):
        train.get_compute_loss_fn(trainer)(trainer.model, inputs)
    return seen[0][0]


class _Unsloth(torch.nn.Module):
    """A model with the interface of Unsloth's, which needs a GPU: it takes a mask and returns hidden states as logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, causal_mask: torch.Tensor) -> Any:
        mask = {"full_attention": causal_mask[:, None].to(self.model.dtype)}
        return SimpleNamespace(logits=self.model.model(input_ids, attention_mask=mask).last_hidden_state)
