"""Division of a generation batch into micro-batches, splits within a token budget, and the model inputs of each split."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vlmkernels.models.head import completion_logps
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import max_over_ranks, requires_lockstep
from vlmkernels.train.setup import PreparedPolicy
from vlmkernels.train.token_counts import TokenCounts

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


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

    def _own(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the inputs of this model. Keeps the last one, which caches what is computed from it."""
        if self.view is None:
            return rollout
        if self._viewed[0] is not rollout:
            self._viewed = rollout, self.view(rollout)
        return self._viewed[1]

    def splits(self, rollout: Rollout, index: int) -> list[Split]:
        """Split micro-batch ``index`` of a generation batch within ``max_tokens_per_microbatch``.

        If ranks must run in lockstep, every rank returns the same number of splits.
        """
        size, budget = self.args.per_device_train_batch_size, self.args.max_tokens_per_microbatch
        micro_batch = slice(index * size, (index + 1) * size)
        parts = rollout.parts(micro_batch, budget, shared=self.share_splits, hidden_size=self._hidden_size)
        splits = [Split(samples, False) for samples in parts]
        if budget is not None and requires_lockstep(self.accelerator):
            splits += [Split(parts[-1], True)] * (max_over_ranks(self.accelerator, len(parts)) - len(parts))
        return splits

    def scoring_batch(self, rollout: Rollout, split: Split) -> ScoringBatch:
        """Return the model inputs of a split, and count its tokens and images."""
        policy, samples, rollout = self.policy, split.samples, self._own(rollout)
        batch = rollout.packed(samples, policy.model) if policy.shares_prefix else rollout.padded(samples)
        self.token_counts.add_pass(rollout, samples, batch, is_padding=split.is_padding)
        if policy.idle_media is not None:
            missing = {kind: inputs for kind, inputs in policy.idle_media.items() if _PIXELS[kind] not in batch.inputs}
            batch.inputs["idle_media"] = missing
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
            mask = rollout.sampled_mask[split.samples]
            result[split.samples] = result.new_zeros(mask.shape).masked_scatter_(mask, logps)
        return result

    @property
    def head_arguments(self) -> dict:
        """The arguments ``arguments`` and ``temperature`` of ``completion_logps`` and ``completion_loss``."""
        return {"arguments": self.policy.logit_arguments, "temperature": self.args.temperature}
