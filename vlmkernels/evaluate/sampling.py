"""Sampling the completions of a dataset's samples, with or without tools. A killed run resumes where it stopped."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from vlmkernels.data.dataset import column_names, read_samples
from vlmkernels.data.decoding import decode_completions
from vlmkernels.data.images import DEFAULT_LIMITS, ImageLimits
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, encode, tokenizer_of
from vlmkernels.evaluate.predictions import Completion, Predictions
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import inference
from vlmkernels.record.turns import turn_rows
from vlmkernels.rewards import Rewards
from vlmkernels.rewards.answers import text_of
from vlmkernels.rewards.compose import name_of
from vlmkernels.rollout.agent import Agent
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.episodes import Episode, Episodes
from vlmkernels.rollout.generate import Generate, report_prefix_sharing
from vlmkernels.rollout.score import Size, opens_think, resized_sizes, score_rollout

GRAY = 128


def hide_images(sample: Sample, view: str) -> Sample:
    """Return the sample in a view of ``VIEWS``.

    Raises:
        ValueError: the view is "none" and the prompt is text, from which images cannot be removed.
    """
    if view == "image" or not (sample.images or sample.videos):
        return sample
    if view == "grey":
        images = [Image.new("RGB", image.size, (GRAY, GRAY, GRAY)) for image in sample.images]
        return replace(sample, images=images, videos=[torch.full_like(video, GRAY) for video in sample.videos])
    if isinstance(sample.prompt, str):
        raise ValueError(
            f"sample {sample.index}: prompt must be a conversation to remove images from it (use the view grey), got text"
        )
    prompt = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample.prompt]
    return replace(sample, prompt=prompt, images=[], videos=[])


def model_digest(model: torch.nn.Module) -> str:
    """Return a hash of the names, shapes and sums of all weights, which changes when the weights do."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        value = weight.detach().double()
        digest.update(f"{name} {tuple(value.shape)} {value.sum().item():.17g} {value.abs().sum().item():.17g}\n".encode())
    return digest.hexdigest()[:16]


def dataset_digest(dataset: Any, other_columns: bool = False) -> str:
    """Return a hash of the prompts and of the paths of images, but not of their pixels.

    Args:
        other_columns: whether the hash covers all other columns too, which environments and rewards may read.
    """
    if hasattr(dataset, "select_columns"):
        names = [name for name in column_names(dataset) if name not in MEDIA_COLUMNS]
        dataset = dataset.select_columns(names if other_columns else ["prompt"])
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        row = dataset[index]
        inputs = {name: value for name, value in row.items() if other_columns or name in ("prompt", *MEDIA_COLUMNS)}
        digest.update(json.dumps(inputs, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Decoding:
    """How predictions are sampled.

    Args:
        num_generations: completions per prompt.
        temperature: 0 is greedy decoding.
        max_completion_length: maximum number of tokens of a completion.
        top_p, top_k: see ``vlmkernels.rollout.base.Sampling``.
        seed: seed of the random numbers.
        batch_size: number of completions that are sampled together. It only changes the speed.

    Raises:
        ValueError: a value is out of range.
    """

    num_generations: int = 1
    temperature: float = 0.0
    max_completion_length: int = 512
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_generations", "max_completion_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        self.sampling()
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(f"temperature must be > 0 for several completions (greedy ones are equal), got {self.temperature}")

    def sampling(self) -> Sampling:
        """Return the options of the rollout engine."""
        return Sampling(self.max_completion_length, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def settings(self) -> dict[str, Any]:
        """Return everything that the completions depend on."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


@dataclass(frozen=True)
class ToolUse:
    """Tools that the model may call while predictions are sampled.

    Args:
        agent: the tools and the model's format of calls.
        rewards: reward functions that score each trajectory when it has ended, as in training: they see all messages and the
            environments.
    """

    agent: Agent
    rewards: Rewards | None = None

    def settings(self) -> dict[str, Any]:
        """Return what completions and their rewards depend on, except for the code of the tools and of the rewards."""
        tools, options = self.agent.tools, self.agent.options
        schemas = {str(name): tools.schemas(name) for name in [*tools.environments] or [None]}
        names = dict.fromkeys(schema["function"]["name"] for of_one in schemas.values() for schema in of_one)
        digest = hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()[:16]
        limits = {name: getattr(options, name) for name in ("max_tool_calling_iterations", "max_tool_images", "tool_format")}
        rewards = json.loads(json.dumps(self.rewards.specs, default=name_of)) if self.rewards else []
        return {"tools": list(names), "schemas": digest, **limits, "rewards": rewards}


class Predictor:
    """Samples the completions of a dataset's samples.

    The completions of a sample depend on the seed, its index and the view, but not on the batch size. Prompts are therefore
    processed one by one if ``model.generate`` is used (see ``Generate``) and the temperature is not 0.

    Args:
        model, processor: the model and its processor or tokenizer.
        decoding: how completions are sampled.
        tools: tools that the model may call. Default: none.

    Attributes:
        samples_per_batch: maximum number of samples of a call.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, decoding: Decoding, tools: ToolUse | None = None):
        self.model, self.processor, self.decoding, self.tools = model, with_fast_images(processor), decoding, tools
        self.tokenizer, self.family = tokenizer_of(self.processor), family_of(model.config)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.engine = Generate(model, self.processor, decoding.sampling())
        if self.engine.copies_reason is not None:
            report_prefix_sharing({"sampling": self.engine.copies_reason})
        self.is_random = decoding.temperature > 0
        if tools is not None:
            tools.agent.prepare(self.processor, self.family, end_tokens=self.engine.sampling.eos_token_id or ())
        batched = self.engine.shares_prefix or not self.is_random
        self.samples_per_batch = max(1, decoding.batch_size // decoding.num_generations) if batched else 1

    def _seed(self, sample: Sample, view: str) -> int:
        key = f"{self.decoding.seed} {view} {sample.index}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

    def _rollout(self, samples: list[Sample], view: str, prompts: ModelInputs, episodes: Episodes | None = None) -> Rollout:
        decoding, uniform = self.decoding, None
        if self.is_random and self.engine.shares_prefix:
            shape = decoding.num_generations, decoding.max_completion_length
            generators = [torch.Generator().manual_seed(self._seed(sample, view)) for sample in samples]
            uniform = torch.cat([torch.rand(shape, generator=g, dtype=torch.float64) for g in generators])
        with torch.random.fork_rng(enabled=self.is_random), inference(self.model):
            if self.is_random:
                torch.manual_seed(self._seed(samples[0], view))
            arguments = self.model, prompts, decoding.num_generations, decoding.temperature, samples, episodes
            return self.engine(*arguments, uniform=uniform)

    def __call__(self, samples: list[Sample], view: str) -> tuple[dict[int, list[Completion]], dict[int, list[Size] | None]]:
        """Return the completions of each sample, and the sizes of its images as the model sees them, both by index."""
        if self.tools is not None:
            return self._trajectories(self.tools, samples, view)
        prompts = encode([hide_images(sample, view) for sample in samples], self.processor, self.family)
        rollout = self._rollout(samples, view, prompts.to(self.model.device))
        ids = rollout.token_ids()
        opened = opens_think(samples, prompts, self.tokenizer)
        texts = decode_completions(self.tokenizer, ids)
        found: dict[int, list[Completion]] = {sample.index: [] for sample in samples}
        columns = rollout.group.tolist(), texts, ids, rollout.truncated.tolist()
        for place, text, tokens, truncated in zip(*columns, strict=True):
            found[samples[place].index].append(Completion(text, tokens, len(tokens), truncated, opened[place]))
        sizes = resized_sizes(prompts, self.processor)
        return found, {sample.index: size for sample, size in zip(samples, sizes, strict=True)}

    def _trajectories(
        self, tools: ToolUse, samples: list[Sample], view: str
    ) -> tuple[dict[int, list[Completion]], dict[int, list[Size] | None]]:
        """Return what ``__call__`` returns, of trajectories."""
        # Episodes seeds tools by this number, the sample and the trajectory.
        episodes = tools.agent.episodes(samples, self.decoding.num_generations, self.decoding.seed)
        prompts = encode(episodes.samples, self.processor, self.family)
        rollout = self._rollout(samples, view, prompts.to(self.model.device), episodes)
        ended, rewards, turn_rewards = self._scored(tools.rewards, episodes, rollout)
        sizes, lengths = resized_sizes(prompts, self.processor), rollout.sampled_mask.sum(1).tolist()
        found: dict[int, list[Completion]] = {sample.index: [] for sample in samples}
        columns = rollout.token_ids(), lengths, rollout.truncated.tolist(), ended, rewards, turn_rewards
        for row, ids, length, truncated, episode, values, of_turns in zip(episodes.rows, *columns, strict=True):
            completion = Completion(
                text_of(episode.messages),
                ids,
                length,
                truncated,
                turns=turn_rows(episode.messages, rewards=of_turns),
                tool_calls=episode.tool_calls.total(),
                tool_failures=episode.failures.total(),
                rewards=values,
            )
            found[samples[row].index].append(completion)
        places = dict(zip(episodes.rows, rollout.group.tolist(), strict=True))
        return found, {sample.index: sizes[places[row]] for row, sample in enumerate(samples)}

    def _scored(
        self, rewards: Rewards | None, episodes: Episodes, rollout: Rollout
    ) -> tuple[list[Episode], list[dict[str, float | None] | None], list[list[float] | None]]:
        """End the trajectories. Returns them, their rewards by name (None: not scored), and the rewards of their turns."""
        if rewards is None:
            ended = episodes.results()
            return ended, [None for _ in ended], [None for _ in ended]
        scored = score_rollout(rewards, episodes.samples, rollout, self.processor, episodes)
        named: list[Any] = [dict(zip(rewards.names, map(_or_none, row), strict=True)) for row in scored.scores.rewards.tolist()]
        turns = [None for _ in named] if scored.scores.turns is None else scored.scores.turns.tolist()
        return scored.episodes or [], named, turns


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def settings_of(model: torch.nn.Module, dataset: Any, decoding: Decoding, tools: ToolUse | None = None) -> dict[str, Any]:
    """Return everything that predictions depend on: hashes of model and dataset, the decoding, and the tools."""
    digest = dataset_digest(dataset, other_columns=tools is not None)
    settings = {"model": model_digest(model), "dataset": digest, **decoding.settings()}
    return settings if tools is None else {**settings, **tools.settings()}


def predict(
    model: PreTrainedModel,
    processor: Any,
    dataset: Any,
    decoding: Decoding,
    path: str | os.PathLike,
    *,
    views: Sequence[str] = ("image",),
    progress: Callable[[int, int], None] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    tools: ToolUse | None = None,
) -> Predictions:
    """Sample the completions of every sample in each view. Completions that are already in the file are not sampled again.

    Args:
        model, processor: the model and its processor or tokenizer.
        dataset: rows; see ``vlmkernels.data.samples``.
        decoding: how completions are sampled.
        path: the file of predictions.
        views: names from ``VIEWS``.
        progress: called after each batch with the number of finished samples and of all samples, over all views.
        limits: limits of images.
        tools: tools that the model may call. The rewards in it are stored with the predictions.

    Raises:
        ValueError: the file was made with other settings, a sample cannot be read, or an image is to be hidden from a model
            with tools, which can return it.
    """
    if tools is not None and tuple(views) != ("image",):
        raise ValueError(f"views must be only 'image' with tools, which can return the image, got {', '.join(views)}")
    predictions = Predictions(path).resume(settings_of(model, dataset, decoding, tools))
    predictor = Predictor(model, processor, decoding, tools)
    missing = [(view, i) for view in views for i in range(len(dataset)) if (i, view) not in predictions.by_sample]
    total, step = len(views) * len(dataset), predictor.samples_per_batch
    for view in views:
        indices = [index for name, index in missing if name == view]
        for start in range(0, len(indices), step):
            batch = indices[start : start + step]
            samples = read_samples(dataset, batch, limits)
            predictions.append(view, *predictor(samples, view))
            if progress:
                progress(len(predictions.by_sample), total)
    return predictions
