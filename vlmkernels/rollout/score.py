"""Scoring completions: the one place that calls reward functions, for training and for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.signature import PROVIDED
from vlmkernels.rollout.base import Rollout

Size = tuple[int, int]


@dataclass(frozen=True)
class Scored:
    """N completions with their scores.

    Args:
        samples: the sample of each completion.
        completions: what the reward functions got: texts, or conversations of one message.
        scores: the scores of all reward functions.
    """

    samples: list[Sample]
    completions: list[str | list[dict[str, str]]]
    scores: Scores


def score(
    rewards: Rewards,
    samples: Sequence[Sample],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    resized_sizes: Sequence[list[Size] | None],
    *,
    columns: bool = True,
    **arguments: Any,
) -> Scored:
    """Call the reward functions on N completions.

    Args:
        rewards: the reward functions.
        samples: the sample of each completion.
        texts: the completions, without special tokens.
        completion_ids: token ids of each completion; an empty list if they are unknown.
        resized_sizes: (width, height) of the images of each completion's prompt as the model saw them; None if unknown.
        columns: whether to pass the other columns of the dataset to the reward functions.
        arguments: further arguments of the reward functions, for example ``trainer_state``.
    """
    completions: list[str | list[dict[str, str]]] = [
        text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": text}]
        for sample, text in zip(samples, texts, strict=True)
    ]
    if columns:
        names = {name for sample in samples for name in sample.row} - {"prompt", *PROVIDED}
        arguments |= {name: [sample.row.get(name) for sample in samples] for name in sorted(names)}
    scores = rewards(
        len(samples),
        [sample.index for sample in samples],
        prompts=[sample.row["prompt"] for sample in samples],
        completions=completions,
        completion_ids=list(completion_ids),
        images=[sample.images for sample in samples],
        image_sizes=[[image.size for image in sample.images] for sample in samples],
        resized_sizes=list(resized_sizes),
        **arguments,
    )
    return Scored(list(samples), completions, scores)


def score_rollout(
    rewards: Rewards, samples: Sequence[Sample], rollout: Rollout, processor: Any, *, columns: bool = True, **arguments: Any
) -> Scored:
    """Decode the completions of a rollout and call the reward functions on them.

    Args:
        rewards: the reward functions.
        samples: the P samples that ``rollout.prompts`` encodes.
        rollout: P prompts and N completions.
        processor: the model's processor or tokenizer.
        columns, arguments: see ``score``.
    """
    ids = rollout.token_ids()
    texts = tokenizer_of(processor).batch_decode(ids, skip_special_tokens=True)
    sizes, group = resized_sizes(rollout.prompts, processor), rollout.group.tolist()
    return score(
        rewards,
        samples=[samples[index] for index in group],
        texts=texts,
        completion_ids=ids,
        resized_sizes=[sizes[index] for index in group],
        columns=columns,
        **arguments,
    )


def resized_sizes(prompts: ModelInputs, processor: Any) -> list[list[Size] | None]:
    """Return (width, height) of each prompt's images after the processor's resize.

    The sizes are those in ``image_grid_thw``. In families without it, the entry of a prompt with images is None.
    """
    if "image_grid_thw" not in prompts.inputs:
        return [None if count else [] for count in prompts.num_images.tolist()]
    patch = processor.image_processor.patch_size
    sizes = [(width * patch, height * patch) for _, height, width in prompts.inputs["image_grid_thw"].tolist()]
    ends = prompts.num_images.cumsum(0).tolist()
    return [sizes[end - count : end] for end, count in zip(ends, prompts.num_images.tolist(), strict=True)]
