"""What a generation batch in training has of its images, besides the pixels that sampling reads."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.record.phases import Phases
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.image_use import ImageUse, Measure, steps_between
from vlmkernels.train.masks import PerceptionMasks
from vlmkernels.train.passes import policy_view
from vlmkernels.train.prepare import PreparedModel


class BatchImages:
    """Masked images for the perception terms, features for the policy, pixels for a teacher, and the measurement of image use.

    Args:
        processor: the processor of the policy.
        policy: how the policy runs. If it reuses image features, rollouts get them in place of pixels.
        media: the kinds of media that training can have.
        phases: times the measurements.
        has_tools: whether the run has tools.
        keeps_pixels: whether pixels stay beside the features, for a teacher.

    Attributes:
        masks: masks images for the perception terms, or None.
        image_use: measures the use of images, or None.
    """

    def __init__(
        self,
        processor: Any,
        policy: PreparedModel,
        args: GRPOConfig,
        media: set[str],
        phases: Phases,
        *,
        has_tools: bool,
        keeps_pixels: bool,
    ) -> None:
        self._policy, self._phases, self._keeps_pixels = policy, phases, keeps_pixels
        self.masks = PerceptionMasks(processor, policy, args, media) if args.masks_images else None
        every = steps_between(args, media, has_tools=has_tools)
        self.image_use = None if every is None else ImageUse(processor, policy, args, media, every)

    def prepare(
        self, prompts: ModelInputs, step: int
    ) -> Callable[[PreTrainedModel, Rollout], tuple[Rollout, dict[str, float]]]:
        """Return a function of the policy and the rollout of ``prompts`` that completes the rollout, and returns metrics.

        Pixels that only sampling needs need not be kept until then.

        Args:
            prompts: the prompts of a generation batch, with pixels.
            step: number of optimizer steps done.
        """
        masked = None if self.masks is None else self.masks(prompts, step)
        measure = None if self.image_use is None else self.image_use.prepare(prompts, step)
        return partial(self._complete, masked, prompts if self._keeps_pixels else None, measure)

    def _complete(
        self,
        masked: ModelInputs | None,
        pixels: ModelInputs | None,
        measure: Measure | None,
        model: PreTrainedModel,
        rollout: Rollout,
    ) -> tuple[Rollout, dict[str, float]]:
        rollout = replace(rollout, masked_prompts=masked)
        if self._policy.reuses_image_features:
            rollout = rollout.with_image_features(self._policy.model, pixels)
        if measure is None:
            return rollout, {}
        with self._phases("image_use"):
            return rollout, measure(model, policy_view(rollout))
