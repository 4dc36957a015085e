"""Division of a generation batch into micro-batches, splits within a token budget, and the model inputs of each split."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vlmkernels.models.families import PIXELS
from vlmkernels.models.head import completion_logps
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import max_over_ranks, requires_lockstep
from vlmkernels.train.setup import PreparedPolicy
from vlmkernels.train.token_counts import TokenCounts


class Split(NamedTuple):
    """Completions of a micro-batch that run in one forward pass.

    Args:
        samples: (n,) int64, indices of completions of the generation batch.
        is_padding: whether the pass repeats another split to keep ranks in lockstep. Its loss is not used.
    """

    samples: torch.Tensor
    is_padding: bool


class MicroBatches:
    """Divides generation batches into the inputs of forward passes.

    Args:
        policy: how the model runs: the policy, or a teacher.

    Attributes:
        token_counts: the tokens and images of all passes.
        share_splits: whether splits are cut as packs. If another model runs them as copies of the prompts, they must be cut as
            copies, which take more tokens than packs.
        view: returns of a rollout with the inputs of several models one with the inputs of this model. None: no change.
    """

    view: Callable[[Rollout], Rollout] | None = None

    def __init__(self, policy: PreparedPolicy, args: GRPOConfig, accelerator: Accelerator) -> None:
        self.policy, self.args, self.accelerator, self.token_counts = policy, args, accelerator, TokenCounts()
        self.share_splits = policy.shares_prefix
        self._hidden_size = policy.model.config.get_text_config().hidden_size
        self._viewed: tuple[Rollout | None, Rollout | None] = None, None

    def own(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the inputs of this model. Keeps the last one, which caches what is computed from it."""
        if self.view is None:
            return rollout
        if self._viewed[0] is not rollout:
            self._viewed = rollout, self.view(rollout)
        return self._viewed[1]

    def splits(self, rollout: Rollout, index: int, *, branches: bool = False) -> list[Split]:
        """Split micro-batch ``index`` of a generation batch within ``max_tokens_per_microbatch``.

        If ranks must run in lockstep, every rank returns the same number of splits.

        Args:
            branches: whether the splits run with masked images too.
        """
        size, budget = self.args.per_device_train_batch_size, self.args.max_tokens_per_microbatch
        micro_batch = slice(index * size, (index + 1) * size)
        options = {"shared": self.share_splits, "hidden_size": self._hidden_size, "branches": branches}
        parts = rollout.parts(micro_batch, budget, **options)
        splits = [Split(samples, False) for samples in parts]
        if budget is not None and requires_lockstep(self.accelerator):
            splits += [Split(parts[-1], True)] * (max_over_ranks(self.accelerator, len(parts)) - len(parts))
        return splits

    def scoring_batch(self, rollout: Rollout, split: Split) -> ScoringBatch:
        """Return the model inputs of a split, and count its tokens and images."""
        policy, samples, rollout = self.policy, split.samples, self.own(rollout)
        batch = rollout.packed(samples, policy.model) if policy.shares_prefix else rollout.padded(samples)
        return self._completed(rollout, split, batch)

    def loss_batch(self, rollout: Rollout, split: Split, loss_mask: torch.Tensor) -> tuple[ScoringBatch, torch.Tensor | None]:
        """Return the model inputs for the loss of a split, and which of its completions run with masked images too, (n,) bool.

        Args:
            loss_mask: (n, C) bool, the tokens that count in the loss.
        """
        samples = split.samples
        if not self.args.masks_images:
            sampled = rollout.sampled_mask[samples.to(loss_mask.device, non_blocking=True)]
            return self.scoring_batch(rollout, split).select(loss_mask[sampled]), None
        rollout = self.own(rollout)
        batch = rollout.branches(samples, self.policy.model if self.policy.shares_prefix else None, loss_mask)
        masked = has_media(rollout.prompts)[rollout.group[samples]].to(loss_mask.device, non_blocking=True)
        return self._completed(rollout, split, batch, branches=True), masked

    def _completed(self, rollout: Rollout, split: Split, batch: ScoringBatch, *, branches: bool = False) -> ScoringBatch:
        """Count the tokens and images of a pass, and add the media that keep ranks in lockstep."""
        self.token_counts.add_pass(rollout, split.samples, batch, is_padding=split.is_padding, branches=branches)
        if self.policy.idle_media is not None:
            idle = self.policy.idle_media.items()
            batch.inputs["idle_media"] = {kind: inputs for kind, inputs in idle if PIXELS[kind] not in batch.inputs}
        return batch

    def logps(self, model: torch.nn.Module, head: torch.nn.Module, rollout: Rollout, indices: Iterable[int]) -> torch.Tensor:
        """Compute log-probabilities (B, C) of the sampled tokens; 0 at other tokens and in other micro-batches.

        Args:
            model: the policy or the reference, perhaps wrapped.
            head: its language-model head.
            indices: the micro-batches to compute.
        """
        result = torch.zeros(rollout.completion_mask.shape, device=rollout.completion_mask.device)
        for split in (split for index in indices for split in self.splits(rollout, index)):
            logps = completion_logps(model, self.scoring_batch(rollout, split), head=head, **self.head_arguments)
            places = split.samples.to(result.device, non_blocking=True)
            mask = rollout.sampled_mask[places]
            result[places] = result.new_zeros(mask.shape).masked_scatter_(mask, logps)
        return result

    @property
    def head_arguments(self) -> dict:
        """The arguments ``arguments`` and ``temperature`` of ``completion_logps`` and ``completion_loss``."""
        return {"arguments": self.policy.logit_arguments, "temperature": self.args.temperature}
