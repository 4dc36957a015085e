"""Position ids of prompts and of trees of segments, compared with the models' own functions."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_families
from support.groups import processed
from support.trees import leaves, parents, path_inputs, samples, segments_of

from vlmkernels.models.packs import pack_trees
from vlmkernels.models.positions import prompt_positions, segment_positions
from vlmkernels.ops.tree_attention import TreeLayout

WITH_POSITIONS = [n for n in tiny_families.BUILDERS if hasattr(tiny_families.case(n).model.base_model, "get_rope_index")]


@pytest.mark.parametrize("name", WITH_POSITIONS)
@pytest.mark.parametrize("videos", [False, True])
def test_positions_equal_those_of_the_model(monkeypatch, name, videos):
    """The model's own function is called only where ``mrope_positions`` does not support the inputs."""
    model, batch = tiny_families.case(name).model, processed(name)
    inputs = (batch if videos else batch.select((batch.rows["video"] == 0).nonzero()[:, 0])).inputs
    own, calls = model.base_model.get_rope_index, []
    expected = own(**{n: x for n, x in inputs.items() if not n.startswith("pixel")})[0]

    @functools.wraps(own)  # prompt_positions reads the signature
    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "get_rope_index", counted)
    assert torch.equal(prompt_positions(model, inputs), expected)
    # transformers versions round the seconds of Qwen2.5-VL's videos differently.
    supported = name in ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe") or (name == "qwen2_5_vl" and not videos)
    assert bool(calls) == (not supported)


def test_positions_raise_if_the_model_ignores_an_input(monkeypatch):
    model, batch = tiny_families.case("qwen2_5_vl").model, processed("qwen2_5_vl")
    monkeypatch.setattr(model.base_model, "get_rope_index", lambda input_ids, image_grid_thw, video_grid_thw: None)
    inputs = batch.inputs | {"second_per_grid_ts": torch.ones(1)}
    with pytest.raises(NotImplementedError, match=r"position ids from second_per_grid_ts, got Qwen2_5_VL.* does not accept"):
        prompt_positions(model, inputs)


@pytest.mark.parametrize("name", WITH_POSITIONS)
@settings(max_examples=25)
@given(data=st.data())
def test_positions_of_trees_equal_those_of_their_paths(name, data):
    """Images and videos are in any segment; the paths are computed by the model's own function."""
    model, tree = tiny_families.case(name).model, data.draw(parents())
    segments = segments_of(name, data.draw(samples(name, len(tree))), right_padded=data.draw(st.booleans()))
    nothing = torch.zeros_like(segments.inputs["input_ids"], dtype=torch.bool)
    pack = pack_trees(model, segments, tree, nothing).inputs
    places = torch.arange(pack["input_ids"].shape[1]).split(pack["tree_layout"].lengths)
    for leaf in leaves(tree):
        path = pack["tree_layout"].path(leaf)
        place = torch.cat([places[segment] for segment in path])
        if len(place):
            inputs = {name: x for name, x in path_inputs(segments, path).items() if not name.startswith("pixel")}
            assert torch.equal(pack["input_ids"][:, place], inputs["input_ids"])
            assert torch.equal(pack["position_ids"][..., place], model.base_model.get_rope_index(**inputs)[0])


@pytest.mark.parametrize(("name", "first"), [("text", 0), ("llava", 0), ("paligemma", 1)])
def test_positions_without_images_in_them_count_tokens(name, first):
    tree = [-1, 0, 1, 0, -1]
    pack = pack_trees(tiny_families.case(name).model, segments_of(name, [1, 0, 0, -1, 0]), tree).inputs
    expected = pack["tree_layout"].tokens[2] + first
    assert torch.equal(pack["position_ids"], expected.long().unsqueeze(0))


def test_a_path_continues_after_a_video_where_the_model_does():
    """The time positions of this video grow faster than the positions of the tokens after it."""
    model, video = tiny_families.case("qwen2_5_vl").model, processed("qwen2_5_vl", 4)
    ids = video.inputs["input_ids"][0]
    end = int((ids == tiny_families.token_id("<|vision_end|>")).nonzero()[0]) + 1
    video.inputs["second_per_grid_ts"][:] = 5.0
    segments = video.select(torch.tensor([0, 0]))
    segments.inputs["attention_mask"][0, end:] = 0
    positions, advance = segment_positions(model, segments.inputs)
    assert positions[:, 0, :end].max() + 1 > advance[0]
    pack = pack_trees(model, segments, [-1, 0]).inputs
    inputs = {name: x for name, x in path_inputs(segments, (0, 1)).items() if not name.startswith("pixel")}
    assert torch.equal(pack["position_ids"], model.base_model.get_rope_index(**inputs)[0])


def packed_with(position_ids):
    text = segments_of("text", [1, 0, 2, 3])  # 4, 1, 7 and 10 tokens, padded on the left
    return pack_trees(tiny_families.case("text").model, text, [-1, 0, 1, 0], position_ids=position_ids).inputs


def test_given_positions_are_used():
    text = segments_of("text", [1, 0, 2, 3])
    layout = TreeLayout([4, 1, 7, 10], [-1, 0, 1, 0])
    assert text.inputs["attention_mask"].sum(1).tolist() == list(layout.lengths)
    position_ids = torch.zeros(4, 10, dtype=torch.int64)
    position_ids[text.inputs["attention_mask"].bool()] = layout.tokens[2].long() + 7
    assert torch.equal(packed_with(position_ids)["position_ids"], layout.tokens[2].long().unsqueeze(0) + 7)
    axes = packed_with(position_ids.expand(3, -1, -1))["position_ids"]
    assert torch.equal(axes, (layout.tokens[2].long() + 7).expand(3, 1, -1))
    position_ids[2] -= 1
    rule = "segment 2 must begin at 12, the largest position of its path + 1, got [11]"
    with pytest.raises(ValueError, match=f"position_ids must continue the path of each segment: {re.escape(rule)}"):
        packed_with(position_ids)


def test_given_positions_must_have_the_shape_of_the_tokens():
    rule = "position_ids must have the shape of input_ids, (4, 10), or (axes, 4, 10), got (4, 9)"
    with pytest.raises(ValueError, match=re.escape(rule)):
        packed_with(torch.zeros(4, 9, dtype=torch.int64))
