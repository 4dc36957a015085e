"""Trajectories: completions of several turns, in which the model's tokens alternate with the results of its tools."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from vlmkernels.models.cut import cut_trees
from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs, concat, text_columns
from vlmkernels.models.packs import ScoringBatch, pack_trees


class TrajectoryTree(NamedTuple):
    """Some trajectories, with their prompts, as trees in which equal beginnings occur once.

    Attributes:
        segments: for each node, in depth-first order, its index among the P prompts and S segments, prompts first.
        parents: for each node the node that it continues, or -1 for a prompt.
        paths: for each trajectory, the nodes of its segments.
    """

    segments: list[int]
    parents: list[int]
    paths: list[list[int]]


@dataclass(frozen=True)
class Turns:
    """The S segments of B trajectories: the turns of the model and, between them, the results of its tools.

    Args:
        inputs: the model inputs of the segments, one row per segment, with the images of results; ordered by trajectory, then
            by time.
        trajectory: (S,) int64 on the CPU, ascending, the trajectory of each segment.
        sampled: (S,) bool on the CPU, whether the model sampled the segment.
    """

    inputs: ModelInputs
    trajectory: torch.Tensor
    sampled: torch.Tensor

    @classmethod
    def from_parts(
        cls,
        trajectories: Sequence[Sequence[list[int] | ModelInputs]],
        family: Family,
        device: torch.device | str,
        pad_token_id: int,
    ) -> "Turns":
        """Build from the segments of each trajectory, in order of time.

        Args:
            trajectories: for each trajectory its segments: the token ids of a turn of the model, or the model inputs of a
                result, one sample without padding.
            family: the family of the model.
            device: where the inputs are stored.
            pad_token_id: pads the segments.
        """
        segments = [segment for trajectory in trajectories for segment in trajectory]
        owners = [k for k, trajectory in enumerate(trajectories) for _ in trajectory]
        is_text = [isinstance(segment, list) for segment in segments]
        batches = [text_inputs([s for s in segments if isinstance(s, list)], family, device, pad_token_id)]
        batches += [s.to(device) for s in segments if isinstance(s, ModelInputs)]
        order = torch.tensor([k for text in (True, False) for k, value in enumerate(is_text) if value == text])
        inputs = join(batches, pad_token_id).select(order.argsort())
        return cls(inputs, torch.tensor(owners), torch.tensor(is_text))

    @classmethod
    def join(cls, parts: Sequence["Turns"], counts: Sequence[int], pad_token_id: int) -> "Turns":
        """Join the trajectories of several batches. ``counts``: the number of trajectories of each batch."""
        starts = [sum(counts[:k]) for k in range(len(parts))]
        trajectory = torch.cat([part.trajectory + start for part, start in zip(parts, starts, strict=True)])
        inputs = join([part.inputs for part in parts], pad_token_id)
        return cls(inputs, trajectory, torch.cat([part.sampled for part in parts]))

    def select(self, trajectories: torch.Tensor) -> "Turns":
        """Return the trajectories with the given ascending indices, (n,) int64 on the CPU."""
        place = torch.full((len(self.members),), -1)
        place[trajectories] = torch.arange(len(trajectories))
        trajectory = place[self.trajectory]
        segments = (trajectory >= 0).nonzero()[:, 0]
        return Turns(self.inputs.select(segments).trim(), trajectory[segments], self.sampled[segments])

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each segment."""
        lengths: list[int] = self.inputs.inputs["attention_mask"].sum(1).tolist()
        return lengths

    @cached_property
    def members(self) -> list[list[int]]:
        """The segments of each trajectory."""
        members: list[list[int]] = [[] for _ in range(int(self.trajectory[-1]) + 1)]
        for segment, owner in enumerate(self.trajectory.tolist()):
            members[owner].append(segment)
        return members

    @property
    def num_turns(self) -> int:
        """The largest number of turns of the model in a trajectory."""
        return int(self.trajectory[self.sampled].bincount().max())

    @cached_property
    def first_equal(self) -> list[int]:
        """For each segment, the first segment with the same tokens and images."""
        keys, images = self.inputs.image_keys, self.inputs.num_images
        if keys is None and (images.any() or self.inputs.rows["video"].any()):
            first: list[int] = self.inputs.originals().tolist()
            return first
        parts = [()] * len(images) if keys is None else [tuple(part.tolist()) for part in keys.split(images.tolist())]
        ids = self.inputs.inputs["input_ids"].masked_fill(self.inputs.inputs["attention_mask"] == 0, -1).tolist()
        known: dict[tuple, int] = {}
        return [known.setdefault((*row, None, *part), k) for k, (row, part) in enumerate(zip(ids, parts, strict=True))]

    def sampled_mask(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """Return which tokens of the completions the model sampled, (B, C) bool.

        Args:
            completion_mask: (B, C) bool, the tokens of the completions.
        """
        return self._per_token(self.sampled, completion_mask)

    def turn_numbers(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """Return for each token the number of turns of the model that ended before it, (B, C) int64; see ``sampled_mask``."""
        numbers = [sum(self.sampled[segments[:k]].tolist()) for segments in self.members for k in range(len(segments))]
        return self._per_token(torch.tensor(numbers), completion_mask)

    def _per_token(self, values: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """Return the value of each token's segment, (B, C); 0 outside of ``completion_mask``."""
        values = values.repeat_interleave(torch.tensor(self.lengths)).to(completion_mask.device)
        return torch.zeros_like(completion_mask, dtype=values.dtype).masked_scatter_(completion_mask, values)

    def tree(self, num_prompts: int, group: Sequence[int], samples: Sequence[int]) -> TrajectoryTree:
        """Join the equal beginnings of trajectories of the same prompt.

        Args:
            num_prompts: P.
            group: for each of the B trajectories its prompt, ascending.
            samples: the trajectories.
        """
        children: dict[tuple[int, int], int] = {}  # node and segment -> node that continues it
        segments, parents, paths = [], [], []
        roots: dict[int, int] = {}
        for sample in samples:
            if group[sample] not in roots:
                roots[group[sample]] = len(segments)
                segments.append(group[sample])
                parents.append(-1)
            node, path = roots[group[sample]], []
            for segment in self.members[sample]:
                key = (node, self.first_equal[segment])
                if key not in children:
                    children[key] = len(segments)
                    segments.append(num_prompts + segment)
                    parents.append(node)
                node = children[key]
                path.append(node)
            paths.append(path)
        return _depth_first(TrajectoryTree(segments, parents, paths))

    def cut(
        self, prompt_lengths: Sequence[int], group: Sequence[int], samples: Sequence[int], max_tokens: int, hidden_size: int
    ) -> list[list[int]]:
        """Divide trajectories into packs of at most ``max_tokens`` tokens; see ``cut_trees``.

        Args:
            prompt_lengths: the number of tokens of each of the P prompts.
            group, samples: see ``tree``.

        Returns:
            The trajectories of each pack.

        Raises:
            ValueError: a prompt and one trajectory exceed ``max_tokens``.
        """
        num_prompts = len(prompt_lengths)
        tree = self.tree(num_prompts, group, samples)
        lengths = [prompt_lengths[k] if k < num_prompts else self.lengths[k - num_prompts] for k in tree.segments]
        packs = cut_trees(lengths, tree.parents, max_tokens, hidden_size)
        pack_of = {segment: number for number, pack in enumerate(packs) for segment in pack.owned}
        result: list[list[int]] = [[] for _ in packs]
        for sample, path in zip(samples, tree.paths, strict=True):
            result[pack_of[path[-1]]].append(sample)
        return [part for part in result if part]


def text_inputs(rows: Sequence[Sequence[int]], family: Family, device: torch.device | str, pad_token_id: int) -> ModelInputs:
    """Return the model inputs of B rows of text tokens, right-padded."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.full(mask.shape, pad_token_id)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    inputs = {name: x.to(device) for name, x in text_columns(ids, mask.long(), family).items()}
    none = torch.zeros(len(rows), dtype=torch.int64)
    return replace(ModelInputs.from_processor(inputs, family, none), image_keys=none[:0])


def join(batches: list[ModelInputs], pad_token_id: int = 0) -> ModelInputs:
    """Join batches as ``concat`` does, where some of them lack inputs of text tokens, such as ``mm_token_type_ids``."""
    names = {name for batch in batches for name in batch.inputs if batch.family.axis(name) == "token"}
    complete = []
    for batch in batches:
        if missing := names - batch.inputs.keys():
            text = text_columns(batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.family)
            batch = replace(batch, inputs=batch.inputs | {name: text[name] for name in missing})
        complete.append(batch)
    return concat(complete, pad_token_id)


def chain(parts: list[ModelInputs]) -> ModelInputs:
    """Return one sample that consists of several samples without padding, one after another."""
    batch = join(parts)
    family, mask = batch.family, batch.inputs["attention_mask"].bool()
    inputs = {name: x[mask].unsqueeze(0) if family.axis(name) == "token" else x for name, x in batch.inputs.items()}
    rows = {axis: counts.sum(0, keepdim=True) for axis, counts in batch.rows.items()}
    return replace(batch, inputs=inputs, rows=rows | {"token": torch.ones(1, dtype=torch.int64)})


def pack_turns(
    model: PreTrainedModel, prompts: ModelInputs, group: Sequence[int], turns: Turns, samples: Sequence[int]
) -> ScoringBatch:
    """Build one pack of trajectories in which each prompt, and each beginning that several trajectories share, occurs once.

    Args:
        model: a transformers model without adapters.
        prompts: P prompts.
        group: for each of the B trajectories its prompt, ascending.
        turns: the segments of the trajectories.
        samples: the trajectories to pack.

    Returns:
        The pack, which scores the tokens that the model sampled, trajectory by trajectory. A token of several trajectories is
        scored once for each of them.

    Raises:
        ValueError: see ``pack_trees``.
    """
    tree = turns.tree(len(prompts), group, samples)
    pack = pack_trees(model, _select(prompts, turns, torch.tensor(tree.segments)), tree.parents)
    uses = torch.zeros(len(tree.segments), dtype=torch.int64)
    for path in tree.paths:
        uses[[tree.parents[path[0]], *path]] += 1
    # A loss of the router weights each token by the trajectories that contain it, some of which end at an inner node.
    weights = pack.inputs["tree_layout"].per_token(uses.tolist())
    pack.inputs["attention_mask"] = weights.unsqueeze(0).to(pack.rows.device, non_blocking=True)
    # pack_trees scores all tokens that are not in prompts, node by node.
    num_prompts = len(prompts)
    lengths = [0 if k < num_prompts else turns.lengths[k - num_prompts] for k in tree.segments]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    scored = [
        torch.arange(starts[node], starts[node + 1])
        for path in tree.paths
        for node in path
        if turns.sampled[tree.segments[node] - num_prompts]
    ]
    return pack.select(torch.cat(scored).to(pack.rows.device, non_blocking=True))


def pad_turns(prompts: ModelInputs, group: Sequence[int], turns: Turns, samples: Sequence[int]) -> ScoringBatch:
    """Build a batch in which each trajectory is a row of its own, padded on the right; see ``pack_turns``."""
    paths = [[group[sample], *(len(prompts) + k for k in turns.members[sample])] for sample in samples]
    order = torch.tensor([segment for path in paths for segment in path])
    segments = _select(prompts, turns, order)
    family, sampled = prompts.family, torch.cat([torch.zeros(len(prompts), dtype=torch.bool), turns.sampled])[order]
    mask = segments.inputs["attention_mask"].bool()
    token_counts = mask.sum(1).cpu()
    lengths = torch.stack([part.sum() for part in token_counts.split([len(path) for path in paths])])
    inside = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (n, L)
    places = inside.to(mask.device)
    inputs = {}
    for name, tensor in segments.inputs.items():
        if family.axis(name) != "token":
            inputs[name] = tensor
            continue
        inputs[name] = tensor.new_zeros(inside.shape).masked_scatter_(places, tensor[mask])
    is_scored = sampled.repeat_interleave(token_counts).to(mask.device)
    flat = places.flatten().nonzero()[:, 0][is_scored]
    return ScoringBatch(inputs, flat - 1, inputs["input_ids"].flatten()[flat])


def _depth_first(tree: TrajectoryTree) -> TrajectoryTree:
    """Return the tree with its nodes in depth-first order."""
    children: list[list[int]] = [[] for _ in tree.segments]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)
    order, stack = [], [node for node, parent in reversed(list(enumerate(tree.parents))) if parent < 0]
    while stack:
        order.append(node := stack.pop())
        stack += reversed(children[node])
    place = {-1: -1} | {node: index for index, node in enumerate(order)}
    return TrajectoryTree(
        [tree.segments[node] for node in order],
        [place[tree.parents[node]] for node in order],
        [[place[node] for node in path] for path in tree.paths],
    )


def _select(prompts: ModelInputs, turns: Turns, chosen: torch.Tensor) -> ModelInputs:
    """Return the prompts and segments with the given indices, prompts first, in this order."""
    is_prompt = chosen < len(prompts)
    parts = [prompts.select(chosen[is_prompt]), turns.inputs.select(chosen[~is_prompt] - len(prompts))]
    order = torch.cat([is_prompt.nonzero()[:, 0], (~is_prompt).nonzero()[:, 0]])
    return join(parts).select(order.argsort())
