"""Whole models over packs of trees, in a tiny model of every family: each path is as if it ran alone."""

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import tiny_families
from support.double import InDouble
from support.groups import SHARING, amplified, completions_of
from support.tiny_families import TEXT
from support.trees import EMPTY, leaves, parents, path_inputs, samples, segments_of
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.families import family_of, prefix_sharing_unsupported
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.packs import pack_trees
from vlmkernels.ops.tree_attention import TreeLayout
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.decode import decode_groups

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2
torch.set_num_threads(1)

# A tree of two roots: forks, images or videos in roots and below, and an empty segment. The numbers are samples of the case.
TREE = [-1, 0, 1, 1, 0, 4, -1, 6]
CHOSEN = [1, 0, 3, 2, EMPTY, 0, 0, 1]


def tree_of(name, tree, chosen):
    """Samples as segments. In Molmo2 all image tokens of a path attend to each other, so only roots have images."""
    if name.startswith("molmo2"):
        chosen = [sample if parent < 0 else min(sample, 0) for sample, parent in zip(chosen, tree, strict=True)]
    return segments_of(name, [min(sample, len(tiny_families.case(name).samples) - 1) for sample in chosen])


def hidden_states(model, inputs):
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def no_loss(segments):
    return torch.zeros(segments.inputs["input_ids"].shape, dtype=torch.bool)


@contextmanager
def tree_attention_of(model):
    use_tree_attention(model)
    try:
        yield
    finally:
        undo_tree_attention(model)


def of_tree(model, segments, tree):
    """The hidden states of all tokens from a pack."""
    with tree_attention_of(model):
        return hidden_states(model, pack_trees(model, segments, tree, no_loss(segments)).inputs)


def of_paths(model, segments, tree):
    """For each leaf, the indices of the tokens of its path in the pack, and their hidden states, from the path alone."""
    lengths = segments.inputs["attention_mask"].sum(1).tolist()
    places = torch.arange(sum(lengths)).split(lengths)
    results = []
    for leaf in leaves(tree):
        path, segment = [], leaf
        while segment >= 0:
            path.insert(0, segment)
            segment = tree[segment]
        place = torch.cat([places[segment] for segment in path])
        if len(place):
            results.append((place, hidden_states(model, path_inputs(segments, tuple(path)))))
    return results


@pytest.mark.parametrize("name", SHARING)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_hidden_states_equal_those_of_each_path(name, data):
    """Images and videos are in any segment, and sliding windows are shorter than the paths."""
    model, tree = tiny_families.case(name).model, data.draw(parents(6))
    segments = tree_of(name, tree, data.draw(samples(name, len(tree))))
    assume(segments.inputs["attention_mask"].any())  # models of transformers raise for inputs without tokens
    with torch.no_grad():
        alone, hidden = of_paths(model, segments, tree), of_tree(model, segments, tree)
    for place, expected in alone:
        torch.testing.assert_close(hidden[place], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def gradients_of_tree(model, segments, tree, weight):
    with tree_attention_of(model):  # in the backward pass too: checkpoints run the layers again
        hidden = hidden_states(model, pack_trees(model, segments, tree, no_loss(segments)).inputs)
        return differentiate(model, (hidden * weight).sum())


def gradients_of_paths(model, segments, tree, weight):
    """The gradients with each path alone. A token that is in several paths counts in the first of them."""
    total, counted = 0, torch.zeros(len(weight), dtype=torch.bool)
    for place, hidden in of_paths(model, segments, tree):
        total = total + (hidden * weight[place])[~counted[place]].sum()
        counted[place] = True
    return differentiate(model, total)


def differentiate(model, loss):
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: x for name, x in zip(named, gradients, strict=True) if x is not None}


def in_double(segments):
    for key, x in segments.inputs.items():
        if x.is_floating_point():
            segments.inputs[key] = x.double()
    return segments


def random_weight(segments, width):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(int(segments.inputs["attention_mask"].sum()), width, generator=rng)


def assert_equal_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", SHARING)
def test_gradients_equal_the_sum_over_paths(name):
    """In fp64: the gradients of all parameters, those of the vision tower too."""
    model = copy.deepcopy(tiny_families.case(name).model).double()
    model.set_experts_implementation("eager")  # the others have no fp64
    segments = in_double(tree_of(name, TREE, CHOSEN))
    weight = random_weight(segments, model.config.get_text_config().hidden_size).double()
    with InDouble():
        expected = gradients_of_paths(model, segments, TREE, weight)
        actual = gradients_of_tree(model, segments, TREE, weight)
    assert sum("vis" in key for key in expected) >= sum("vis" in key for key, _ in model.named_parameters()) / 2
    assert_equal_gradients(actual, expected, 1e-10)


# Attention, the delta rule, windows and spans, convolutions, latent attention.
KINDS = ["qwen2_5_vl", "qwen3_5", "gemma3", "lfm2_vl", "kimi_k25"]


@pytest.mark.parametrize("name", KINDS)
def test_lora_and_gradient_checkpointing(name):
    """Gradients of adapters on all linear layers, in training mode, as close to those in fp64 as separate paths are."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny_families.case(name).model)
    model.set_experts_implementation("eager")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    segments = segments_of(name, CHOSEN)
    weight = random_weight(segments, model.config.get_text_config().hidden_size)
    with InDouble():
        exact = gradients_of_paths(copy.deepcopy(model).double(), in_double(segments_of(name, CHOSEN)), TREE, weight.double())
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    copies = gradients_of_paths(model, segments, TREE, weight)
    actual = gradients_of_tree(model, segments, TREE, weight)
    assert exact.keys() == copies.keys() == actual.keys()
    assert all("lora" in key for key in exact)
    largest = max(float(x.abs().max()) for x in exact.values())
    for key, gradient in exact.items():
        error, allowed = (float((x[key] - gradient).abs().max()) for x in (actual, copies))
        assert error <= 4 * allowed + 1e-6 * largest, f"{key}: error {error:.2e}, of separate paths {allowed:.2e}"


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name):
    """In bf16 by autocast a pack is about as close to the results in fp32 as separate paths are."""
    model = tiny_families.case(name).model
    segments = segments_of(name, CHOSEN)
    with torch.no_grad():
        exact = of_paths(model, segments, TREE)
        with torch.autocast("cpu", torch.bfloat16):
            copies, hidden = of_paths(model, segments, TREE), of_tree(model, segments, TREE)
    assert copies[0][1].dtype == hidden.dtype
    errors = {"tree": [], "copies": []}
    for (place, expected), (_, other) in zip(exact, copies, strict=True):
        errors["tree"].append((hidden[place].double() - expected).norm() / expected.norm())
        errors["copies"].append((other.double() - expected).norm() / expected.norm())
    assert 0 < max(errors["tree"]) < 1.5 * max(errors["copies"])


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "qwen3_next"])
def test_router_loss_counts_a_token_once_per_path(name):
    """The loss of the router over a pack equals that over copies of all paths, and so do its gradients."""
    model = copy.deepcopy(tiny_families.case(name).model).double()
    model.set_experts_implementation("eager")
    model.config.get_text_config().output_router_logits = True
    segments = in_double(segments_of(name, CHOSEN))
    with InDouble():
        layout = TreeLayout(segments.inputs["attention_mask"].sum(1), TREE)
        paths = [path_inputs(segments, layout.path(leaf)) for leaf in leaves(TREE)]
        copies = router_loss_of_copies(model, paths)
        expected = differentiate(model, copies)
        with tree_attention_of(model):
            actual = model(**pack_trees(model, segments, TREE, no_loss(segments)).inputs, output_router_logits=True).aux_loss
        torch.testing.assert_close(actual, copies, rtol=1e-10, atol=0)
        assert_equal_gradients(differentiate(model, actual), expected, 1e-9)


def router_loss_of_copies(model, paths):
    """The formula of transformers over the tokens of all paths, each of which runs alone."""
    config = model.config.get_text_config()
    module = sys.modules[type(model).__module__]
    logits = [model(**inputs, output_router_logits=True, use_cache=False).router_logits for inputs in paths]
    joined = tuple(torch.cat(layers) for layers in zip(*logits, strict=True))
    return module.load_balancing_loss_func(joined, config.num_experts, config.num_experts_per_tok)


def test_undone_and_repeated():
    """A second call changes nothing, and undoing restores the forward functions, the hooks and the results."""
    case = tiny_families.case("qwen3_5")
    model, inputs = case.model, case.inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        forwards = [vars(module).get("forward") for module in model.modules()]
        use_tree_attention(model)
        use_tree_attention(model)
        with_hooks = model(**inputs).logits
        undo_tree_attention(model)
        undo_tree_attention(model)
        assert torch.equal(model(**inputs).logits, before)
    torch.testing.assert_close(with_hooks, before)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert not [hook for hook in model.base_model._forward_pre_hooks.values() if hook.__name__ == "_prepare_pack"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "lfm2_vl"])
@pytest.mark.parametrize("change", ["by name only", "another attention", "pickled"])
def test_packs_need_a_prepared_model(tmp_path, name, change):
    """Otherwise the model would ignore the layout of a pack."""
    model = copy.deepcopy(tiny_families.case(name).model)
    pack = pack_trees(model, segments_of(name, [0, 0]), [-1, 0]).inputs
    if change == "by name only":
        model.set_attn_implementation({"text_config": "vlmkernels"})
        if name == "qwen2_5_vl":
            return  # attention alone needs no more
    else:
        use_tree_attention(model)
        model(**pack)
    if change == "another attention":
        model.set_attn_implementation({"text_config": "sdpa"})
    if change == "pickled":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
        if name == "qwen2_5_vl":
            model(**pack)
            return
    with pytest.raises(NotImplementedError, match="model must be prepared by use_tree_attention to run packs, got"):
        decode_groups(model, segments_of(name, [0, 0]), 2, Sampling(max_new_tokens=2, eos_token_id=[2], pad_token_id=0))
    if change != "by name only":
        with pytest.raises(NotImplementedError, match="model must be prepared by use_tree_attention to run packs, got"):
            model(**pack)


def test_errors_of_use_tree_attention():
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny_families.case("qwen3_5").model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    with pytest.raises(TypeError, match="model must be a transformers model without adapters, got PeftModel"):
        use_tree_attention(adapted)
    use_tree_attention(model)
    pack = pack_trees(model, segments_of("qwen3_5", [0, 0]), [-1, 0]).inputs
    with pytest.raises(ValueError, match="position_ids must be given with tree_layout, as in the inputs of a pack, got None"):
        model(**pack | {"position_ids": None})
    with pytest.raises(ValueError, match="tree_layout must hold at least one token to run a model, got none"):
        model(**pack | {"tree_layout": TreeLayout((), ())})
    bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 2, "max_length_k": 2}
    model = use_tree_attention(copy.deepcopy(tiny_families.case("lfm2_vl").model))
    with pytest.raises(NotImplementedError, match="must run packed sequences without recurrent layers, got conv"):
        model(input_ids=torch.tensor([[5, 6, 7]]), **packed)


def test_other_replaced_forwards_are_a_reason():
    """accelerate replaces forward functions, for example with a device_map."""
    model = copy.deepcopy(tiny_families.case("qwen3_5").model)
    layer = next(module for module in model.modules() if type(module).__name__ == "Qwen3_5GatedDeltaNet")
    layer.forward = layer.forward
    reason = "the forward of its Qwen3_5GatedDeltaNet has been replaced, for example by hooks of accelerate"
    assert prefix_sharing_unsupported(model) == f"Qwen3_5ForConditionalGeneration: {reason}"


@pytest.mark.parametrize("arguments", [{"use_cache": True}, {"past_key_values": DynamicCache()}], ids=["use_cache", "cache"])
def test_a_cache_of_one_sequence_is_refused(arguments):
    model = tiny_families.case("qwen3_5").model
    pack = pack_trees(model, segments_of("qwen3_5", [0, 0]), [-1, 0]).inputs
    with tree_attention_of(model), pytest.raises(ValueError, match="must be None or False with tree_layout: the states of a"):
        model(**pack, **arguments)


WINDOWS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_text_models(name):
    torch.manual_seed(0)
    model = amplified(WINDOWS[name]())
    assert prefix_sharing_unsupported(model) is None
    tree, lengths = [-1, 0, 1, 1, 0, -1], [20, 9, 5, 12, 3, 4]
    ids, mask = completions_of(lengths)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    segments = ModelInputs.from_processor(inputs, family_of(model.config), torch.zeros(len(tree), dtype=torch.int64))
    with torch.no_grad():
        alone, hidden = of_paths(model, segments, tree), of_tree(model, segments, tree)
    for place, expected in alone:
        torch.testing.assert_close(hidden[place], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with torch.no_grad():  # so the window matters
        assert not torch.allclose(of_tree(model, segments, tree), hidden, rtol=0, atol=1e-2)
