"""Packs of groups: every prompt, its images with it, once for all its completions."""

import inspect
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from vlmkernels.models.families import family_of, why_not_share_prefix
from vlmkernels.ops.checks import require
from vlmkernels.ops.group_attention import GroupLayout
from vlmkernels.ops.mrope_positions import mrope_positions

# What the position ids of a prompt are made of, beside its tokens.
_POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")


@dataclass(frozen=True)
class ScoringBatch:
    """Model inputs, and where the N tokens of their completions, one completion after another, are predicted.

    inputs: of the model's forward pass. Of a pack, [prefix | c1 | ... | cG] per group and T tokens without padding, they are
        those of one sample: input_ids (1, T), position_ids, the images' tensors, group_layout.
    rows: (N,) int64, flat positions in input_ids whose hidden states predict the tokens. A prefix's last one predicts the first
        token of each of its completions.
    targets: (N,) int64, those tokens.
    """

    inputs: dict
    rows: torch.Tensor
    targets: torch.Tensor

    def of(self, tokens: torch.Tensor) -> "ScoringBatch":
        """With some of the tokens alone; tokens: (N,) bool."""
        return replace(self, rows=self.rows[tokens], targets=self.targets[tokens])


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why the completions of a group cannot run behind one copy of their prompt in ``model``; None where they can."""
    if reason := why_not_share_prefix(model.config):
        return f"{type(model).__name__}: {reason}"
    text = model.config.get_text_config()
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not take attention implementations"
    if getattr(text, "attention_dropout", 0.0):
        return f"attention_dropout must be 0, got {text.attention_dropout}"
    return None


def pad_completions(inputs: dict[str, torch.Tensor], completion_mask: torch.Tensor) -> ScoringBatch:
    """Each completion behind a prompt of its own.

    Args:
        inputs: prompts followed by right-padded completions, input_ids (B, S + C).
        completion_mask: (B, C) bool.
    """
    (count, width), length = completion_mask.shape, inputs["input_ids"].shape[1]
    positions = torch.arange(count * length, device=completion_mask.device).view(count, length)[:, -width - 1 : -1]
    targets = inputs["input_ids"][:, length - width :]
    return ScoringBatch(inputs, positions[completion_mask], targets[completion_mask])


def prompt_positions(model: torch.nn.Module, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Position ids of padded prompts, (P, S); with images (3, P, S) of M-RoPE, as the model's own function gives them."""
    mask, rope_index = prompts["attention_mask"], getattr(model.base_model, "get_rope_index", None)
    if rope_index is None or not prompts.keys() & set(_POSITION_INPUTS):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    family = family_of(model.config)
    timed = "second_per_grid_ts" in family.inputs and "video_grid_thw" in prompts  # versions round their seconds differently
    if family.frames_apart is not None and not timed:
        grids = (prompts.get(name) for name in ("image_grid_thw", "video_grid_thw"))
        sizes = {"merge_size": model.config.vision_config.spatial_merge_size, "frames_apart": family.frames_apart}
        return mrope_positions(prompts["mm_token_type_ids"], *grids, attention_mask=mask, **sizes).position_ids
    # Versions of transformers differ in what they ask for.
    taken = inspect.signature(rope_index).parameters
    inputs = {name: prompts[name] for name in _POSITION_INPUTS if name in prompts and name in taken}
    return rope_index(prompts["input_ids"], attention_mask=mask, **inputs)[0]


def _bins(sizes: list[int], costs: list[float], capacity: int) -> list[list[int]]:
    """Items, none larger than a bin, in as few bins as first-fit decreasing finds; of about equal cost where that fits too."""
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


def cut_packs(prefixes: list[int], group: list[int], lengths: list[int], max_tokens: int, hidden_size: int) -> list[list[int]]:
    """The completions of each pack, ascending: packs of at most ``max_tokens`` tokens and about equal cost.

    A group that is larger is cut, which repeats its prefix, into as few parts as first-fit decreasing finds. Cost counts
    the tokens of linear layers and the pairs of attention, in the proportion of a transformer of ``hidden_size`` H: 24 H^2
    operations for a token and layer, 4 H for a pair.

    Args:
        prefixes: tokens of each prompt.
        group: the prompt of each completion.
        lengths: tokens of each completion.

    Raises:
        ValueError: the budget holds less than a prompt with one of its completions; the message says what is needed.
    """

    def cost(tokens: int, pairs: float) -> float:
        return 6.0 * hidden_size * tokens + pairs

    parts, sizes, costs = [], [], []
    for index in sorted(set(group)):
        prefix, members = prefixes[index], [k for k, owner in enumerate(group) if owner == index]
        own = [lengths[k] for k in members]
        rule = f"be at least {prefix + max(own)}, a prompt of {prefix} tokens and a completion of {max(own)}"
        require(prefix + max(own) <= max_tokens, "max_tokens_per_microbatch", rule, max_tokens)
        per_completion = [cost(length, length * (prefix + length / 2)) for length in own]
        for part in _bins(own, per_completion, max_tokens - prefix):
            parts.append([members[item] for item in part])
            sizes.append(prefix + sum(own[item] for item in part))
            costs.append(cost(prefix, prefix**2 / 2) + sum(per_completion[item] for item in part))
    packs = [sorted(k for part in pack for k in parts[part]) for pack in _bins(sizes, costs, max_tokens)]
    return sorted(packs)


def pack_groups(
    prompts: dict[str, torch.Tensor],
    positions: torch.Tensor,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> ScoringBatch:
    """One pack of all prompts, each followed by its completions.

    Args:
        prompts: the model inputs of P prompts, padded on either side: input_ids, attention_mask (P, S), and those of images.
        positions: see ``prompt_positions``.
        group: (B,) int64 on the CPU, the prompt of each completion, ascending.
        completion_ids: (B, C) int64.
        completion_mask: (B, C) bool, true on a completion's tokens: a stretch from the first one on, perhaps of none.

    Raises:
        ValueError: shapes or groups that do not fit together.
    """
    num, (count, width) = len(prompts["input_ids"]), completion_ids.shape
    require(tuple(group.shape) == (count,), "group", f"be one per completion, ({count},)", tuple(group.shape))
    sound = bool((group.diff() >= 0).all()) and (count == 0 or 0 <= int(group[0]) <= int(group[-1]) < num)
    require(sound, "group", f"ascend in [0, {num}), the prompts", group.tolist())
    shape = tuple(completion_mask.shape)
    require(shape == (count, width), "completion_mask", f"have the shape of completion_ids, {(count, width)}", shape)
    # Both masks on the CPU: the device is waited for here, and nowhere else.
    prompt_mask, held = prompts["attention_mask"].bool().cpu(), completion_mask.cpu()
    lengths = held.sum(1)
    rule = "be true from the first token on, without holes"
    require(bool((held == (torch.arange(width) < lengths.unsqueeze(1))).all()), "completion_mask", rule, "one with holes")

    owners, lengths, prefixes = group.tolist(), lengths.tolist(), prompt_mask.sum(1).tolist()
    members = [[k for k, owner in enumerate(owners) if owner == g] for g in range(num)]
    layout = GroupLayout(tuple(prefixes), tuple(tuple(lengths[k] for k in member) for member in members))
    # Where each token of the pack is found in all tokens of the prompts, then of the completions.
    order, rows = [], []
    for g, (_, first, _) in enumerate(layout.groups):
        order.append(g * prompt_mask.shape[1] + prompt_mask[g].nonzero()[:, 0])
        start = first
        for k in members[g]:
            order.append(prompt_mask.numel() + k * width + torch.arange(lengths[k]))
            rows += [first - 1, *range(start, start + lengths[k] - 1)] if lengths[k] else []
            start += lengths[k]
    device = completion_ids.device
    order = torch.cat(order).to(device, non_blocking=True)
    targets = held.flatten().nonzero()[:, 0].to(device, non_blocking=True)  # groups ascend, so completions are in order
    ids = torch.cat([prompts["input_ids"].flatten(), completion_ids.flatten()])[order].unsqueeze(0)
    axes = positions if positions.dim() == 3 else positions.unsqueeze(0)
    after = axes.masked_fill(~prompts["attention_mask"].bool(), -1).amax((0, 2)) + 1
    behind = after[group.to(device, non_blocking=True)].unsqueeze(1) + torch.arange(width, device=device)
    packed = torch.cat([axes.flatten(1), behind.flatten().expand(len(axes), -1)], 1)[:, order].unsqueeze(1)
    others = {name: x for name, x in prompts.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return ScoringBatch(
        inputs={
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": packed[0] if positions.dim() == 2 else packed,
            "group_layout": layout,
            **others,
        },
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        targets=completion_ids.flatten()[targets],
    )
