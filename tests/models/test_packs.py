"""Packs of trees and of groups in real models, compared with a copy of each path or prompt."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_families
from support.double import InDouble
from support.groups import MODELS, REFUSED, SHARING, completions_of, processed, prompts_of
from support.trees import EMPTY, leaves, parents, path_inputs, samples, segments_of

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.cut import cut_trees
from vlmkernels.models.families import TEXT, prefix_sharing_unsupported
from vlmkernels.models.image_features import accepts_image_features, encode_images
from vlmkernels.models.inputs import ModelInputs, concat
from vlmkernels.models.packs import pack_groups, pack_trees, select_tree
from vlmkernels.models.positions import prompt_positions
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.ops.tree_attention import TreeLayout


def unshared(model, prompts, group, ids, mask):
    """Return log-probabilities, computed completion by completion."""
    parts = []
    for k in range(len(group)):
        length = int(mask[k].sum())
        if length:
            one = prompts.select(group[k : k + 1]).trim().append(ids[k : k + 1, :length], mask[k : k + 1, :length])
            logits = model(**one.inputs, use_cache=False).logits[0, -length - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(-1, ids[k, :length, None]).squeeze(-1))
    return torch.cat(parts)


def shared(model, prompts, group, ids, mask):
    batch = pack_groups(prompts.inputs, prompt_positions(model, prompts.inputs), group, ids, mask, prompts.family)
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return linear_logps(hidden, model.lm_head.weight, batch.targets, rows=batch.rows)


CASES = {
    "one image each": ((1, 1), (4, 4), [5, 3, 6, 6, 2, 7, 1, 4]),
    "several, none, one": ((2, 0, 1), (2, 3, 1), [4, 4, 1, 6, 2, 5]),
    "text only": ((0, 0), (3, 2), [3, 5, 2, 4, 4]),
    "empty completions": ((1, 1), (3, 1), [0, 4, 0, 0]),
}


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in MODELS for c in CASES if n != "qwen2" or c == "text only"])
def test_equals_unshared(name, case):
    """Compares log-probabilities and the gradients of all parameters, including the vision tower."""
    images, sizes, lengths = CASES[case]
    model = MODELS[name]().double()
    prompts = prompts_of(images, model)
    prompts.inputs.update({n: x.double() for n, x in prompts.inputs.items() if x.is_floating_point()})
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ids, mask = completions_of(lengths)
    results = []
    for compute in (unshared, shared):
        model.zero_grad()
        logps = compute(model, prompts, group, ids, mask)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters()}))
        use_tree_attention(model)
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    assert {n for n, g in ours.items() if g is None} == {n for n, g in gradients.items() if g is None}
    # Rotary angles are fp32 even in an fp64 model.
    bad = [n for n, g in gradients.items() if g is not None and (ours[n] - g).abs().max() > 1e-6 * g.abs().max()]
    assert not bad


def test_every_family_that_supports_sharing_is_tested():
    refused = {name for name in tiny_families.BUILDERS if prefix_sharing_unsupported(tiny_families.case(name).model.config)}
    assert refused == REFUSED


@pytest.mark.parametrize("name", SHARING)
def test_every_family_equals_copies(name):
    """Compares the hidden states that predict completions, and the gradients of all parameters."""
    model, batch = copy.deepcopy(tiny_families.case(name).model), processed(name)
    group = torch.arange(len(batch)).repeat_interleave(2)
    ids, mask = completions_of([3, 5] * len(batch), vocab=20)
    ids += tiny_families.token_id("a")

    def of_copies():
        inputs = batch.repeat(2).append(ids, mask).inputs
        return model.base_model(**inputs, use_cache=False).last_hidden_state[:, -mask.shape[1] - 1 : -1][mask]

    def of_pack():
        use_tree_attention(model)
        pack = pack_groups(batch.inputs, prompt_positions(model, batch.inputs), group, ids, mask, batch.family)
        return model.base_model(**pack.inputs, use_cache=False).last_hidden_state[0, pack.rows]

    results = []
    for compute in (of_copies, of_pack):
        model.zero_grad()
        hidden = compute()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    size = max(g.abs().max() for g in gradients.values())
    bad = {n: (ours[n] - g).abs().max().item() for n, g in gradients.items() if (ours[n] - g).abs().max() > 1e-5 * size}
    assert not bad


def paths_of(segments, tree):
    """For each leaf of trees the segments of its path and its inputs as one sequence, without sharing."""
    layout = TreeLayout(segments.inputs["attention_mask"].sum(1).tolist(), tree)
    return [(layout.path(leaf), path_inputs(segments, layout.path(leaf))) for leaf in leaves(tree)]


def places_in(layout):
    """For each token of a pack its segment and its index in it."""
    return [(segment, k) for segment, length in enumerate(layout.lengths) for k in range(length)]


@st.composite
def scored_trees(draw, name):
    """Segments, parents and a mask with holes, which is false on the first tokens of paths."""
    tree = draw(parents())
    segments = segments_of(name, draw(samples(name, len(tree))), right_padded=draw(st.booleans()))
    mask = segments.inputs["attention_mask"].bool()
    mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.7
    layout = TreeLayout(segments.inputs["attention_mask"].sum(1).tolist(), tree)
    for segment, offset in enumerate(layout.offsets):
        if offset == 0 and layout.lengths[segment]:
            mask[segment, segments.inputs["attention_mask"][segment].argmax()] = False
    return segments, tree, mask


@pytest.mark.parametrize("name", ["text", "qwen2_5_vl", "internvl"])
@given(data=st.data())
def test_rows_and_targets_equal_those_of_the_paths(name, data):
    model = tiny_families.case(name).model  # built here the first time: Hypothesis limits the time of a draw
    segments, tree, mask = data.draw(scored_trees(name))
    pack = pack_trees(model, segments, tree, mask)
    places = places_in(pack.inputs["tree_layout"])
    scored = {}  # for each scored token, the token that predicts it and its id
    for path, inputs in paths_of(segments, tree):
        kept = segments.inputs["attention_mask"].bool()
        sequence = [(segment, k) for segment in path for k in range(int(kept[segment].sum()))]
        is_scored = torch.cat([mask[segment][kept[segment]] for segment in path])
        for index in is_scored.nonzero()[:, 0].tolist():
            scored[sequence[index]] = sequence[index - 1], int(inputs["input_ids"][0, index])
    order = sorted(scored)  # segment by segment
    assert [places[row] for row in pack.rows.tolist()] == [scored[token][0] for token in order]
    assert pack.targets.tolist() == [scored[token][1] for token in order]


def test_default_of_loss_mask_is_all_but_the_roots():
    model, segments = tiny_families.case("text").model, segments_of("text", [1, 0, 2, 3, 1])  # 4, 1, 7, 10 and 4 tokens
    pack = pack_trees(model, segments, [-1, 0, 1, 0, -1])
    assert pack.rows.tolist() == [3, 4, *range(5, 11), 3, *range(12, 21)]
    chosen = pack.select(pack.rows != 3)
    assert len(chosen.rows) == len(chosen.targets) == len(pack.rows) - 2
    assert chosen.inputs is pack.inputs


def path_logps(model, segments, tree, mask):
    """The log-probabilities of the tokens in ``mask``, from a copy of each path. Shared ones are counted once."""
    logps = {}
    for path, inputs in paths_of(segments, tree):
        kept = segments.inputs["attention_mask"].bool()
        scored = torch.cat([mask[segment][kept[segment]] for segment in path]).nonzero()[:, 0]
        if len(scored):
            sequence = [(segment, k) for segment in path for k in range(int(kept[segment].sum()))]
            ids = inputs["input_ids"][0, scored]
            values = model(**inputs, use_cache=False).logits[0, scored - 1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            logps = {sequence[index]: value for index, value in zip(scored.tolist(), values, strict=True)} | logps
    return torch.stack([logps[token] for token in sorted(logps)])


def pack_logps(model, pack):
    hidden = model.base_model(**pack.inputs, use_cache=False).last_hidden_state
    return linear_logps(hidden, model.get_output_embeddings().weight, pack.targets, rows=pack.rows)


TREE = [-1, 0, 1, 1, 3, 0, 0, -1, 7]
# Samples with images (1 to 3) and a video (4) at all depths, and two segments without tokens.
CHOSEN = {
    "text": [1, 2, EMPTY, 0, 3, EMPTY, 2, 3, 1],
    "images": [1, 2, 0, 2, 1, EMPTY, 3, 0, 1],
    "videos": [0, 4, 1, 0, 4, EMPTY, 3, 1, 4],
}


def fp64_case(name, kind):
    model = copy.deepcopy(tiny_families.case(name).model).double()
    segments = segments_of(name, CHOSEN[kind])
    segments.inputs.update({n: x.double() for n, x in segments.inputs.items() if x.is_floating_point()})
    mask = segments.inputs["attention_mask"].bool()
    mask = (
        mask & (torch.tensor(TREE) >= 0)[:, None] & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.8)
    )
    return model, segments, mask


def with_gradients(model, compute, weights):
    model.zero_grad()
    logps = compute()
    (logps * weights).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WITH_IMAGES = (
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "minicpmv4_7",
    "glm4v",
    "llava_onevision",
    "internvl",
    "gemma3",
    "paligemma",
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("text", "text"), ("qwen2_5_vl", "videos"), *((n, "images") for n in WITH_IMAGES if n in tiny_families.BUILDERS)],
)
def test_trees_equal_their_paths(name, kind):
    """Compares log-probabilities and the gradients of all parameters, also if the tree is cut into packs."""
    model, segments, mask = fp64_case(name, kind)
    weights = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    lengths = segments.inputs["attention_mask"].sum(1).tolist()
    packs = cut_trees(lengths, TREE, TreeLayout(lengths, TREE).longest_path, hidden_size=32)
    assert len(packs) > 1

    def of_packs():
        logps = torch.zeros_like(mask, dtype=torch.float64)
        for pack in packs:
            chosen, parents, owned = select_tree(segments, pack, mask)
            values = pack_logps(model, pack_trees(model, chosen, parents, owned))
            logps[torch.tensor(pack.segments)] += torch.zeros_like(owned, dtype=torch.float64).masked_scatter(owned, values)
        return logps[mask]

    with InDouble():
        expected, gradients = with_gradients(model, lambda: path_logps(model, segments, TREE, mask), weights)
        use_tree_attention(model)
        whole = with_gradients(model, lambda: pack_logps(model, pack_trees(model, segments, TREE, mask)), weights)
        cut = with_gradients(model, of_packs, weights)
    largest = max(g.abs().max() for g in gradients.values())
    for logps, ours in (whole, cut):
        torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-12)
        assert ours.keys() == gradients.keys()
        bad = [n for n, g in gradients.items() if (ours[n] - g).abs().max() > 1e-10 * largest]
        assert not bad


@pytest.mark.parametrize("name", ["text", "qwen2_5_vl", "internvl", "gemma3", "paligemma"])
def test_groups_are_trees_of_two_levels(name):
    model, prompts = tiny_families.case(name).model, processed(name).select(torch.tensor([1, 0, 2]))
    ids, mask = completions_of([3, 0, 5, 4], vocab=20)
    group, tree = torch.tensor([0, 0, 2, 2]), [-1, 0, 0, -1, -1, 4, 4]
    positions = prompt_positions(model, prompts.inputs)
    groups = pack_groups(prompts.inputs, positions, group, ids + tiny_families.token_id("a"), mask, prompts.family)
    inputs = {"input_ids": ids + tiny_families.token_id("a"), "attention_mask": mask.long()}
    for key in prompts.inputs.keys() - inputs.keys():
        if prompts.family.axis(key) == "token":
            inputs[key] = torch.full_like(ids, prompts.family.inputs[key].completion)
    completions = ModelInputs.from_processor(inputs, prompts.family, torch.zeros(4, dtype=torch.int64))
    segments = concat([prompts, completions], pad_token_id=0).select(torch.tensor([0, 3, 4, 1, 2, 5, 6]))
    trees = pack_trees(model, segments, tree)
    assert groups.inputs.keys() == trees.inputs.keys()
    for key, x in trees.inputs.items():
        assert groups.inputs[key] == x if key == "tree_layout" else torch.equal(groups.inputs[key], x)
    assert torch.equal(groups.rows, trees.rows)
    assert torch.equal(groups.targets, trees.targets)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", *(n for n in ("gemma4", "gemma4_ple") if n in tiny_families.BUILDERS)])
@given(data=st.data())
def test_spans_are_those_of_the_paths(name, data):
    """The tokens of a path see what the masks of Gemma3Model, Gemma4Model and PaliGemmaModel let them see."""
    model, tree = tiny_families.case(name).model, data.draw(parents())
    segments = segments_of(name, data.draw(samples(name, len(tree))), right_padded=data.draw(st.booleans()))
    nothing = torch.zeros_like(segments.inputs["input_ids"], dtype=torch.bool)
    layout = pack_trees(model, segments, tree, nothing).inputs["tree_layout"]
    seen, places = layout.mask(), torch.arange(layout.num_tokens).split(layout.lengths)
    for path, inputs in paths_of(segments, tree):
        place = torch.cat([places[segment] for segment in path])
        types = inputs["mm_token_type_ids" if name.startswith("gemma4") else "token_type_ids"][0]
        if name == "paligemma":
            block = torch.where(types == 0, 0, -1)
        else:
            inside = types == 1 if name == "gemma3" else (types == 1) | (types == 2)
            inside &= name != "gemma4_ple"  # use_bidirectional_attention is None in its text configuration
            begins = inside & ~torch.cat([torch.tensor([False]), inside[:-1]])
            block = torch.where(inside, begins.cumsum(0), -1)
        together = (block[:, None] == block) & (block >= 0)
        causal = torch.ones(len(place), len(place), dtype=torch.bool).tril()
        assert torch.equal(seen[place][:, place], causal | together)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "paligemma", "ernie4_5_vl_moe"])
def test_inputs_that_a_pack_does_not_need_are_left_out(name):
    if name not in tiny_families.BUILDERS:
        pytest.skip(f"{name} is not in this version of transformers")
    pack = pack_trees(tiny_families.case(name).model, segments_of(name, [1, 0]), [-1, 0]).inputs
    per_token = {"moe_mm_token_type_ids"} if name == "ernie4_5_vl_moe" else set()
    media = {key for key in pack if key.startswith(("pixel", "image_grid"))}
    assert pack.keys() - media == {"input_ids", "attention_mask", "position_ids", "tree_layout"} | per_token
    assert all(pack[key].shape == pack["input_ids"].shape for key in per_token)


def test_an_image_is_encoded_once(monkeypatch):
    """It is in two trees, at different depths."""
    model = use_tree_attention(copy.deepcopy(tiny_families.case("glm4v").model))
    if not accepts_image_features(model):
        pytest.skip("this version of transformers does not accept image features")
    rows, own = [], model.model.visual.forward

    def counted(pixels, *args, **kwargs):
        rows.append(len(pixels))
        return own(pixels, *args, **kwargs)

    monkeypatch.setattr(model.model.visual, "forward", counted)
    segments = segments_of("glm4v", [1, 3, 1, 0, 1])
    pack = pack_trees(model, segments, [-1, 0, 1, -1, 3])
    assert pack.inputs["image_index"].tolist() == [0, 1, 0, 0]
    model.model(**pack.inputs, use_cache=False)
    assert rows == [int(segments.rows["image_patch"][:2].sum())]


def test_features_replace_pixels_in_trees():
    model = use_tree_attention(copy.deepcopy(tiny_families.case("qwen3_vl").model))
    if not accepts_image_features(model):
        pytest.skip("this version of transformers does not accept image features")
    segments = segments_of("qwen3_vl", [1, 2, 0, 3, 1])
    expected, actual = (
        model.model(**pack_trees(model, inputs, [-1, 0, 1, 0, -1]).inputs, use_cache=False).last_hidden_state
        for inputs in (segments, encode_images(model, segments))
    )
    torch.testing.assert_close(actual, expected)


def test_packs_of_a_cut_tree_score_every_token_once():
    model, segments = tiny_families.case("text").model, segments_of("text", [1, 2, EMPTY, 0, 3, EMPTY, 2, 3, 1])
    lengths = segments.inputs["attention_mask"].sum(1).tolist()
    packs = cut_trees(lengths, TREE, TreeLayout(lengths, TREE).longest_path, hidden_size=32)
    batches = [pack_trees(model, *select_tree(segments, pack)) for pack in packs]
    assert sum(batch.inputs["input_ids"].shape[1] for batch in batches) > sum(lengths)
    whole = pack_trees(model, segments, TREE)
    assert sorted(torch.cat([batch.targets for batch in batches]).tolist()) == sorted(whole.targets.tolist())


# Errors


def text_segments():
    return segments_of("text", [1, 0, 2, EMPTY])  # 4, 1, 7 and 0 tokens, in 10 columns


@pytest.mark.parametrize(
    ("tree", "error"),
    [
        ([-1, 0, 1], "parents must be one per segment, 4, got 3"),
        ([-1, 2, 0, 0], "parents must be -1 or an earlier segment, got 2 for segment 1"),
        ([-1, 0, 0, 1], "parents must be in depth-first order, .* got 1 for segment 3"),
    ],
)
def test_parents_must_be_those_of_trees(tree, error):
    with pytest.raises(ValueError, match=error):
        pack_trees(tiny_families.case("text").model, text_segments(), tree)


@pytest.mark.parametrize(
    ("place", "tree", "error"),
    [
        ((1, 0), [-1, 0, 1, 0], "loss_mask must be false on padding, got true on 1 tokens in segment 1"),
        ((0, 6), [-1, 0, 1, 0], "loss_mask must be false on the first token of a path, .* got true in segment 0"),
    ],
)
def test_loss_mask_must_have_tokens_that_are_predicted(place, tree, error):
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[place] = True
    with pytest.raises(ValueError, match=error):
        pack_trees(tiny_families.case("text").model, text_segments(), tree, mask)


def test_the_child_of_an_empty_root_has_an_unpredicted_token():
    with pytest.raises(ValueError, match=r"loss_mask must be false on the first token of a path, .* got true in segment 1"):
        pack_trees(tiny_families.case("text").model, segments_of("text", [EMPTY, 1]), [-1, 0])


def test_loss_mask_must_match_the_tokens():
    model = tiny_families.case("text").model
    with pytest.raises(ValueError, match=r"loss_mask must have the shape of input_ids, \(4, 10\), got \(4, 7\)"):
        pack_trees(model, text_segments(), [-1, 0, 1, 0], torch.zeros(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="loss_mask must hold only 0 and 1"):
        pack_trees(model, text_segments(), [-1, 0, 1, 0], torch.full((4, 10), 2))
    with pytest.raises(ValueError, match="segments must hold at least one segment, got none"):
        pack_trees(model, text_segments().select(torch.tensor([], dtype=torch.int64)), [])


def test_loss_mask_of_numbers():
    model, segments, tree = tiny_families.case("text").model, text_segments(), [-1, 0, 1, 0]
    mask = segments.inputs["attention_mask"].bool() & torch.tensor([[False], [True], [True], [False]])
    expected = pack_trees(model, segments, tree, mask)
    for given_mask in (mask.int(), mask.tolist()):
        pack = pack_trees(model, segments, tree, given_mask)
        assert torch.equal(pack.rows, expected.rows)
        assert torch.equal(pack.targets, expected.targets)


def cut_in_image(name):
    """A sample with one image, cut into two segments after the first half of its image tokens."""
    segments = segments_of(name, [1, 0])
    is_image = (segments.inputs["input_ids"][0] == segments.family.image_token_id).nonzero()[:, 0]
    half = int(is_image[len(is_image) // 2])
    assert half > is_image[0]
    for key, x in segments.inputs.items():
        if segments.family.axis(key) == "token":
            x[1] = x[0]
    segments.inputs["attention_mask"][0, half:] = 0
    segments.inputs["attention_mask"][1, :half] = 0
    return segments


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "idefics3"])
def test_images_must_not_be_cut(name):
    rule = "segments must contain the image tokens of their own images, got \\d+ image tokens for 0 images in segment 1"
    with pytest.raises(ValueError, match=rule):
        pack_trees(tiny_families.case(name).model, cut_in_image(name), [-1, 0])


@pytest.mark.parametrize(("name", "rows"), [("qwen3_vl", "image_patch"), ("gemma3", "tile")])
def test_segments_must_have_all_image_tokens(name, rows):
    segments = segments_of(name, [3, 3, 3])
    ids, mask = segments.inputs["input_ids"], segments.inputs["attention_mask"]
    mask[1, (ids[1] == segments.family.image_token_id).nonzero()[0]] = 0
    with pytest.raises(ValueError, match=rf"got \d+ image tokens for \d+ rows of {rows} in segment 1, where \d+ are expected"):
        pack_trees(tiny_families.case(name).model, segments, [-1, 0, 0])


@pytest.mark.parametrize(("name", "kind"), [("qwen3_vl", "image"), ("gemma3", "bidirectional")])
def test_images_must_not_touch_those_of_the_next_segment(name, kind):
    """In a copy of the path, the model would take both for one image."""
    segments = segments_of(name, [3, EMPTY, 3])
    is_image = segments.inputs["input_ids"] == segments.family.image_token_id
    segments.inputs["attention_mask"] &= is_image.long()
    rule = f"segments must contain whole runs of {kind} tokens, got one that begins in segment 0 and continues in segment 2"
    with pytest.raises(ValueError, match=rule):
        pack_trees(tiny_families.case(name).model, segments, [-1, 0, 1])


def test_a_path_has_one_prompt_that_attends_in_both_directions():
    segments = segments_of("paligemma", [1, 0, 0, 0])
    segments.inputs["token_type_ids"][3] = 0
    model = tiny_families.case("paligemma").model
    assert len(pack_trees(model, segments, [-1, 0, 0, -1]).inputs["tree_layout"].bidirectional) == 2
    rule = r"tokens with token_type_ids in \(0,\) of a path in one segment, .* got some in segment 0 and some in segment 3"
    with pytest.raises(ValueError, match=rule):
        pack_trees(model, segments, [-1, 0, 0, 2])


def test_groups_need_the_family_of_the_model():
    prompts = processed("gemma3")
    arguments = prompts.inputs, prompt_positions(tiny_families.case("gemma3").model, prompts.inputs), torch.tensor([0])
    ids, mask = completions_of([3])
    with pytest.raises(ValueError, match="family must be that of a model with token_type_ids, got text"):
        pack_groups(*arguments, ids, mask, TEXT)
