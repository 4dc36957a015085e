"""Scoring completions: the one place that decodes them and calls reward functions, for training and for evaluation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.answers import THINK, ends_in_think, text_of
from vlmkernels.rewards.signature import PROVIDED
from vlmkernels.rollout.base import Rollout

Size = tuple[int, int]

# Special tokens that are tags of an answer: <think>, </answer>, <box>, <|box_start|>, <|end_of_box|>, <loc0012>, ...
_TAG = re.compile(
    r"</?([a-z_]+|(?:loc|seg)\d+)>|<\|([a-z_]+)_(?:start|end)\|>|<\|(?:begin|start|end)_of_([a-z_]+)\|>", re.IGNORECASE
)
# Words in the names of other special tokens of these forms: <pad>, </s>, <|im_end|>, <end_of_turn>, <|vision_start|>, ...
_CONTROL = {
    *("s", "bos", "eos", "pad", "unk", "cls", "sep", "mask", "text", "sentence", "document", "sop", "eop", "eot", "eom"),
    *("im", "turn", "utterance", "role", "message", "msg", "header", "user", "assistant", "system"),
    *("image", "img", "boi", "eoi", "vision", "video", "audio", "media"),
}
_TAIL = 32  # tokens at the end of a prompt in which <think> is searched


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
    think_opened: Sequence[bool | None] | None = None,
    columns: bool = True,
    **arguments: Any,
) -> Scored:
    """Call the reward functions on N completions.

    Args:
        rewards: the reward functions.
        samples: the sample of each completion.
        texts: the completions; see ``decode_completions``.
        completion_ids: token ids of each completion; an empty list if they are unknown.
        resized_sizes: (width, height) of the images of each completion's prompt as the model saw them; None if unknown.
        think_opened: see ``opens_think``. Default: unknown.
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
        think_opened=[None] * len(samples) if think_opened is None else list(think_opened),
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
    ids, tokenizer = rollout.token_ids(), tokenizer_of(processor)
    sizes, group = resized_sizes(rollout.prompts, processor), rollout.group.tolist()
    opened = opens_think(samples, rollout.prompts, tokenizer)
    return score(
        rewards,
        samples=[samples[index] for index in group],
        texts=decode_completions(tokenizer, ids),
        completion_ids=ids,
        resized_sizes=[sizes[index] for index in group],
        think_opened=[opened[index] for index in group],
        columns=columns,
        **arguments,
    )


def decode_completions(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """Decode completions without special tokens, except for those that are tags of an answer.

    ``skip_special_tokens=True``, as in TRL, would also remove ``<think>``, ``<answer>`` or ``<|box_start|>`` in tokenizers that
    declare them as special tokens.
    """
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    hidden = {token for token, text in special.items() if not _is_tag(text)}
    kept = [[token for token in ids if token not in hidden] for ids in completion_ids]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def _is_tag(text: str) -> bool:
    """Return whether the text of a special token is a tag of an answer."""
    match = _TAG.fullmatch(text)
    return match is not None and _CONTROL.isdisjoint(match[match.lastindex or 0].lower().split("_"))


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
