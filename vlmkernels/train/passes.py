"""The forward passes of the policy, its reference and its teacher over the splits of a generation batch."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from vlmkernels.models.families import PIXELS, Family
from vlmkernels.models.head import completion_logps
from vlmkernels.models.image_features import without_pixels
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.micro_batches import Split
from vlmkernels.train.prepare import PreparedModel
from vlmkernels.train.token_counts import TokenCounts

# What a model reads of a rollout, which can hold the inputs of several models


def policy_view(rollout: Rollout) -> Rollout:
    """Return the rollout with features of its images, where it has features beside the pixels."""
    return rollout.with_inputs(without_pixels)


def reference_view(rollout: Rollout) -> Rollout:
    """Return the rollout for the reference, whose routers choose as they did in its training."""
    return replace(policy_view(rollout), routed_experts=None)


def teacher_view(rollout: Rollout, family: Family) -> Rollout:
    """Return the rollout with the inputs of a teacher's family: pixels, because features are those of the policy's tower."""

    def own(inputs: ModelInputs) -> ModelInputs:
        return replace(inputs, inputs={n: x for n, x in inputs.inputs.items() if n in family.inputs}, family=family)

    return replace(rollout.with_inputs(own), routed_experts=None)


class Passes:
    """Builds the inputs of one model's forward passes, and counts their tokens and images.

    Args:
        prepared: how the model runs.
        token_counts: the counts of all models of the run.
        view: returns what the model reads of a rollout.
    """

    def __init__(
        self, prepared: PreparedModel, args: GRPOConfig, token_counts: TokenCounts, view: Callable[[Rollout], Rollout]
    ) -> None:
        self.prepared, self.args, self.token_counts = prepared, args, token_counts
        self._view = view
        self._viewed: tuple[Rollout | None, Rollout | None] = None, None

    def view(self, rollout: Rollout) -> Rollout:
        """Return what the model reads of a rollout. Keeps the last result, which caches what is computed from it."""
        if self._viewed[0] is not rollout:
            self._viewed = rollout, self._view(rollout)
        viewed = self._viewed[1]
        assert viewed is not None
        return viewed

    def scoring_batch(self, rollout: Rollout, split: Split) -> ScoringBatch:
        """Return the model inputs of a split, and count its tokens and images."""
        model, samples, rollout = self.prepared.model, split.samples, self.view(rollout)
        batch = rollout.packed(samples, model) if self.prepared.shares_prefix else rollout.padded(samples)
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
        rollout = self.view(rollout)
        batch = rollout.branches(samples, self.prepared.model if self.prepared.shares_prefix else None, loss_mask)
        masked = has_media(rollout.prompts)[rollout.group[samples]].to(loss_mask.device, non_blocking=True)
        return self._completed(rollout, split, batch, branches=True), masked

    def _completed(self, rollout: Rollout, split: Split, batch: ScoringBatch, *, branches: bool = False) -> ScoringBatch:
        """Count the tokens and images of a pass, and add the media that keep ranks in lockstep."""
        self.token_counts.add_pass(rollout, split.samples, batch, is_padding=split.is_padding, branches=branches)
        if self.prepared.idle_media is not None:
            idle = self.prepared.idle_media.items()
            batch.inputs["idle_media"] = {kind: inputs for kind, inputs in idle if PIXELS[kind] not in batch.inputs}
        return batch

    def logps(self, model: torch.nn.Module, rollout: Rollout, splits: Iterable[Split]) -> torch.Tensor:
        """Compute log-probabilities (B, C) of the sampled tokens; 0 at other tokens and in other splits.

        Args:
            model: the model, perhaps wrapped.
            splits: the completions to compute.
        """
        result = torch.zeros(rollout.completion_mask.shape, device=rollout.completion_mask.device)
        for split in splits:
            logps = completion_logps(model, self.scoring_batch(rollout, split), **self.head_arguments)
            samples = split.samples.to(result.device, non_blocking=True)
            mask = rollout.sampled_mask[samples]
            result[samples] = result.new_zeros(mask.shape).masked_scatter_(mask, logps)
        return result

    @property
    def head_arguments(self) -> dict:
        """The arguments ``head``, ``arguments`` and ``temperature`` of ``completion_logps`` and ``completion_loss``."""
        prepared = self.prepared
        return {"head": prepared.head, "arguments": prepared.logit_arguments, "temperature": self.args.temperature}
