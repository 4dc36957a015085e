"""Tokens and images that a run puts through its model, and what one without shared prompts would have."""

from collections import Counter

import torch

from vlmkernels.models.group import ScoringBatch
from vlmkernels.record.phases import Phases
from vlmkernels.rollout.generate import Rollout


class Work:
    """Counts of one process since they were last taken, made of shapes and of lengths that are on the host anyway.

    tokens_run: of prompts (image tokens included) and completions, once for each time the model runs on them: while sampling,
        and in the passes of old policy, reference and policy, where forward and backward are one. Padding is run too; so is,
        by this count, the last token of a completion while sampling.
    tokens_if_unshared: what the same passes take with a copy of the prompt for each completion, G·(P + C) for a group of G
        completions of C tokens behind a prompt of P, without padding.
    images_run, images_if_unshared: likewise of images through the vision tower.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._measured: Rollout | None = None
        self._samples: torch.Tensor | None = None

    def _measure(self, rollout: Rollout) -> None:
        """Tokens and images of each completion with its prompt; once per generation batch."""
        if self._measured is not rollout:
            self._measured = rollout
            prompts = rollout.prompts.inputs["attention_mask"].sum(1).cpu()
            self._lengths = prompts[rollout.group] + rollout.completion_mask.sum(1).cpu()
            self._images = rollout.prompts.num_images[rollout.group]

    def sampled(self, rollout: Rollout, *, shared: bool) -> None:
        """Count the making of a rollout; shared: by ``decode_groups``."""
        self._measure(rollout)
        prompts, keys = rollout.prompts, rollout.prompts.image_keys
        if shared:
            tokens = prompts.inputs["attention_mask"].sum() + rollout.completion_mask.sum()
            images = prompts.num_images.sum() if keys is None else len(keys.unique())
        else:
            width = prompts.inputs["attention_mask"].shape[1] + rollout.completion_mask.shape[1]
            tokens, images = len(rollout.group) * width, self._images.sum()
            if "image_features" in prompts.inputs:  # made for the passes to come
                images = images + len(keys.unique())
        self._add(tokens, self._lengths.sum(), images, self._images.sum())

    def scored(self, rollout: Rollout, samples: torch.Tensor, batch: ScoringBatch) -> None:
        """Count one pass over some completions; batch: what the model runs on.

        The same ``samples``, the very tensor, twice in a row are a pass for nothing: run, but needed by nobody.
        """
        self._measure(rollout)
        needed, self._samples = samples is not self._samples, samples
        index = batch.inputs.get("image_index")
        if "image_features" in batch.inputs:  # of the tower's one pass, in sampled
            images = 0
        elif index is not None:
            images = int(index.max()) + 1
        else:
            chosen = rollout.group[samples]
            images = rollout.prompts.num_images[chosen.unique() if "group_layout" in batch.inputs else chosen].sum()
        unshared = needed * self._lengths[samples].sum(), needed * self._images[samples].sum()
        self._add(batch.inputs["input_ids"].numel(), unshared[0], images, unshared[1])

    def _add(self, tokens: int, tokens_unshared: int, images: int, images_unshared: int) -> None:
        self._counts["tokens_run"] += int(tokens)
        self._counts["tokens_if_unshared"] += int(tokens_unshared)
        self._counts["images_run"] += int(images)
        self._counts["images_if_unshared"] += int(images_unshared)

    def take(self) -> Counter[str]:
        counts, self._counts = self._counts, Counter()
        return counts


def step_metrics(phases: Phases, work: Work, num_processes: int) -> dict[str, float]:
    """Since the last call, per optimiser step: seconds of each phase, and the counts of all processes where this one's are
    average, as their mean over processes is."""
    seconds, steps = phases.take()
    counts, steps = work.take(), max(steps, 1)
    metrics = {f"time/{name}": value / steps for name, value in seconds.items()}
    names = ("tokens_run", "tokens_if_unshared", "images_run", "images_if_unshared")
    metrics |= {name: counts[name] * num_processes / steps for name in names}
    training = sum(seconds.values()) - seconds["evaluate"] - seconds["save"]
    return metrics | {"tokens_per_second": metrics["tokens_run"] * steps / max(training, 1e-9)}
