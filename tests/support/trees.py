"""Random trees of segments, and the sequences of their paths without sharing."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from support.groups import processed
from vlmkernels.models.inputs import ModelInputs

EMPTY = -1  # in the samples of a tree: a segment without tokens


@st.composite
def parents(draw, max_segments: int = 8) -> list[int]:
    """The parents of trees in depth-first order."""
    result: list[int] = [-1]
    for segment in range(1, draw(st.integers(1, max_segments))):
        path = [segment - 1]
        while path[-1] >= 0:
            path.append(result[path[-1]])
        result.append(draw(st.sampled_from(path)))
    return result


@st.composite
def samples(draw, name: str, count: int) -> list[int]:
    """Samples of a case of ``tiny_families`` as the segments of a tree: with images or videos, without, or ``EMPTY``."""
    return draw(st.lists(st.integers(EMPTY, len(processed(name)) - 1), min_size=count, max_size=count))


def segments_of(name: str, chosen: list[int], *, right_padded: bool = False) -> ModelInputs:
    """The chosen samples of a case of ``tiny_families`` as segments, with ``image_keys``."""
    case = processed(name)
    text = int((case.rows["image"] + case.rows["video"] == 0).nonzero()[0, 0])
    index = torch.tensor([text if sample == EMPTY else sample for sample in chosen])
    segments = replace(case, image_keys=case.equal_images()).select(index)
    segments.inputs["attention_mask"][torch.tensor(chosen) == EMPTY] = 0
    if name == "paligemma":  # only the first segment is a prompt
        segments.inputs["token_type_ids"][1:] = 1
    if right_padded:
        order = segments.inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        for key, x in segments.inputs.items():
            if segments.family.axis(key) == "token":
                segments.inputs[key] = x.gather(1, order)
    return segments


def path_inputs(segments: ModelInputs, path: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The model inputs of one sequence: the segments of a path, joined without padding."""
    chosen = segments.select(torch.tensor(path))
    kept = chosen.inputs["attention_mask"].bool()
    per_token = {name for name in chosen.inputs if segments.family.axis(name) == "token"}
    return {name: x[kept].unsqueeze(0) if name in per_token else x for name, x in chosen.inputs.items()}


def leaves(parents: list[int]) -> list[int]:
    """The segments without children."""
    return [segment for segment in range(len(parents)) if segment not in parents]
