"""Packs: sequences without padding, in which each prompt with its images occurs once, followed by its completions."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from vlmkernels.models.families import family_of
from vlmkernels.ops.group_attention import GroupLayout
from vlmkernels.ops.mrope_positions import mrope_positions

# The model inputs, besides tokens, that the position ids of a prompt depend on.
_POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")


@dataclass(frozen=True)
class ScoringBatch:
    """Model inputs, and the N completion tokens in them to score, in the order of the completions.

    Attributes:
        inputs: the keyword arguments of the model's forward pass. A pack, [prefix | c1 | ... | cG] per group, is one sample of
            T tokens without padding: input_ids (1, T), position_ids, group_layout and the images' tensors.
        rows: (N,) int64, for each token the flat index into input_ids of the hidden state that predicts it. In a pack, the last
            token of a prompt predicts the first token of each of its completions.
        targets: (N,) int64, the tokens.
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    targets: torch.Tensor

    def select(self, tokens: torch.Tensor) -> "ScoringBatch":
        """Keep some of the completion tokens. The model inputs stay the same.

        Args:
            tokens: (N,) bool, the tokens to keep.
        """
        return replace(self, rows=self.rows[tokens], targets=self.targets[tokens])


def pad_completions(inputs: dict[str, torch.Tensor], completion_mask: torch.Tensor) -> ScoringBatch:
    """Build a batch in which each completion has its own copy of the prompt.

    Args:
        inputs: model inputs of the prompts followed by right-padded completions, input_ids (B, S + C).
        completion_mask: (B, C) bool, true on the tokens of a completion.
    """
    count, width = completion_mask.shape
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(count * length, device=completion_mask.device).view(count, length)[:, -width - 1 : -1]
    targets = inputs["input_ids"][:, length - width :]
    return ScoringBatch(inputs, positions[completion_mask], targets[completion_mask])


def prompt_positions(model: torch.nn.Module, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the position ids of padded prompts.

    Args:
        model: a transformers model without adapters.
        prompts: model inputs of P prompts, input_ids and attention_mask (P, S).

    Returns:
        (P, S) int64, or (3, P, S) for prompts with images in models with M-RoPE.

    Raises:
        NotImplementedError: the model's own function computes the positions and does not accept one of these inputs.
    """
    mask, rope_index = prompts["attention_mask"], getattr(model.base_model, "get_rope_index", None)
    if rope_index is None or not prompts.keys() & set(_POSITION_INPUTS):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    family = family_of(model.config)
    # transformers versions round the seconds per frame differently, so positions of timed videos come from the model.
    timed = "second_per_grid_ts" in family.inputs and "video_grid_thw" in prompts
    if family.frames_apart is not None and not timed:
        grids = (prompts.get(name) for name in ("image_grid_thw", "video_grid_thw"))
        sizes = {"merge_size": model.config.vision_config.spatial_merge_size, "frames_apart": family.frames_apart}
        return mrope_positions(prompts["mm_token_type_ids"], *grids, attention_mask=mask, **sizes).position_ids
    accepted = inspect.signature(rope_index).parameters
    inputs = {name: prompts[name] for name in _POSITION_INPUTS if name in prompts}
    if "mm_token_type_ids" not in accepted:  # then the positions do not depend on it
        inputs.pop("mm_token_type_ids", None)
    if unknown := inputs.keys() - accepted.keys():
        raise NotImplementedError(
            f"model must compute position ids from {', '.join(sorted(unknown))}, got {type(model).__name__} of transformers "
            f"{transformers.__version__}, whose get_rope_index does not accept it"
        )
    return rope_index(prompts["input_ids"], attention_mask=mask, **inputs)[0]


def cut_packs(
    prefixes: Sequence[int], group: Sequence[int], lengths: Sequence[int], max_tokens: int, hidden_size: int
) -> list[list[int]]:
    """Divide completions into packs of at most ``max_tokens`` tokens and about equal cost.

    A group that does not fit into one pack is split into as few parts as first-fit decreasing finds; each part repeats the
    prompt. The cost counts the operations of a transformer layer of hidden size H: 24 H^2 per token (linear layers) and 4 H per
    pair of tokens (attention).

    Args:
        prefixes: the number of tokens of each prompt.
        group: the index of each completion's prompt.
        lengths: the number of tokens of each completion.
        max_tokens: the largest number of tokens in a pack.
        hidden_size: H.

    Returns:
        The indices of the completions of each pack, ascending.

    Raises:
        ValueError: ``max_tokens`` is less than a prompt with one of its completions. The message says how many are needed.
    """

    def cost(tokens: int, pairs: float) -> float:
        return 6.0 * hidden_size * tokens + pairs

    parts, sizes, costs = [], [], []
    for index in sorted(set(group)):
        prefix, members = prefixes[index], [k for k, owner in enumerate(group) if owner == index]
        own = [lengths[k] for k in members]
        if prefix + max(own) > max_tokens:
            least = f"{prefix + max(own)}, a prompt of {prefix} tokens and a completion of {max(own)}"
            raise ValueError(f"max_tokens_per_microbatch must be at least {least}, got {max_tokens}")
        per_completion = [cost(length, length * (prefix + length / 2)) for length in own]
        for part in _bins(own, per_completion, max_tokens - prefix):
            parts.append([members[item] for item in part])
            sizes.append(prefix + sum(own[item] for item in part))
            costs.append(cost(prefix, prefix**2 / 2) + sum(per_completion[item] for item in part))
    packs = [sorted(k for part in pack for k in parts[part]) for pack in _bins(sizes, costs, max_tokens)]
    return sorted(packs)


def _bins(sizes: list[int], costs: list[float], capacity: int) -> list[list[int]]:
    """Distribute items over as few bins as first-fit decreasing finds, then balance the costs of the bins if they still fit."""
    bins, room = [], []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        index = next((index for index, free in enumerate(room) if sizes[item] <= free), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(capacity)
        bins[index].append(item)
        room[index] -= sizes[item]
    balanced, room, load = [[] for _ in bins], [capacity] * len(bins), [0.0] * len(bins)
    for item in sorted(range(len(sizes)), key=lambda item: -costs[item]):
        fitting = [index for index, free in enumerate(room) if sizes[item] <= free]
        if not fitting:
            return bins
        index = min(fitting, key=load.__getitem__)
        balanced[index].append(item)
        room[index] -= sizes[item]
        load[index] += costs[item]
    return balanced


def pack_groups(
    prompts: dict[str, torch.Tensor],
    positions: torch.Tensor,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> ScoringBatch:
    """Build one pack of all prompts, each followed by its completions.

    Args:
        prompts: the model inputs of P prompts, padded on either side: input_ids and attention_mask (P, S), and image inputs.
        positions: the position ids from ``prompt_positions``.
        group: (B,) int64 on the CPU, the index of each completion's prompt, ascending.
        completion_ids: (B, C) int64, right-padded.
        completion_mask: (B, C) bool, true on the tokens of each completion, which start at column 0, and false on the padding.

    Raises:
        ValueError: the shapes do not match, ``group`` does not ascend in [0, P), or a row of ``completion_mask`` has holes.
    """
    _check_group(group, len(prompts["input_ids"]), tuple(completion_ids.shape), tuple(completion_mask.shape))
    # Copying both masks to the CPU is the only wait for the device.
    prompt_mask, mask = prompts["attention_mask"].bool().cpu(), completion_mask.cpu()
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths.unsqueeze(1)):
        raise ValueError("completion_mask must be true from the first token on, without holes, got one with holes")
    layout, order, rows = _arrange(prompt_mask, group.tolist(), lengths.tolist(), mask.shape[1])

    device = completion_ids.device
    order, group = order.to(device, non_blocking=True), group.to(device, non_blocking=True)
    targets = mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)  # groups ascend, so completions are in order
    ids = torch.cat([prompts["input_ids"].flatten(), completion_ids.flatten()])[order].unsqueeze(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": _packed_positions(positions, prompts["attention_mask"].bool(), group, mask.shape[1], order),
        "group_layout": layout,
        **{name: x for name, x in prompts.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")},
    }
    rows = torch.tensor(rows, dtype=torch.int64, device=device)
    return ScoringBatch(inputs, rows, completion_ids.flatten()[targets])


def _check_group(group: torch.Tensor, num_prompts: int, ids_shape: tuple, mask_shape: tuple) -> None:
    count = ids_shape[0]
    if tuple(group.shape) != (count,):
        raise ValueError(f"group must be one per completion, ({count},), got {tuple(group.shape)}")
    ascends = bool((group.diff() >= 0).all())
    if not ascends or (count and not 0 <= int(group[0]) <= int(group[-1]) < num_prompts):
        raise ValueError(f"group must ascend in [0, {num_prompts}), the prompts, got {group.tolist()}")
    if mask_shape != ids_shape:
        raise ValueError(f"completion_mask must have the shape of completion_ids, {ids_shape}, got {mask_shape}")


def _arrange(
    prompt_mask: torch.Tensor, group: list[int], lengths: list[int], width: int
) -> tuple[GroupLayout, torch.Tensor, list[int]]:
    """Arrange the T tokens of a pack.

    Returns:
        The layout; the index (T,) of each token in the flattened prompts followed by the flattened completions; and the
        positions in the pack that predict the completion tokens.
    """
    members = [[k for k, owner in enumerate(group) if owner == index] for index in range(len(prompt_mask))]
    completions = tuple(tuple(lengths[k] for k in member) for member in members)
    layout = GroupLayout(tuple(prompt_mask.sum(1).tolist()), completions)
    order, rows = [], []
    for index, (_, first, _) in enumerate(layout.groups):
        order.append(index * prompt_mask.shape[1] + prompt_mask[index].nonzero()[:, 0])
        start = first
        for k in members[index]:
            order.append(prompt_mask.numel() + k * width + torch.arange(lengths[k]))
            rows += [first - 1, *range(start, start + lengths[k] - 1)] if lengths[k] else []
            start += lengths[k]
    return layout, torch.cat(order), rows


def _packed_positions(
    positions: torch.Tensor, prompt_mask: torch.Tensor, group: torch.Tensor, width: int, order: torch.Tensor
) -> torch.Tensor:
    """Return the position ids of a pack, (1, T) or (3, 1, T). Completions continue from the last position of their prompt."""
    axes = positions if positions.dim() == 3 else positions.unsqueeze(0)
    next_position = axes.masked_fill(~prompt_mask, -1).amax((0, 2)) + 1
    completions = next_position[group].unsqueeze(1) + torch.arange(width, device=positions.device)
    packed = torch.cat([axes.flatten(1), completions.flatten().expand(len(axes), -1)], 1)[:, order].unsqueeze(1)
    return packed[0] if positions.dim() == 2 else packed
