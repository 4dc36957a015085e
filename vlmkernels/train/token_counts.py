"""Counts of the tokens and images that a run's model processes, with shared prompts and as if prompts were not shared."""

from collections import Counter

import torch

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.rollout.base import Rollout

NAMES = ("tokens_run", "tokens_if_unshared", "images_run", "images_if_unshared")


class TokenCounts:
    """Counts tokens and images of one process since the last ``flush``. It uses shapes and lengths that are on the host.

    tokens_run: tokens of prompts (including image tokens), completions and padding in every pass: in sampling, and in the
        passes of the old policy, the reference, the teacher and the policy, where forward and backward count as one pass.
    tokens_if_unshared: tokens of the same passes if every completion had its own copy of the prompt, without padding:
        G * (P + C) for a group of G completions of C tokens and a prompt of P tokens.
    images_run, images_if_unshared: the same for images that the vision tower processes.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._measured: torch.Tensor | None = None  # the completion mask of the last rollout

    def _measure(self, rollout: Rollout) -> None:
        """Store the tokens and images of each completion with its prompt, once per generation batch."""
        if self._measured is not rollout.completion_mask:
            self._measured = rollout.completion_mask
            prompt_lengths = rollout.prompts.inputs["attention_mask"].sum(1).cpu()
            self._lengths = prompt_lengths[rollout.group] + rollout.completion_mask.sum(1).cpu()
            self._images = rollout.prompts.num_images[rollout.group]
            if (turns := rollout.turns) is not None:
                self._images = self._images.index_add(0, turns.trajectory, turns.inputs.num_images)

    def add_sampling(self, rollout: Rollout, *, shares_prefix: bool) -> None:
        """Count the sampling of a rollout.

        Args:
            shares_prefix: whether the engine ran each prompt once for all its completions.
        """
        self._measure(rollout)
        prompts, keys = rollout.prompts, rollout.prompts.image_keys
        if shares_prefix:
            tokens = prompts.inputs["attention_mask"].sum() + rollout.completion_mask.sum()
            images = prompts.num_images.sum() if keys is None else len(keys.unique())
            if rollout.turns is not None:
                images = images + _images_of_results(rollout.turns.inputs)
        else:
            width = prompts.inputs["attention_mask"].shape[1] + rollout.completion_mask.shape[1]
            tokens, images = len(rollout.group) * width, self._images.sum()
            if "image_features" in prompts.inputs:  # encoded after sampling, for the scoring passes
                images = images + len(keys.unique())
        masked = rollout.masked_prompts
        if masked is not None and "image_features" in masked.inputs:
            images = images + masked.num_images.sum()
        self._add(tokens, self._lengths.sum(), images, self._images.sum())

    def add_pass(
        self, rollout: Rollout, samples: torch.Tensor, batch: ScoringBatch, *, is_padding: bool, branches: bool = False
    ) -> None:
        """Count one scoring pass.

        Args:
            samples: (n,) int64, indices of the completions.
            batch: the inputs of the model.
            is_padding: whether the pass is a repetition that keeps ranks in lockstep; ``*_if_unshared`` do not count it.
            branches: whether the pass runs completions with masked images too.
        """
        self._measure(rollout)
        index = batch.inputs.get("image_index")
        if "image_features" in batch.inputs:  # counted in add_sampling
            images = 0
        elif index is not None:
            images = int(index.max()) + 1
        elif rollout.turns is not None and "tree_layout" in batch.inputs:  # equal beginnings run once
            tree = rollout.turns.tree(len(rollout.prompts), rollout.group.tolist(), samples.tolist())
            images = torch.cat([rollout.prompts.num_images, rollout.turns.inputs.num_images])[tree.segments].sum()
        elif rollout.turns is not None:
            images = self._images[samples].sum()
        else:
            prompts = rollout.group[samples]
            images = rollout.prompts.num_images[prompts.unique() if "tree_layout" in batch.inputs else prompts].sum()
            images = images * (1 + branches)
        needed = samples[:0] if is_padding else samples
        times = 1 + branches * has_media(rollout.prompts)[rollout.group[needed]].long()  # of each completion
        counts = (times * self._lengths[needed]).sum(), images, (times * self._images[needed]).sum()
        self._add(batch.inputs["input_ids"].numel(), *counts)

    def _add(self, *values: int | torch.Tensor) -> None:
        for name, value in zip(NAMES, values, strict=True):
            self._counts[name] += int(value)

    def flush(self) -> Counter[str]:
        """Return the counts since the last call."""
        counts, self._counts = self._counts, Counter()
        return counts


def _images_of_results(results: ModelInputs) -> int:
    """Return how many images of results the vision tower ran in sampling: the images of equal results once."""
    if results.image_keys is None:
        return int(results.num_images.sum())
    return sum(map(len, {tuple(keys.tolist()) for keys in results.image_keys.split(results.num_images.tolist())}))
