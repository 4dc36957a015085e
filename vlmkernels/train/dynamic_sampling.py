"""Generation batches of groups whose rewards differ: dynamic sampling and oversampling.

A group of completions with equal rewards has advantages of 0, and so no gradient. With ``dynamic_sampling``, further prompts
are sampled until every process has a full batch of groups with different rewards, as in section 3.2 of Yu et al., DAPO
(https://arxiv.org/abs/2503.14476). With ``oversampling``, the first round has more prompts than the batch.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from vlmkernels.ops.group_advantages import group_advantages
from vlmkernels.ops.group_advantages.turns import turn_advantages
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.score import Scored
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.processes import Processes
from vlmkernels.train.sampler import PromptStream

logger = logging.get_logger(__name__)

_SHOWN_VALUES = 3  # most frequent rewards of a function in an error message


class Sampled(NamedTuple):
    """Completions with their scores; those of a group are adjacent."""

    rollout: Rollout
    scored: Scored

    def groups(self, chosen: torch.Tensor, num_generations: int) -> "Sampled":
        """Return the groups with the given ascending indices, (n,) int64."""
        completions = (chosen[:, None] * num_generations + torch.arange(num_generations)).flatten()
        if len(completions) == len(self.scored.samples):
            return self
        return Sampled(self.rollout.select(completions), self.scored.select(completions))


def has_spread(scores: Scores, rewards: Rewards, num_generations: int) -> torch.Tensor:
    """Return which groups have an advantage other than 0, (groups,) bool.

    The outcomes of such a group differ (``GroupAdvantages.degenerate`` is false), or the rewards of its turns do. Completions
    without a score do not count.
    """
    result = group_advantages(scores.outcomes, num_generations, weights=rewards.weights)
    spread = ~result.degenerate
    if scores.turns is not None:
        spread |= turn_advantages(scores.turns, num_generations).any(1)
    return spread.view(-1, num_generations).any(1)


class _Batch:
    """The groups that one process has sampled for its generation batch of ``size`` groups.

    The first groups with spread are kept, however large it is, because a choice by size would change what is optimized. Others
    beyond a full batch are dropped.
    """

    def __init__(self, size: int, rewards: Rewards, num_generations: int) -> None:
        self.size, self.rewards, self.num_generations = size, rewards, num_generations
        self.kept: list[Sampled] = []
        self.others: list[Sampled] = []  # groups without spread of the newest round, as many as are missing
        self.missing = size
        self.seen: list[torch.Tensor] = []  # the rewards of all completions

    def add(self, sampled: Sampled) -> tuple[int, int]:
        """Add a round, and return its number of groups with spread and of tokens."""
        self.seen.append(sampled.scored.scores.rewards)
        spread = has_spread(sampled.scored.scores, self.rewards, self.num_generations)
        found, others = spread.nonzero()[: self.missing, 0], (~spread).nonzero()[:, 0]
        self.missing -= len(found)
        if len(found):
            self.kept.append(sampled.groups(found, self.num_generations))
        # A round has at least as many groups as are missing, so that no older ones are needed.
        others = others[len(others) - self.missing :]
        self.others = [sampled.groups(others, self.num_generations)] if len(others) else []
        return int(spread.sum()), int(sampled.rollout.sampled_mask.sum())

    def result(self, pad_token_id: int) -> Sampled:
        """Return the batch, filled with the newest groups without spread."""
        parts = [*self.kept, *self.others]
        if len(parts) == 1:
            return parts[0]
        rollouts, scored = zip(*parts, strict=True)
        return Sampled(Rollout.join(rollouts, pad_token_id), Scored.join(scored))


class BatchSampler:
    """Samples generation batches whose groups have different rewards as far as possible.

    All processes sample in rounds; a process whose batch is full waits.

    Args:
        num_prompts: length of the training dataset.
        pad_token_id: pads joined batches.

    Attributes:
        stream: where the prompts come from.
    """

    def __init__(
        self,
        args: GRPOConfig,
        accelerator: Accelerator,
        processes: Processes,
        rewards: Rewards,
        num_prompts: int,
        pad_token_id: int,
    ) -> None:
        self.args, self.accelerator, self.processes, self.rewards = args, accelerator, processes, rewards
        self.stream, self.pad_token_id = PromptStream(num_prompts, args), pad_token_id
        self._warned = False

    def __call__(self, sample: Callable[[list[int]], Sampled], idle: Callable[[], None]) -> tuple[Sampled, dict[str, float]]:
        """Sample rounds until the batch is full, or ``max_resample_times`` is reached.

        Args:
            sample: samples completions of the prompts with these indices.
            idle: takes part in the collectives of ``sample``.

        Returns:
            ``prompts_per_generation`` groups, and the metrics.

        Raises:
            RuntimeError: with ``dynamic_sampling``, no group of any process has different rewards.
        """
        args, start = self.args, time.perf_counter()
        size, num_processes = args.prompts_per_generation, args.world_size
        batch = _Batch(size, self.rewards, args.num_generations)
        counts = [args.prompts_per_round] * num_processes
        found, prompts, tokens, rounds = [0] * num_processes, 0, 0, 0
        while any(counts):
            rounds, prompts = rounds + 1, prompts + sum(counts)
            here = 0, 0
            if rows := self.stream.take(counts):
                here = batch.add(sample(rows))
            else:
                idle()
            for process, (new, length) in enumerate(self._gather(here)):
                found[process] += new
                tokens += length
            is_last = not args.dynamic_sampling or rounds > args.max_resample_times
            counts = [0 if is_last else next_count(size, size - n, sum(found), prompts) for n in found]
        used = sum(min(n, size) for n in found)
        if args.dynamic_sampling and not used:
            raise RuntimeError(self._describe_failure(batch, prompts, rounds))
        if args.dynamic_sampling and used < size * num_processes:
            self._warn(size * num_processes - used, prompts)
        completions = used * args.num_generations
        metrics = {
            "kept": sum(found) / prompts,
            "filled": 1 - used / (size * num_processes),
            "rounds": rounds,
            "prompts_sampled": prompts,
            "tokens_per_kept": tokens / completions if used else math.nan,
            "seconds_per_kept": (time.perf_counter() - start) / completions if used else math.nan,
            "epochs": self.stream.epochs,
        }
        return batch.result(self.pad_token_id), {f"dynamic_sampling/{name}": value for name, value in metrics.items()}

    def _gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the values of each process."""
        self.processes.barrier("the end of a round of sampling")
        return self.accelerator.gather(torch.tensor([values], device=self.accelerator.device)).tolist()

    def _warn(self, missing: int, prompts: int) -> None:
        if not self._warned and self.accelerator.is_main_process:
            logger.warning(
                "dynamic_sampling: %d groups of a batch have equal rewards and so no advantage, because too few of %d prompts "
                "had different rewards (max_resample_times=%d). Later batches: see the metric dynamic_sampling/filled",
                missing,
                prompts,
                self.args.max_resample_times,
            )
        self._warned = True

    def _describe_failure(self, batch: _Batch, prompts: int, rounds: int) -> str:
        seen = torch.cat(gather_object(batch.seen))
        rewards = "; ".join(f"{name}: {_frequent(seen[:, k])}" for k, name in enumerate(self.rewards.names))
        args = self.args
        return (
            f"dynamic_sampling must find groups with different rewards, got none among {prompts} prompts with "
            f"{args.num_generations} completions each in {rounds} rounds (max_resample_times={args.max_resample_times}). "
            f"Rewards: {rewards}. Use easier prompts if rewards are low, harder ones if they are high, a reward with more "
            f"values, or a higher temperature than {args.temperature:g}"
        )


def next_count(size: int, missing: int, found: int, prompts: int) -> int:
    """Return how many prompts to sample for ``missing`` groups, at most ``size``, if ``found`` of ``prompts`` had spread."""
    return min(size, -(-max(missing, 0) * prompts // found)) if found else size


def _frequent(rewards: torch.Tensor) -> str:
    """Describe the most frequent of some rewards (N,), for example "0 for 96 completions, not scored for 4"."""
    counts = Counter("not scored" if math.isnan(reward) else f"{reward:.4g}" for reward in rewards.tolist())
    shown = [f"{value} for {count} completions" for value, count in counts.most_common(_SHOWN_VALUES)]
    return ", ".join(shown) + (f", and {len(counts) - _SHOWN_VALUES} more values" if len(counts) > _SHOWN_VALUES else "")
