"""The masked images of a run: black patches for the perception terms of the loss, grey images to measure what images add."""

from typing import Any

import torch

from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.masked_images import BLACK, mask_images, patch_size_of, uniform_pixels
from vlmkernels.ops.grpo_loss.config import PERCEPTION_WEIGHTS
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.prepare import PreparedModel


def check_perception(args: GRPOConfig, family: Family, media: set[str], *, has_tools: bool) -> None:
    """Check that the datasets of a run have images to mask.

    Args:
        media: the kinds of media that training can have.

    Raises:
        ValueError: a setting needs images and there are none, or does not work with tools.
    """
    for name in (*PERCEPTION_WEIGHTS, "image_use_steps"):
        if not (value := getattr(args, name)):
            continue
        off = "None" if name == "image_use_steps" else "0"
        if has_tools:
            raise ValueError(f"{name} must be {off} with tools, whose results would need masked images too, got {value}")
        if not media:
            raise ValueError(f"{name} must be {off} for a train_dataset without images ({family.name} model), got {value}")


class PerceptionMasks:
    """Masks the images of prompts for the perception terms of the loss.

    The masks depend on the seed, the step and the process, and not on random states.

    Args:
        processor: the processor of the policy.
        policy: how the policy runs.
        media: the kinds of media that training can have.
    """

    def __init__(self, processor: Any, policy: PreparedModel, args: GRPOConfig, media: set[str]) -> None:
        self._args = args
        self._black = uniform_pixels(processor, BLACK, media, policy.processor_arguments)
        self._patch_size = patch_size_of(policy.model.config)

    def __call__(self, prompts: ModelInputs, step: int) -> ModelInputs:
        """Return the prompts with masked images.

        Args:
            step: number of optimizer steps done.
        """
        args, generator = self._args, torch.Generator()
        generator.manual_seed(((args.seed * 1_000_003 + step) * 65_537 + args.process_index) % 2**63)
        return mask_images(prompts, self._black, args.mask_ratio, generator=generator, patch_size=self._patch_size)
