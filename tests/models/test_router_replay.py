"""Router replay: training uses the experts of the rollout, in a tiny model of every family with a mixture of experts."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from support import tiny, tiny_families
from support.groups import PAD, processed
from support.tiny_families import EXPERTS
from support.trajectories import ScriptedEpisodes, sample_of
from support.trees import segments_of

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.router_replay import (
    ROUTERS,
    ExpertRecorder,
    RoutedExperts,
    router_replay_unsupported,
    undo_router_replay,
    use_router_replay,
)
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.decode import decode_groups, decode_trajectories

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2
torch.set_num_threads(1)

LAYOUTS = ("packed", "padded")
MOE = ["qwen3_vl_moe", "qwen3_5_moe", "qwen3_next", "glm4v_moe", "ernie4_5_vl_moe", "gemma4", "kimi_k25"]


def prepared(name):
    model = copy.deepcopy(tiny_families.case(name).model).eval()
    return use_router_replay(use_tree_attention(model))


def perturb_routers(model):
    """Change which experts the routers prefer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ROUTERS:
                weight = module.weight if hasattr(module, "weight") else module.proj.weight
                weight += 2 * weight.std() * torch.randn(weight.shape, generator=generator)


def sampled(model, name, count=3):
    """A rollout of groups of completions."""
    prompts, processor = processed(name), tiny_families.case(name).processor
    sampling = Sampling(max_new_tokens=5).for_model(model, processor)
    uniform = torch.rand(count * len(prompts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decoded = decode_groups(model, prompts, count, sampling, uniform=uniform, max_num_seqs=5, record_experts=True)
    group = torch.arange(len(prompts)).repeat_interleave(count)
    return Rollout(
        prompts, group, decoded.ids, decoded.mask, decoded.truncated, decoded.logps, routed_experts=decoded.routed_experts
    )


def batch_of(rollout, model, layout, samples=None):
    samples = torch.arange(len(rollout.group)) if samples is None else samples
    return rollout.packed(samples, model) if layout == "packed" else rollout.padded(samples)


def logps_of(model, batch):
    head = output_head(model)
    return completion_logps(model, batch, head=head, arguments=logit_arguments(model, head), temperature=1.0)


def score(model, batch):
    """The log-probabilities of a batch and the experts that its tokens ran through, (T, M, K)."""
    recorder = ExpertRecorder(model, ModelInputs(batch.inputs | {"attention_mask": torch.ones(1, 1)}, {}, None), 0, 1)
    with recorder:
        return logps_of(model, batch).detach(), recorder.take()


def ran(mask):
    """The tokens of completions that ran through the model: all but the last."""
    lengths = mask.sum(1, keepdim=True)
    return torch.arange(mask.shape[1]) < lengths - 1


@pytest.mark.parametrize("name", MOE)
def test_training_uses_the_experts_of_the_rollout(name):
    model = prepared(name)
    rollout = sampled(model, name)
    experts, mask = rollout.routed_experts, rollout.completion_mask
    assert torch.equal((experts.prompts >= 0).all((-1, -2)), rollout.prompts.inputs["attention_mask"].bool())
    assert torch.equal((experts.completions >= 0).all((-1, -2)), ran(mask))
    for layout in LAYOUTS:
        batch = batch_of(rollout, model, layout)
        logps, chosen = score(model, batch)
        recorded = batch.inputs["routed_experts"].flatten(0, 1)
        assert torch.equal(chosen[recorded >= 0], recorded[recorded >= 0])
        torch.testing.assert_close(logps, rollout.logps[mask], rtol=1e-4, atol=2e-5)
    perturb_routers(model)
    for layout in LAYOUTS:
        batch = batch_of(rollout, model, layout)
        _, chosen = score(model, batch)
        recorded = batch.inputs["routed_experts"].flatten(0, 1)
        assert torch.equal(chosen[recorded >= 0], recorded[recorded >= 0])
        _, own = score(model, batch_of(replace(rollout, routed_experts=None), model, layout))
        assert not torch.equal(own[recorded >= 0], recorded[recorded >= 0])
        unknown = replace(rollout, routed_experts=RoutedExperts(*(torch.full_like(x, -1) for x in experts)))
        assert torch.equal(score(model, batch_of(unknown, model, layout))[1], own)


def test_weights_of_given_experts_are_those_of_a_plain_router():
    """The output of a MoE layer, from its logits, against a sum over the given experts in fp64."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**tiny.TEXT, **EXPERTS, vocab_size=50, norm_topk_prob=True, head_dim=8)
    model = use_router_replay(transformers.Qwen3MoeForCausalLM(config).eval())
    block, hidden = model.model.layers[0].mlp, []
    block.register_forward_hook(lambda module, args, output: hidden.extend([args[0][0], output[0]]))
    ids, given = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 0], [2, 3], [-1, -1]])
    model(input_ids=ids, use_cache=False, routed_experts=torch.stack([given] * 2, 1).unsqueeze(0))
    x, out = (values.detach().double() for values in hidden[:2])
    gate_up, down = (p.detach().double() for p in (block.experts.gate_up_proj, block.experts.down_proj))
    probabilities = (x @ block.gate.weight.detach().double().T).softmax(-1)
    given[2] = probabilities[2].topk(2).indices
    for row in range(3):
        share = probabilities[row, given[row]] / probabilities[row, given[row]].sum()
        expected = torch.zeros_like(x[row])
        for expert, weight in zip(given[row].tolist(), share, strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            expected += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(out[row], expected, rtol=1e-5, atol=1e-8)


def gradients(model, batch):
    model.zero_grad()
    logps_of(model, batch).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_moe", "ernie4_5_vl_moe"])
def test_gradient_checkpointing_replays_too(name, use_reentrant):
    model = prepared(name)
    rollout = sampled(model, name, count=2)
    perturb_routers(model)
    batch = batch_of(rollout, model, "packed")
    expected, own = gradients(model, batch), gradients(model, batch_of(replace(rollout, routed_experts=None), model, "packed"))
    routers = [name for name in expected if name.endswith("gate.weight") and "vision_moe" not in name]
    assert routers
    assert all(expected[name].abs().sum() > 0 for name in routers)
    assert any(not torch.allclose(expected[name], own[name], rtol=1e-3) for name in expected)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    actual = gradients(model, batch)
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def marked(rollout):
    """The rollout with the token ids in place of experts."""
    prompts, completions = rollout.prompts.inputs["input_ids"], rollout.completion_ids
    return replace(
        rollout,
        routed_experts=RoutedExperts(*(x.short()[..., None, None].expand(*x.shape, 2, 3) for x in (prompts, completions))),
    )


def test_experts_follow_their_tokens_through_packs_and_rows():
    """Prompts of different lengths, shared prompts, some of the completions, and trajectories with common beginnings."""
    name = "qwen3_vl_moe"
    model = prepared(name)
    rollout = marked(sampled(model, name))
    trajectories = marked(trajectories_of(model, name)[0])
    for case in (rollout, trajectories):
        count = len(case.group)
        for layout in LAYOUTS:
            for samples in (torch.arange(count), torch.arange(1, count, 2)):
                inputs = batch_of(case, model, layout, samples).inputs
                experts = inputs["routed_experts"]
                assert experts.shape == (*inputs["input_ids"].shape, 2, 3)
                inside = inputs["attention_mask"].bool()
                assert torch.equal(experts[inside], inputs["input_ids"][inside].short()[..., None, None].expand(-1, 2, 3))


def trajectories_of(model, name):
    """A rollout of completions with results of tools, and the results."""
    segments = segments_of(name, [1, 0, 2, 3])
    prompts, results = segments.select(torch.tensor([0, 1])), [sample_of(segments, k) for k in (2, 3)]
    episodes = ScriptedEpisodes([0, 0, 0, 1, 1], [[results[0]], [results[0]], [results[1]], [results[1]], []])
    length = max(r.inputs["input_ids"].shape[1] for r in results) + 6
    sampling = Sampling(length, list(range(0, 300, 3)), PAD).for_model(model, tiny_families.case(name).processor)
    uniform = torch.rand(5, length, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    decoded = decode_trajectories(model, prompts, episodes, sampling, max_num_seqs=3, uniform=uniform, record_experts=True)
    rest = {"turns": decoded.turns, "routed_experts": decoded.routed_experts}
    return Rollout(prompts, episodes.group, decoded.ids, decoded.mask, decoded.truncated, decoded.logps, **rest), results


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_trajectories(name):
    model = prepared(name)
    rollout, _ = trajectories_of(model, name)
    assert rollout.turns.num_turns == 2
    assert torch.equal((rollout.routed_experts.completions >= 0).all((-1, -2)), ran(rollout.completion_mask))
    for layout in LAYOUTS:
        batch = batch_of(rollout, model, layout)
        logps, chosen = score(model, batch)
        recorded = batch.inputs["routed_experts"].flatten(0, 1)
        assert torch.equal(chosen[recorded >= 0], recorded[recorded >= 0])
        torch.testing.assert_close(logps, rollout.logps[rollout.sampled_mask], rtol=1e-4, atol=2e-5)


def test_undo_and_copies():
    model = prepared("qwen3_vl_moe")
    batch = batch_of(sampled(model, "qwen3_vl_moe", count=1), model, "packed")
    twin = copy.deepcopy(model)
    perturb_routers(twin)
    score(twin, batch)
    assert twin.model.language_model.layers[0].mlp.gate.forward.__self__ is twin.model.language_model.layers[0].mlp.gate
    undo_router_replay(twin)
    assert not any("expert_replay" in vars(module) for module in twin.modules())
    assert "forward" not in vars(twin.model.language_model.layers[0].mlp.gate)
    use_router_replay(twin)
    assert use_router_replay(model) is model
    assert torch.equal(score(model, batch)[1][:3], batch.inputs["routed_experts"][0, :3])


def test_errors():
    text = tiny.text_model()
    assert "must have MoE layers with one of the routers" in router_replay_unsupported(text)
    with pytest.raises(NotImplementedError, match="model must support router replay: Qwen2ForCausalLM must have MoE layers"):
        use_router_replay(text)
    with pytest.raises(NotImplementedError, match="model must be prepared by use_router_replay to record experts"):
        ExpertRecorder(text, processed("text"), 1, 1)
    model = prepared("qwen3_vl_moe")
    recorder = ExpertRecorder(model, processed("qwen3_vl_moe"), 1, 1)
    with pytest.raises(RuntimeError, match="a forward pass must have recorded experts, got none of MoE layer 0"):
        recorder.take()
    ids = torch.tensor([[60, 61]])
    experts = torch.zeros(1, 2, 2, 2, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"routed_experts must hold integers, got torch\.float32"):
        model(input_ids=ids, routed_experts=experts.float())
    with pytest.raises(ValueError, match=r"one row of experts per token and MoE layer, \(1, 2, 2, 2\), got \(1, 2, 1, 2\)"):
        model(input_ids=ids, routed_experts=experts[:, :, :1])
    with pytest.raises(ValueError, match=r"routed_experts must be -1 or in \[0, 4\), got 0 to 4"):
        model(input_ids=ids, routed_experts=experts + torch.tensor([0, 4], dtype=torch.int16))
    router = model.model.language_model.layers[1].mlp.gate
    type(router).forward, original = lambda self, x: (None, *x.topk(2)), type(router).forward
    try:
        with pytest.raises(
            NotImplementedError, match="choose by one topk of 2 of 4 experts, got 0 in Qwen3VLMoeTextTopKRouter"
        ):
            model(input_ids=ids, routed_experts=experts)
    finally:
        type(router).forward = original
    layer = model.model.language_model.layers[1]
    layer.self_attn._forward_pre_hooks.clear()
    with pytest.raises(
        NotImplementedError, match=r"pass routed_experts on to all of its MoE layers, got none in the layers \[1\]"
    ):
        model(input_ids=ids, routed_experts=experts)
