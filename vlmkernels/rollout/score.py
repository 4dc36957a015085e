"""Completions as text, their rewards, and both on a page."""

from dataclasses import dataclass

import torch
from PIL import Image

from vlmkernels.data.samples import Sample
from vlmkernels.models.inputs import Batch
from vlmkernels.record.completions import Row
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.answers import text_of
from vlmkernels.rewards.builtin import PROVIDED
from vlmkernels.rollout.generate import Rollout


@dataclass(frozen=True)
class Scored:
    """N completions as the reward functions saw them: each one's sample, itself, and its scores."""

    samples: list[Sample]
    completions: list
    scores: Scores


def resized_sizes(prompts: Batch, processor) -> list[list[tuple[int, int]] | None]:
    """(width, height) of each prompt's images as its model sees them, after the processor's resize; None where the model inputs
    do not tell, as they do of images that are rows of patches."""
    if "image_grid_thw" not in prompts.inputs:
        return [None if count else [] for count in prompts.num_images.tolist()]
    patch = processor.image_processor.patch_size
    sizes = [(width * patch, height * patch) for _, height, width in prompts.inputs["image_grid_thw"].tolist()]
    ends = prompts.num_images.cumsum(0).tolist()
    return [sizes[end - count : end] for end, count in zip(ends, prompts.num_images.tolist(), strict=True)]


def score(
    samples: list[Sample], rollout: Rollout, rewards: Rewards, processor, tokenizer, *, columns: bool = True, **arguments
) -> Scored:
    """Call the reward functions on a rollout.

    Args:
        samples: one per completion.
        columns: also pass the dataset's other columns.
        arguments: passed on to the functions.
    """
    ids = [i[m].tolist() for i, m in zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)]
    completions = [
        text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": text}]
        for sample, text in zip(samples, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
    ]
    resized = resized_sizes(rollout.prompts, processor)
    if columns:
        names = {name for sample in samples for name in sample.row} - {"prompt", *PROVIDED}
        arguments |= {name: [sample.row.get(name) for sample in samples] for name in sorted(names)}
    result = rewards(
        len(samples),
        [sample.index for sample in samples],
        prompts=[sample.row["prompt"] for sample in samples],
        completions=completions,
        completion_ids=ids,
        images=[sample.images for sample in samples],
        image_sizes=[[image.size for image in sample.images] for sample in samples],
        resized_sizes=[resized[index] for index in rollout.group.tolist()],
        **arguments,
    )
    return Scored(samples, completions, result)


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as a person reads it."""
    if isinstance(prompt, str):
        return prompt
    parts = lambda m: [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]  # noqa: E731
    text = lambda m: "".join(part["text"] for part in parts(m) if part["type"] == "text")  # noqa: E731
    return "\n".join(f"{message['role']}: {text(message)}" for message in prompt)


def pictures(sample: Sample) -> list[Image.Image]:
    """Its images, and the first frame of each of its videos."""
    return sample.images + [Image.fromarray(video[0].permute(1, 2, 0).cpu().numpy()) for video in sample.videos]


def page_groups(scored: Scored, advantages: torch.Tensor, names: list[str], group_size: int, limit: int | None):
    """The rows of a page of completions, group by group, of at most ``limit`` completions."""
    advantages, rewards = advantages.tolist(), scored.scores.rewards.tolist()
    rows = [
        Row(prompt_text(s.prompt), pictures(s), text_of(c), dict(zip(names, r, strict=True)), a)
        for s, c, r, a in zip(scored.samples, scored.completions, rewards, advantages, strict=True)
    ][:limit]
    return [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
