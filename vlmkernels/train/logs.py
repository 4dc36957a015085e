"""What the trainer logs: metrics since the last log, and completions of the last generation batch."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, compress, islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from vlmkernels.data.samples import prompt_text, still_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.ops.group_advantages import GroupAdvantages
from vlmkernels.record.completions import CompletionRow, Groups
from vlmkernels.record.phases import Phases
from vlmkernels.record.summary import completion_metrics, reward_metrics
from vlmkernels.record.turns import turn_rows
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.answers import text_of
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.episodes import episode_metrics
from vlmkernels.rollout.score import Scored, resized_sizes
from vlmkernels.tools.functions import Tools
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.token_counts import NAMES, TokenCounts

MAX_REFERENCE = 500  # characters of a reference that are stored


class MetricBuffer:
    """Collects values of metrics and averages them."""

    def __init__(self) -> None:
        self._values: dict[str, list] = defaultdict(list)

    def add(self, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Add one value of each metric. Does not synchronize the device."""
        for name, value in metrics.items():
            self._values[name].append(value)

    def replace(self, name: str, value: float) -> None:
        """Replace the values of a metric, such as a running total."""
        self._values[name] = [value]

    def flush(self) -> dict[str, float | None]:
        """Return the mean of each metric since the last call, over all processes; None for a metric that is NaN."""
        # A process without a value, such as one without images, has NaN. Counts of tokens need fp64.
        own = {name: _mean([float(value) for value in values]) for name, values in self._values.items()}
        self._values.clear()
        means = [_mean(of_processes) for of_processes in zip(*gather_object([[*own.values()]]), strict=True)]
        return {name: None if math.isnan(mean) else mean for name, mean in zip(own, means, strict=True)}


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


class GatheredCompletions(NamedTuple):
    """The completions of all processes, by group.

    Attributes:
        scores: their scores, with the mean time of a call of each reward function.
        lengths, prompt_lengths: (N,), in tokens.
        truncated: (N,) bool.
        of_tools: the metrics of tools.
    """

    scores: Scores
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    truncated: torch.Tensor
    of_tools: dict[str, float]


class SampledCompletions:
    """Collects the scores and lengths of sampled completions, and gathers them from all processes.

    Args:
        tools: the tools of the run, or None.
    """

    def __init__(self, tools: Tools | None = None) -> None:
        self._tools = tools
        self._parts: list[tuple[Any, ...]] = []

    def add(self, rollout: Rollout, scored: Scored, mask: torch.Tensor | None = None) -> None:
        """Add the completions of a rollout that are selected by ``mask``, (N,) bool. Default: all."""
        mask = torch.ones(len(rollout.group), dtype=torch.bool) if mask is None else mask
        lengths, lengths_with_results = (tokens.sum(1).cpu() for tokens in (rollout.sampled_mask, rollout.completion_mask))
        prompt_lengths = rollout.prompts.inputs["attention_mask"].sum(1).cpu()[rollout.group]
        values = lengths, lengths_with_results, prompt_lengths, rollout.truncated.cpu()
        episodes = [episode.summary() for episode in compress(scored.episodes or (), mask)]
        self._parts.append((scored.scores.select(mask), episodes, *(value[mask] for value in values)))

    def gather(self) -> GatheredCompletions:
        """Return the completions of all processes."""
        scores, episodes, *columns = zip(*gather_object(self._parts), strict=True)
        lengths, lengths_with_results, prompt_lengths, truncated = map(torch.cat, columns)
        joined, metrics = Scores.cat(scores), {}
        if self._tools is not None:
            metrics["tools/frac_sampled_tokens"] = float(lengths.sum() / lengths_with_results.sum())
            metrics |= episode_metrics([*chain(*episodes)], self._tools)
        joined = joined._replace(seconds=joined.seconds / len(scores))
        return GatheredCompletions(joined, lengths, prompt_lengths, truncated, metrics)


def sampling_metrics(
    completions: GatheredCompletions, advantages: GroupAdvantages | None, names: list[str]
) -> dict[str, float]:
    """Compute the metrics of sampled completions that both training and evaluation log.

    Args:
        completions: the completions.
        advantages: the result of ``group_advantages`` for their rewards; None without reward functions.
        names: the names of the reward functions.
    """
    scores = completions.scores
    metrics = {} if advantages is None else reward_metrics(scores.rewards, names, advantages)
    metrics |= scores.metrics(names)
    return metrics | completion_metrics(completions.lengths, completions.truncated) | completions.of_tools


def image_metrics(prompts: ModelInputs, processor: Any) -> dict[str, float]:
    """Compute the mean number of pixels of the images of prompts after resizing; NaN without images."""
    sizes = [size for of_prompt in resized_sizes(prompts, processor) for size in of_prompt or ()]
    return {"image_pixels": statistics.fmean(width * height for width, height in sizes) if sizes else math.nan}


def step_metrics(phases: Phases, counts: TokenCounts, num_processes: int) -> dict[str, float]:
    """Compute the metrics of time and throughput since the last call, per optimizer step.

    Counts are multiplied by the number of processes, because the trainer logs the mean over processes: it is then the sum.
    """
    seconds, steps = phases.flush()
    totals, steps = counts.flush(), max(steps, 1)
    metrics = {f"time/{name}": value / steps for name, value in seconds.items()}
    metrics |= {name: totals[name] * num_processes / steps for name in NAMES}
    training = sum(seconds.values()) - seconds["evaluate"] - seconds["save"]
    return metrics | {"tokens_per_second": metrics["tokens_run"] * steps / max(training, 1e-9)}


def completion_groups(
    scored: Scored, advantages: torch.Tensor, trained: torch.Tensor, rewards: Rewards, args: GRPOConfig
) -> Groups:
    """Return at most ``num_completions_to_print`` completions, as ``vlmkernels.record.completions`` stores them.

    Args:
        scored: N completions, ordered by group.
        advantages: (N,).
        trained: (N,) bool, whether the loss counts any token of a completion.
    """
    columns = rewards.columns or ["answer"]  # a function that takes **kwargs does not say what it reads
    turn_rewards = [None] * len(scored.samples) if scored.scores.turns is None else scored.scores.turns.tolist()
    rewards_and_advantages = scored.scores.rewards.tolist(), advantages.tolist()
    values = scored.samples, scored.completions, *rewards_and_advantages, trained.tolist(), turn_rewards
    rows = [
        CompletionRow(
            prompt=prompt_text(s.prompt),
            images=still_images(s),
            completion=text_of(c),
            rewards=dict(zip(rewards.names, r, strict=True)),
            advantage=a,
            references={name: f"{s.row[name]}"[:MAX_REFERENCE] for name in columns if s.row.get(name) is not None},
            turns=[] if scored.episodes is None else turn_rows(c, trained=t, rewards=of_turns),
        )
        for s, c, r, a, t, of_turns in islice(zip(*values, strict=True), args.num_completions_to_print)
    ]
    return [rows[start : start + args.num_generations] for start in range(0, len(rows), args.num_generations)]
