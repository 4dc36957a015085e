"""Scoring completions: the one place that decodes them and calls reward functions, for training and for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vlmkernels.data.decoding import decode_completions
from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.answers import THINK, Messages, ends_in_think, text_of
from vlmkernels.rewards.signature import PROVIDED
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.episodes import Episode, Episodes

Size = tuple[int, int]

_TAIL = 32  # tokens at the end of a prompt in which <think> is searched


@dataclass(frozen=True)
class Scored:
    """N completions with their scores.

    Args:
        samples: the sample of each completion.
        completions: what the reward functions got: texts, or conversations of one message, or with tools of all messages.
        scores: the scores of all reward functions.
        episodes: the trajectories with tools; None without tools.
    """

    samples: list[Sample]
    completions: list[str | Messages]
    scores: Scores
    episodes: list[Episode] | None = None

    def select(self, completions: torch.Tensor) -> "Scored":
        """Return the completions with these indices, (n,) int64."""
        picked: dict[str, list] = {}
        for name in ("samples", "completions", "episodes"):
            if (values := getattr(self, name)) is not None:
                picked[name] = [values[k] for k in completions.tolist()]
        return Scored(scores=self.scores.select(completions), **picked)

    @classmethod
    def join(cls, parts: Sequence["Scored"]) -> "Scored":
        """Join the completions of several batches, all with tools or all without."""
        episodes = None if parts[0].episodes is None else [e for part in parts for e in part.episodes or ()]
        samples, completions = [s for part in parts for s in part.samples], [c for part in parts for c in part.completions]
        return cls(samples, completions, Scores.cat([part.scores for part in parts]), episodes)


def score(
    rewards: Rewards,
    samples: Sequence[Sample],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    resized_sizes: Sequence[list[Size] | None],
    *,
    think_opened: Sequence[bool | None] | None = None,
    episodes: Sequence[Episode] | None = None,
    sampled_ids: Sequence[list[int]] | None = None,
    columns: bool = True,
    **arguments: Any,
) -> Scored:
    """Call the reward functions on N completions.

    Args:
        samples: the sample of each completion.
        texts: the completions; see ``decode_completions``.
        completion_ids: token ids of each completion; an empty list if they are unknown.
        resized_sizes: (width, height) of the images of each completion's prompt as the model saw them; None if unknown.
        think_opened: see ``opens_think``. Default: unknown.
        episodes: the trajectories of the completions, whose messages the reward functions get instead of ``texts``.
        sampled_ids: with ``episodes``, the tokens of ``completion_ids`` that the model sampled. Default: all.
        columns: whether to pass the other columns of the dataset to the reward functions.
        arguments: further arguments of the reward functions, for example ``trainer_state``.
    """
    completions: list[str | Messages] = [
        text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": text}]
        for sample, text in zip(samples, texts, strict=True)
    ]
    if episodes is not None:
        completions = [episode.messages for episode in episodes]
    per_completion = {
        "prompts": [sample.row["prompt"] for sample in samples],
        "completions": completions,
        "completion_ids": list(completion_ids),
        "think_opened": [None] * len(samples) if think_opened is None else list(think_opened),
        "images": [sample.images for sample in samples],
        "image_sizes": [[image.size for image in sample.images] for sample in samples],
        "resized_sizes": list(resized_sizes),
    }
    if columns:
        names = {name for sample in samples for name in sample.row} - {"prompt", *PROVIDED}
        per_completion |= {name: [sample.row.get(name) for sample in samples] for name in sorted(names)}
    indices, num_turns, scored = [sample.index for sample in samples], None, list(range(len(samples)))
    if episodes is not None:
        num_turns = [episode.num_turns for episode in episodes]
        per_completion["sampled_ids"] = list(completion_ids if sampled_ids is None else sampled_ids)
        per_completion["tool_images"] = [episode.images for episode in episodes]
        per_completion["environments"] = [episode.environment for episode in episodes]
        per_completion["environment_rewards"] = [episode.rewards for episode in episodes]
        scored = [k for k, episode in enumerate(episodes) if episode.lost is None]
    if len(scored) < len(samples):
        per_completion = {name: [values[k] for k in scored] for name, values in per_completion.items()}
        indices, num_turns = ([values[k] for k in scored] for values in (indices, num_turns))
    if scored:
        scores = rewards(len(scored), indices, num_turns, **per_completion, **arguments)
    else:  # reward functions need not expect an empty batch
        nothing = torch.zeros(0, len(rewards.names))
        scores = Scores(nothing, nothing.bool(), nothing.bool(), torch.zeros(len(rewards.names), dtype=torch.float64))
    if len(scored) < len(samples):
        scores = scores.expand(scored, len(samples))
    return Scored(list(samples), completions, scores, None if episodes is None else list(episodes))


def score_rollout(
    rewards: Rewards,
    samples: Sequence[Sample],
    rollout: Rollout,
    processor: Any,
    episodes: Episodes | None = None,
    *,
    columns: bool = True,
    **arguments: Any,
) -> Scored:
    """Decode the completions of a rollout and call the reward functions on them.

    Args:
        samples: the P samples that ``rollout.prompts`` encodes; with ``episodes``, theirs are used instead.
        rollout: P prompts and N completions.
        processor: the model's processor or tokenizer.
        episodes: the conversations of the completions with their tools, which end here; None without tools.
        columns, arguments: see ``score``.
    """
    samples = samples if episodes is None else episodes.samples
    ids, tokenizer = rollout.token_ids(), tokenizer_of(processor)
    sizes, group = resized_sizes(rollout.prompts, processor), rollout.group.tolist()
    # A conversation has its reasoning between tags, or in a key of its own, whether or not the prompt has opened it.
    opened = opens_think(samples, rollout.prompts, tokenizer) if episodes is None else [None] * len(samples)
    return score(
        rewards,
        samples=[samples[index] for index in group],
        texts=decode_completions(tokenizer, ids),
        completion_ids=ids,
        resized_sizes=[sizes[index] for index in group],
        think_opened=[opened[index] for index in group],
        episodes=None if episodes is None else episodes.results(),
        sampled_ids=None if episodes is None else rollout.sampled_ids(),
        columns=columns,
        **arguments,
    )


def opens_think(samples: Sequence[Sample], prompts: ModelInputs, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Return for each prompt whether it ends with ``<think>``, so that its completions begin within this element.

    Args:
        samples: the P samples that ``prompts`` encodes.
        prompts: the P encoded prompts.
        tokenizer: the model's tokenizer.
    """
    tails = tokenizer.batch_decode(prompts.inputs["input_ids"][:, -_TAIL:], skip_special_tokens=False)
    return [ends_in_think(tail) or _continues_think(sample) for sample, tail in zip(samples, tails, strict=True)]


def _continues_think(sample: Sample) -> bool:
    """Return whether a conversation ends with an assistant's message whose ``<think>`` element is open."""
    if isinstance(sample.prompt, str) or sample.prompt[-1]["role"] != "assistant":
        return False
    text = text_of(sample.prompt[-1:])
    return text.rfind(THINK) > text.rfind("</think>")


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
