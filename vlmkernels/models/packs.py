"""Packs: trees of segments in one sequence without padding, in which shared tokens and images occur once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmkernels.models.cut import Pack
from vlmkernels.models.families import Family
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.positions import check_continuous, path_starts, segment_positions, unrolled_positions
from vlmkernels.ops.arguments import as_indices, as_mask
from vlmkernels.ops.tree_attention import TreeLayout


@dataclass(frozen=True)
class ScoringBatch:
    """Model inputs, and the N tokens in them to score, in the order of the completions or segments.

    Attributes:
        inputs: the keyword arguments of the model's forward pass. A pack is one sample of T tokens without padding: input_ids
            (1, T), position_ids, tree_layout and the inputs of images and videos.
        rows: (N,) int64, for each token the flat index into input_ids of the hidden state that predicts it. In a pack, the last
            token of a segment predicts the first token of each of its children.
        targets: (N,) int64, the tokens.
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    targets: torch.Tensor

    def select(self, tokens: torch.Tensor) -> "ScoringBatch":
        """Choose scored tokens. The model inputs stay the same.

        Args:
            tokens: (N,) bool, the tokens to keep, or int64, their indices, in any order; they may repeat.
        """
        places = tokens.nonzero()[:, 0] if tokens.dtype == torch.bool else tokens  # waits for the device, so only once
        return replace(self, rows=self.rows[places], targets=self.targets[places])


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
    places = completion_mask.flatten().nonzero()[:, 0]
    return ScoringBatch(inputs, positions.flatten()[places], targets.flatten()[places])


def pack_trees(
    model: PreTrainedModel,
    segments: ModelInputs,
    parents: Sequence[int],
    loss_mask: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
) -> ScoringBatch:
    """Build one pack of trees of segments, in which each segment occurs once.

    The path from a root to a segment is one sequence: the hidden states of the segment equal those in a copy of its path.
    Images and videos can be in any segment. Images with equal ``image_keys`` are encoded once.

    Args:
        model: a transformers model without adapters.
        segments: the model inputs of S segments of up to L tokens, padded on either side, in depth-first order: each segment is
            followed by its descendants. Segments may have no tokens.
        parents: for each segment the index of the segment that it continues, or -1 for the root of a tree.
        loss_mask: (S, L), bool or 0 and 1, the tokens to score. Default: the tokens of all segments that are not roots.
        position_ids: (S, L) or (axes, S, L) integers, the position of each token in its path. Default: the positions that the
            model computes for copies of the paths. Checking given ones waits for the device.

    Returns:
        The pack. ``rows`` and ``targets`` are those of the tokens in ``loss_mask``, segment by segment.

    Raises:
        ValueError: a shape is wrong; ``parents`` are not those of trees in depth-first order; ``loss_mask`` contains padding or
            the first token of a path, which nothing predicts; a segment has other image tokens than those of its images, in
            families in which the inputs tell their number; an image, or a span of tokens that attend in both directions, is
            cut by a segment; ``position_ids`` do not continue.
        TypeError: ``loss_mask`` or ``position_ids`` are no numbers of these kinds.
    """
    family, inputs = segments.family, segments.inputs
    if not len(segments):
        raise ValueError("segments must hold at least one segment, got none")
    ids = inputs["input_ids"]
    loss_mask = _loss_mask(segments, parents) if loss_mask is None else as_mask("loss_mask", loss_mask, ids.device)
    if tuple(loss_mask.shape) != tuple(ids.shape):
        raise ValueError(f"loss_mask must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(loss_mask.shape)}")
    per_token = {name: x for name, x in inputs.items() if family.axis(name) == "token"}
    marks = {"loss": loss_mask.to(ids.device), **media_marks(segments)}
    count, width = ids.shape
    tokens = _Tokens(
        {name: x.flatten() for name, x in per_token.items()},
        {name: mark.flatten() for name, mark in marks.items()},
        [(row * width, (row + 1) * width) for row in range(count)],
        parents,
        family,
    )
    _check_images(segments, tokens)
    if hasattr(model.base_model, "get_rope_index"):  # it takes each run of image tokens for one image
        tokens.check_runs("image")
        tokens.check_runs("video")
    media = deduplicate_images(segments) if accepts_image_features(model) else inputs
    media = {name: x for name, x in media.items() if name not in per_token}
    if position_ids is None and not family.relative_positions:
        return tokens.pack(media, unrolled_positions(model, segments, tokens.layout, tokens.order))
    if position_ids is None:
        positions, advance = segment_positions(model, inputs)
        return tokens.pack(media, positions.flatten(-2), path_starts(tokens.layout, advance))
    position_ids = as_indices("position_ids", position_ids, device=ids.device)
    if position_ids.dim() not in (2, 3) or tuple(position_ids.shape[-2:]) != tuple(ids.shape):
        wanted = f"the shape of input_ids, {tuple(ids.shape)}, or (axes, {count}, {width})"
        raise ValueError(f"position_ids must have {wanted}, got {tuple(position_ids.shape)}")
    check_continuous(position_ids.reshape(-1, count * width).cpu()[:, tokens.order], tokens.layout)
    return tokens.pack(media, position_ids.flatten(-2))


def select_tree(
    segments: ModelInputs, pack: Pack, loss_mask: torch.Tensor | None = None
) -> tuple[ModelInputs, tuple[int, ...], torch.Tensor]:
    """Select the segments of one of the packs that ``cut_trees`` returns.

    Together, the packs score each token in ``loss_mask`` once::

        for pack in cut_trees(lengths, parents, max_tokens, hidden_size):
            batch = pack_trees(model, *select_tree(segments, pack, loss_mask))

    Args:
        segments: all segments.
        pack: the pack.
        loss_mask: the tokens of all segments to score; see ``pack_trees``.

    Returns:
        The arguments ``segments``, ``parents`` and ``loss_mask`` of ``pack_trees``. The mask is false on segments that the pack
        does not own.
    """
    chosen, owned = torch.tensor(pack.segments), set(pack.owned)
    selected = segments.select(chosen)
    if loss_mask is None:
        mask = _loss_mask(selected, pack.parents)
    else:
        mask = loss_mask[chosen.to(loss_mask.device, non_blocking=True)]
    scored = torch.tensor([segment in owned for segment in pack.segments])
    return selected, pack.parents, mask & scored.unsqueeze(1).to(mask.device, non_blocking=True)


def pack_groups(
    prompts: dict[str, torch.Tensor],
    positions: torch.Tensor,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    family: Family,
) -> ScoringBatch:
    """Build one pack of all prompts, each followed by its completions: trees of two levels.

    Args:
        prompts: the model inputs of P prompts, padded on either side: input_ids and attention_mask (P, S), and image inputs.
        positions: the position ids from ``prompt_positions``. Completions begin at the largest one of their prompt + 1, where
            ``generate`` continues.
        group: (B,) int64 on the CPU, the index of each completion's prompt, ascending.
        completion_ids: (B, C) int64, right-padded.
        completion_mask: (B, C) bool, true on the tokens of each completion, which start at column 0, and false on the padding.
        family: the family of the model, from ``family_of``.

    Raises:
        ValueError: the shapes do not match, ``group`` does not ascend in [0, P), a row of ``completion_mask`` has holes, or
            ``family`` does not have an input of ``prompts``.
    """
    (num_prompts, length), (_, width) = prompts["input_ids"].shape, completion_ids.shape
    _check_group(group, num_prompts, tuple(completion_ids.shape), tuple(completion_mask.shape))
    names = [name for name in prompts if name in family.inputs and family.axis(name) == "token"]
    if unknown := sorted(name for name in prompts if name.endswith("token_type_ids") and name not in names):
        raise ValueError(f"family must be that of a model with {', '.join(unknown)}, got {family.name}")
    completions = {"input_ids": completion_ids, "attention_mask": completion_mask}
    flat = {}  # all prompts, then all completions
    for name in names:
        values = completions.get(name, torch.full_like(completion_ids, family.inputs[name].completion))
        flat[name] = torch.cat([prompts[name].flatten(), values.flatten().to(prompts[name].dtype)])
    loss = torch.cat([torch.zeros_like(prompts["input_ids"], dtype=torch.bool).flatten(), completion_mask.flatten()])

    owners, end = group.tolist(), num_prompts * length
    parents: list[int] = []
    slices: list[tuple[int, int]] = []
    prompt_of: list[int] = []  # by segment
    for prompt in range(num_prompts):
        members = [k for k, owner in enumerate(owners) if owner == prompt]
        parents += [-1, *[len(parents)] * len(members)]
        slices += [(prompt * length, (prompt + 1) * length), *((end + k * width, end + (k + 1) * width) for k in members)]
        prompt_of += [prompt] * (1 + len(members))
    tokens = _Tokens(flat, {"loss": loss}, slices, parents, family)
    mask = tokens.flat_marks["loss"][end:].view(completion_mask.shape)
    if not torch.equal(mask, torch.arange(width) < mask.sum(1, keepdim=True)):
        raise ValueError("completion_mask must be true from the first token on, without holes, got one with holes")

    device = positions.device
    axes = positions.view(-1, num_prompts, length)
    following = axes.masked_fill(~prompts["attention_mask"].bool(), -1).amax((0, 2)) + 1
    starts = path_starts(tokens.layout, following[torch.tensor(prompt_of).to(device, non_blocking=True)])
    own = torch.arange(width, device=device).repeat(len(owners)).expand(len(axes), -1)
    flat_positions = torch.cat([axes.flatten(1), own], 1)
    flat_positions = flat_positions[0] if positions.dim() == 2 else flat_positions
    return tokens.pack({name: x for name, x in prompts.items() if name not in names}, flat_positions, starts)


def _loss_mask(segments: ModelInputs, parents: Sequence[int]) -> torch.Tensor:
    """Return the default of ``loss_mask``: the tokens of all segments that are not roots."""
    mask = segments.inputs["attention_mask"].bool()
    if len(parents) != len(mask):
        raise ValueError(f"parents must be one per segment, {len(mask)}, got {len(parents)}")
    return mask & torch.tensor([parent >= 0 for parent in parents]).unsqueeze(1).to(mask.device, non_blocking=True)


def media_marks(segments: ModelInputs) -> dict[str, torch.Tensor]:
    """Return which tokens belong to images and videos, (S, L) bool. GLM-4V has one token for both."""
    inputs, family = segments.inputs, segments.family
    types = inputs.get("mm_token_type_ids")
    if types is not None:
        return {"image": types == 1, "video": types == 2}
    ids = {"image": family.image_token_id, "video": family.video_token_id}
    return {kind: inputs["input_ids"] == token for kind, token in ids.items() if token is not None}


def _check_images(segments: ModelInputs, tokens: "_Tokens") -> None:
    """Raise ValueError if the image tokens of a segment are not those of its own images, where their number is known."""
    family = segments.family
    if "image" not in tokens.marks:
        return
    found, images = tokens.counts("image"), segments.num_images.tolist()
    media = (segments.rows["image"] + segments.rows["video"]).tolist()  # in some families frames have image tokens
    for segment, number in enumerate(found):
        if bool(number) > bool(media[segment]) or bool(images[segment]) > bool(number):
            raise ValueError(
                f"segments must contain the image tokens of their own images, got {number} image tokens for {images[segment]} "
                f"images in segment {segment}"
            )
    axis = "image_token" if "image_features" in segments.inputs else family.image_tokens_per
    if axis is None:
        return
    _check_proportional("image", axis, found, segments.rows[axis].tolist())
    videos = family.inputs.get("video_grid_thw")
    if axis == "image_patch" and videos is not None and videos.axis == "video":
        _check_proportional("video", "video_patch", tokens.counts("video"), segments.rows["video_patch"].tolist())


def _check_proportional(kind: str, axis: str, tokens: list[int], rows: list[int]) -> None:
    """Raise ValueError if the segments do not have the same number of tokens per row."""
    ratios = Counter(Fraction(n, m) for n, m in zip(tokens, rows, strict=True) if m)
    per_row = ratios.most_common(1)[0][0] if ratios else 0
    for segment, (number, count) in enumerate(zip(tokens, rows, strict=True)):
        if number != per_row * count:
            raise ValueError(
                f"segments must contain the {kind} tokens of their own {kind}s, got {number} {kind} tokens for {count} rows of "
                f"{axis} in segment {segment}, where {per_row * count} are expected"
            )


def _check_group(group: torch.Tensor, num_prompts: int, ids_shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
    count = ids_shape[0]
    if tuple(group.shape) != (count,):
        raise ValueError(f"group must be one per completion, ({count},), got {tuple(group.shape)}")
    ascends = bool((group.diff() >= 0).all())
    if not ascends or (count and not 0 <= int(group[0]) <= int(group[-1]) < num_prompts):
        raise ValueError(f"group must ascend in [0, {num_prompts}), the prompts, got {group.tolist()}")
    if mask_shape != ids_shape:
        raise ValueError(f"completion_mask must have the shape of completion_ids, {ids_shape}, got {mask_shape}")


class _Tokens:
    """F tokens of S segments, flattened with their padding, and the T of them that are the tokens of a pack.

    Args:
        inputs: the inputs with a value per token, (F,) each.
        marks: (F,) bool, which tokens are scored ("loss"), and others for ``counts`` and ``check_runs``.
        slices: (start, stop) of each segment in the F tokens, in depth-first order.
        parents: see ``TreeLayout``.
        family: the family of the model.

    Attributes:
        flat_marks: ``marks`` on the CPU, "token" (which tokens are no padding) and, where the model has such tokens,
            "bidirectional". Copying them is the only wait for the device.
        marks: those of the pack, (T,) on the CPU.
        order: (T,) int64 on the CPU, the place in the F tokens of each token of the pack.
        layout: the layout of the pack, without bidirectional spans.
        segment_of: (T,) int64 on the CPU, the segment of each token of the pack.
        previous: for each segment the index in the pack of the last token of its path before the segment, or -1.
    """

    def __init__(
        self,
        inputs: dict[str, torch.Tensor],
        marks: dict[str, torch.Tensor],
        slices: Sequence[tuple[int, int]],
        parents: Sequence[int],
        family: Family,
    ) -> None:
        self.inputs, self.family = inputs, family
        marks = {"token": inputs["attention_mask"].bool(), **marks}
        spans = family.bidirectional
        if spans is not None and spans.name in inputs:
            marks["bidirectional"] = torch.stack([inputs[spans.name] == value for value in spans.values]).any(0)
        self.flat_marks = dict(zip(marks, torch.stack([*marks.values()]).cpu(), strict=True))
        parts = [self.flat_marks["token"][start:stop].nonzero()[:, 0] + start for start, stop in slices]
        self.order = torch.cat(parts)
        self.marks = {name: mark[self.order] for name, mark in self.flat_marks.items()}
        self.layout = TreeLayout(tuple(map(len, parts)), tuple(parents))
        self.segment_of = self.layout.per_token(range(len(parts)))
        self.previous = self._previous()
        self._check_loss(slices)

    def _previous(self) -> list[int]:
        previous: list[int] = []
        last: list[int] = []
        for start, length, parent in zip(self.layout.starts, self.layout.lengths, self.layout.parents, strict=True):
            previous.append(last[parent] if parent >= 0 else -1)
            last.append(start + length - 1 if length else previous[-1])
        return previous

    def _check_loss(self, slices: Sequence[tuple[int, int]]) -> None:
        padding = self.flat_marks["loss"] & ~self.flat_marks["token"]
        if padding.any():
            counts = [int(padding[start:stop].sum()) for start, stop in slices]
            segment = next(segment for segment, count in enumerate(counts) if count)
            raise ValueError(f"loss_mask must be false on padding, got true on {counts[segment]} tokens in segment {segment}")
        for segment, (start, length) in enumerate(zip(self.layout.starts, self.layout.lengths, strict=True)):
            if length and self.previous[segment] < 0 and self.marks["loss"][start]:
                raise ValueError(
                    "loss_mask must be false on the first token of a path, which no token predicts, got true in segment "
                    f"{segment}"
                )

    def counts(self, name: str) -> list[int]:
        """Return the number of marked tokens of each segment."""
        return [int(part.sum()) for part in self.marks[name].split(self.layout.lengths)]

    def check_runs(self, name: str) -> None:
        """Raise ValueError if a run of marked tokens continues from one segment in the next."""
        mark, layout = self.marks[name], self.layout
        for segment, (start, before) in enumerate(zip(layout.starts, self.previous, strict=True)):
            if layout.lengths[segment] and before >= 0 and mark[start] and mark[before]:
                last = next(ancestor for ancestor in layout.path(segment)[-2::-1] if layout.lengths[ancestor])
                raise ValueError(
                    f"segments must contain whole runs of {name} tokens, got one that begins in segment {last} and continues "
                    f"in segment {segment}"
                )

    def _spans(self) -> tuple[tuple[int, int], ...]:
        """Return the (start, stop) in the pack of the spans of tokens that attend in both directions.

        Raises:
            ValueError: a span is cut by a segment, or a path has several where they attend to one another.
        """
        spec = self.family.bidirectional
        if spec is None or "bidirectional" not in self.marks:
            return ()
        self.check_runs("bidirectional")
        inside = self.marks["bidirectional"]
        first = torch.zeros(len(inside) + 1, dtype=torch.bool)  # tokens that a run does not continue into
        first[[*self.layout.starts, -1]] = True
        first[1:-1] |= ~inside[:-1]
        starts = (inside & first[:-1]).nonzero()[:, 0]
        last = first[1:].clone()
        last[:-1] |= ~inside[1:]
        owners = self.segment_of[starts].tolist()
        for segment in sorted(set(owners)) if spec.linked else ():
            if others := set(owners) & set(self.layout.path(segment)[:-1]):
                raise ValueError(
                    f"segments must have all tokens with {spec.name} in {spec.values} of a path in one segment, because these "
                    f"attend to one another, got some in segment {max(others)} and some in segment {segment}"
                )
        return tuple(zip(starts.tolist(), ((inside & last).nonzero()[:, 0] + 1).tolist(), strict=True))

    def pack(self, media: dict[str, torch.Tensor], positions: torch.Tensor, starts: torch.Tensor | None = None) -> ScoringBatch:
        """Build the pack.

        Args:
            media: the inputs of images and videos.
            positions: (F,) or (axes, F), the position ids of the tokens.
            starts: (S,), what to add to those of each segment. None: nothing.
        """
        device = self.inputs["input_ids"].device
        is_linked = self.family.bidirectional is not None and self.family.bidirectional.linked
        scored = self.marks["loss"]
        predicted_by = torch.arange(-1, len(scored) - 1)
        for start, length, before in zip(self.layout.starts, self.layout.lengths, self.previous, strict=True):
            if length:
                predicted_by[start] = before
        paths = self.layout.per_token(self.layout.num_paths)
        order, rows, targets, segment, paths = (
            x.to(device, non_blocking=True)
            for x in (self.order, predicted_by[scored], self.order[scored], self.segment_of, paths)
        )
        position_ids = positions[..., order] if starts is None else positions[..., order] + starts[segment]
        ids = self.inputs["input_ids"]
        names = ("input_ids", *(name for name in self.family.pack_inputs if name in self.inputs))
        inputs = {
            **{name: self.inputs[name][order].unsqueeze(0) for name in names},
            "attention_mask": paths.unsqueeze(0),  # a loss of the router weights each token by it
            "position_ids": position_ids.unsqueeze(-2),
            "tree_layout": replace(self.layout, bidirectional=self._spans(), linked=is_linked),
            **media,
        }
        return ScoringBatch(inputs, rows, ids[targets])
