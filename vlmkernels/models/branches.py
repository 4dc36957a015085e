"""Completions after their prompt and after the prompt with other images, in one forward pass.

In a pack, the tokens before the first image occur once; each branch has its own copy of the rest of the prompt and of the
completions::

    text before the images -> images, question          -> completions
                           -> masked images, question   -> the same completions
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs, concat, text_columns
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.packs import ScoringBatch, media_marks, pack_trees, pad_completions
from vlmkernels.models.trajectories import join


def split_at_images(prompts: ModelInputs) -> tuple[ModelInputs, ModelInputs]:
    """Return the tokens of P prompts before their first image or video, and the rest of the prompts.

    Prompts without images are all in the first part. Where image tokens attend to the tokens before them (PaliGemma, Molmo 2),
    prompts with images are all in the second part.
    """
    family, mask = prompts.family, prompts.inputs["attention_mask"].bool()
    is_media = torch.stack([*media_marks(prompts).values()]).any(0) & mask if family.media_tokens else torch.zeros_like(mask)
    is_rest = is_media.cummax(1).values
    if family.bidirectional is not None and family.bidirectional.linked:
        is_rest = is_rest[:, -1:].expand_as(mask)
    rows = {axis: n if axis in ("token", "stack") else torch.zeros_like(n) for axis, n in prompts.rows.items()}
    keys = None if prompts.image_keys is None else prompts.image_keys[:0]
    tokens = {name: x for name, x in prompts.inputs.items() if family.axis(name) == "token"}
    before = replace(prompts, inputs=_only(tokens, mask & ~is_rest), rows=rows, image_keys=keys)
    return before, replace(prompts, inputs=prompts.inputs | _only(tokens, mask & is_rest))


def _only(tokens: dict[str, torch.Tensor], kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs that have a value per token, with padding in place of the tokens that are not kept."""
    return {name: x.masked_fill(~kept, 0) for name, x in tokens.items()}


def branch_lengths(prompts: ModelInputs) -> tuple[list[int], list[int]]:
    """Return, for P prompts, the tokens of both branches in a pack, and how often each completion occurs: 2 with images."""
    before, rest = (part.inputs["attention_mask"].sum(1).tolist() for part in split_at_images(prompts))
    times = [1 + int(some) for some in has_media(prompts)]
    return [first + n * second for first, second, n in zip(before, rest, times, strict=True)], times


def pack_branches(
    model: PreTrainedModel,
    prompts: ModelInputs,
    masked: ModelInputs,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    loss_mask: torch.Tensor,
) -> ScoringBatch:
    """Build one pack of both branches of some completions.

    Args:
        model: a transformers model without adapters.
        prompts, masked: the model inputs of P prompts, and the same with other images.
        group: (n,) int64 on the CPU, the prompt of each completion, ascending.
        completion_ids, completion_mask: (n, C), right-padded completions and their tokens.
        loss_mask: (n, C) bool, the tokens to score.

    Returns:
        The pack: for each prompt the tokens before its images, the rest of it and its completions, and, with images, both
        again after the other images. It scores the tokens of all completions after ``prompts``, and then those of the
        completions whose prompt has an image or video after ``masked``. Without images both branches would be equal.
    """
    chosen, owner = group.unique_consecutive(return_inverse=True)
    count, owners, doubled = len(chosen), owner.tolist(), has_media(prompts)[chosen].tolist()
    before, rest = split_at_images(prompts.select(chosen))
    parts = [before, rest, split_at_images(masked.select(chosen))[1], _text(completion_ids, completion_mask, prompts.family)]
    order: list[int] = []  # places among the rows of all parts
    parents: list[int] = []
    nodes: list[list[int]] = [[], []]  # by branch, of the completions
    for prompt in range(count):
        members = [3 * count + k for k, other in enumerate(owners) if other == prompt]
        root = len(order)
        order.append(prompt)
        parents.append(-1)
        for branch in range(1 + doubled[prompt]):
            start = len(order)
            order += [(1 + branch) * count + prompt, *members]
            parents += [root, *[start] * len(members)]
            nodes[branch] += range(start + 1, start + 1 + len(members))
    segments = join(parts).select(torch.tensor(order))
    again = torch.tensor(doubled)[owner].nonzero()[:, 0]
    masks = torch.cat([loss_mask, loss_mask[again.to(loss_mask.device, non_blocking=True)]])
    scored = torch.zeros_like(segments.inputs["input_ids"], dtype=torch.bool)
    order_of_masks = torch.tensor(nodes[0] + nodes[1]).to(scored.device, non_blocking=True)
    scored[order_of_masks, -masks.shape[1] :] = masks.to(scored.device)
    pack = pack_trees(model, segments, parents, scored)
    return pack.select(_positions(nodes[0] + nodes[1], masks.sum(1).tolist()).to(pack.rows.device, non_blocking=True))


def _text(ids: torch.Tensor, mask: torch.Tensor, family: Family) -> ModelInputs:
    inputs = text_columns(ids, mask.long(), family)
    none = torch.zeros(len(ids), dtype=torch.int64)
    return replace(ModelInputs.from_processor(inputs, family, none), image_keys=none[:0])


def _positions(nodes: list[int], counts: list[int]) -> torch.Tensor:
    """Return the order of the scored tokens of a pack, which scores node by node, that lists them by ``nodes``."""
    number = dict(zip(nodes, counts, strict=True))
    ends = dict(zip(sorted(nodes), torch.tensor([number[node] for node in sorted(nodes)]).cumsum(0).tolist(), strict=True))
    return torch.cat([torch.arange(ends[node] - number[node], ends[node]) for node in nodes])


def pad_branches(
    prompts: ModelInputs,
    masked: ModelInputs,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    loss_mask: torch.Tensor,
) -> ScoringBatch:
    """Build a batch of both branches in which each completion has its own copy of its prompt; see ``pack_branches``."""
    is_doubled = has_media(prompts)[group]
    places = is_doubled.nonzero()[:, 0].to(completion_ids.device, non_blocking=True)
    width = int(completion_mask.any(0).sum())
    ids, mask, scored = (torch.cat([x, x[places]])[:, :width] for x in (completion_ids, completion_mask, loss_mask))
    rows = concat([prompts.select(group), masked.select(group[is_doubled])], pad_token_id=0)
    return pad_completions(rows.trim().append(ids, mask).inputs, scored)
