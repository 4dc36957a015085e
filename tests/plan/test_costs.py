"""The planner's counts compared with torch: tokens, operations and bytes of small models.

bench/bench_plan.py measures its times.
"""

import math
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.planner import CPU, SMALL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.packs import pack_groups
from vlmkernels.models.positions import prompt_positions
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.ops.tree_attention import TreeLayout
from vlmkernels.plan import ModelShape, plan
from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.layers import kind_of, saved_bytes
from vlmkernels.plan.mixers import Span
from vlmkernels.plan.workload import StepTokens
from vlmkernels.rollout.base import Rollout

torch.set_num_threads(1)

MODELS = {"qwen2_5_vl": tiny.vlm, "qwen3_vl": tiny.qwen3_vl}


# Tokens


def prompts_of(model, processor, num: int):
    row = {"prompt": [{"role": "user", "content": "what do you see?"}]}
    rows = [{**row, "images": [tiny.image(k, SMALL.width, SMALL.height)]} for k in range(num)]
    return encode([read_sample(row, k) for k, row in enumerate(rows)], processor, family_of(model.config))


def big_processor():
    processor = tiny.processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2**20}
    return processor


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_those_of_the_batch(name):
    model, processor = MODELS[name](), big_processor()
    batch = prompts_of(model, processor, SMALL.prompts)
    shape = ModelShape.from_config(model.config)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    of_images = (batch.inputs["input_ids"] == model.config.image_token_id).sum().item()
    text = lengths[0] - of_images // SMALL.prompts
    work = replace(SMALL, prompt_tokens=text)
    shared, apart = StepTokens.from_workload(shape, work), StepTokens.from_workload(shape, replace(work, share_prefix=False))
    assert lengths == [shared.prompt] * SMALL.prompts
    assert (shared.image_tokens, shared.patches) == (of_images, len(batch.inputs["pixel_values"]))
    assert (apart.image_tokens, apart.patches) == (3 * of_images, 3 * len(batch.inputs["pixel_values"]))

    count, length = SMALL.prompts * SMALL.group_size, SMALL.completion_tokens
    ids = torch.ones(count, length, dtype=torch.int64)
    group = torch.arange(SMALL.prompts).repeat_interleave(SMALL.group_size)
    positions = prompt_positions(model, batch.inputs)
    inputs = pack_groups(batch.inputs, positions, group, ids, ids.bool(), batch.family).inputs
    assert inputs["input_ids"].numel() == shared.passed
    rollout = Rollout(batch, group, ids, ids.bool(), torch.zeros(count, dtype=torch.bool))
    assert rollout.padded(torch.arange(count)).inputs["input_ids"].numel() == apart.passed
    for budget in (shared.prompt + length, shared.prompt + 2 * length, 2 * shared.passed):
        packs = rollout.parts(slice(None), budget, shared=True, hidden_size=32)
        found = StepTokens.from_workload(shape, replace(work, microbatch_tokens=budget))
        assert len(packs) == found.packs
        sizes = [shared.prompt * len({group[k].item() for k in pack}) + length * len(pack) for pack in packs]
        assert sum(sizes) == found.passed
    layout = inputs["tree_layout"]
    behind = sum(length * offset for length, offset in zip(layout.lengths, layout.offsets, strict=True))
    assert shared.pairs == sum(n**2 / 2 for n in layout.lengths) + behind


# Operations


@pytest.mark.parametrize("name", MODELS)
def test_operations_equal_those_that_torch_counts(name):
    model, processor = MODELS[name](), big_processor()
    shape = ModelShape.from_config(model.config)
    batch = prompts_of(model, processor, 2)
    length = batch.inputs["input_ids"].shape[1]
    costs = StepCosts(shape, replace(SMALL, prompts=1, group_size=2, completion_tokens=1, share_prefix=False), CPU)
    t = StepTokens.from_workload(shape, replace(SMALL, prompts=1, group_size=2, share_prefix=False))
    model.set_attn_implementation("eager")  # computes every pair, and does not recompute in the backward pass
    with FlopCounterMode(display=False) as forward:
        hidden = model.model(**batch.inputs).last_hidden_state
    decoder = every_pair(costs.decoder([Span(2, 0, length)], 1))
    tower = costs.tower(t.patches, t.image_tokens, t.vision_pairs, 1)
    assert forward.get_total_flops() - rotary(forward) == pytest.approx(sum(w.gemm + w.attention for w in (decoder, tower)))
    with FlopCounterMode(display=False) as back:
        hidden.sum().backward()
    decoder = every_pair(costs.decoder([Span(2, 0, length)], 1, backward=True))
    tower = costs.tower(t.patches, t.image_tokens, t.vision_pairs, 1, backward=True)
    pixels = next(p for n, p in model.named_parameters() if "patch_embed.proj.weight" in n).numel() * t.patches * 2
    expected = (
        decoder.gemm + tower.gemm - pixels + 0.8 * (decoder.attention + tower.attention)
    )  # eager takes 2 times the forward pass, and not 2.5
    assert back.get_total_flops() == pytest.approx(expected)

    scored = costs.scores()
    with FlopCounterMode(display=False) as head:
        logits = model.lm_head(hidden.detach()[:, -1:].requires_grad_())
    assert head.get_total_flops() == scored.gemm
    with FlopCounterMode(display=False) as back:
        logits.sum().backward()
    assert head.get_total_flops() + back.get_total_flops() == costs.scores(loss=True).gemm


def every_pair(cost):
    """Return the cost of attention that also computes the pairs which a causal mask removes."""
    return replace(cost, attention=2 * cost.attention)


def rotary(counter) -> int:
    """Return the operations of the outer products that make angles of positions, which the planner neglects."""
    return sum(
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("language_model.rotary_emb")
    )


def test_lora_takes_half_of_the_backward_products():
    shape = ModelShape.from_config(tiny.vlm().config)
    full, lora = (StepCosts(shape, replace(SMALL, lora_r=r), CPU) for r in (0, 4))
    of_adapters = 4 * lora.adapters * 100
    tokens = [Span(1, 0, 100)]
    assert lora.decoder(tokens, 1, backward=True).gemm - of_adapters == full.decoder(tokens, 1, backward=True).gemm / 2
    assert (lora.scores(loss=True).gemm, full.scores(loss=True).gemm) == (
        4 * lora.scored * shape.head,
        6 * full.scored * shape.head,
    )
    from peft import LoraConfig, get_peft_model

    layers = r"model\.language_model\.layers\..*_proj"
    adapted = get_peft_model(tiny.vlm(), LoraConfig(r=4, target_modules=layers))
    assert lora.trainable == adapted.get_nb_trainable_parameters()[0]


# Bytes


class Traffic(TorchDispatchMode):
    """Count the bytes that operations other than matrix products read and write, without views and broadcast numbers."""

    PRODUCTS = ("mm", "_scaled_dot_product", "convolution")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not any(product in name for product in self.PRODUCTS):
            read, written = (
                [x for x in torch.utils._pytree.tree_leaves(leaves) if isinstance(x, torch.Tensor)] for leaves in (args, out)
            )
            held = {x.untyped_storage().data_ptr() for x in read}
            if name.endswith("_") or not all(x.untyped_storage().data_ptr() in held for x in written):
                self.bytes += sum(x.nbytes for x in (*read, *written))
        return out


def cost_of_layers(name: str, tower: bool, amp: bool, many: int, rows: int):
    """Return (saved by autograd, traffic forward, traffic backward) in bytes for ``many`` layers, and the shape."""
    config = MODELS[name]().config.to_dict()
    layers = {"num_hidden_layers": many, "hidden_size": 64, "intermediate_size": 192}
    config["text_config"] |= layers | {"layer_types": ["full_attention"] * many}
    config["text_config"]["head_dim"] = 16
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    config["vision_config"] |= {
        "depth": many,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 64,
    }
    config["vision_config"] |= {"fullatt_block_indexes": []} if name == "qwen2_5_vl" else {"deepstack_visual_indexes": []}
    model_class = type(MODELS[name]())
    model = model_class(model_class.config_class(**config))
    use_vision_ops(model, tiny.processor())
    use_tree_attention(model)
    weights = {p.shape for p in model.parameters() if p.dim() > 1}
    kept = {}

    def keep(x):
        copied = amp and (x.shape in weights or x.movedim(-1, 0).shape in weights)  # copies of weights are counted separately
        if not copied:
            kept[x.untyped_storage().data_ptr()] = x  # kept alive, so that no other tensor gets its address
        return x

    forward, backward = Traffic(), Traffic()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=amp), forward:
        if tower:
            side = math.isqrt(rows)
            pixels = torch.randn(rows, 3 * 2 * 14 * 14)
            hidden = model.model.visual(pixels, grid_thw=torch.tensor([[1, side, side]])).last_hidden_state
        else:
            ids = torch.full((1, rows), 7)
            layout = TreeLayout.groups((rows // 2,), ((rows // 4, rows // 4),))
            positions = torch.arange(rows).expand(3, 1, rows)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
            hidden = model.model(**inputs, tree_layout=layout, use_cache=False).last_hidden_state
    with backward:
        hidden.float().sum().backward()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    return torch.tensor([saved, forward.bytes, backward.bytes]), ModelShape.from_config(model.config)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tower", [False, True], ids=["decoder", "tower"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_layer_match_torch(name, tower, amp):
    rows = 64 if tower and not amp else 144  # all windows have one size; with autocast, no weight has this many rows
    (few, shape), (more, _) = (cost_of_layers(name, tower, amp, many, rows) for many in (1, 3))
    saved, forward, backward = ((more - few) / 2 / rows).tolist()
    stack = shape.vision.stack if tower else shape.decoder
    kind = kind_of(stack, tower)
    assert saved_bytes(stack, tower, "bf16" if amp else "fp32") == pytest.approx(saved, rel=0.1 if amp else 0.02)
    if not amp:  # the planner counts all traffic in bf16
        assert 4 * kind.forward.elements(stack) == pytest.approx(forward, rel=0.15)
        assert 4 * kind.backward.elements(stack) == pytest.approx(backward, rel=0.15)


def test_bytes_of_weights_gradients_and_optimizer_equal_those_of_torch():
    model = tiny.vlm()
    shape = ModelShape.from_config(model.config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    found = plan(shape, replace(SMALL, microbatch_tokens=60, reference=True), CPU).memory
    held = sum(p.nbytes for p in model.parameters())
    assert (found["weights"], found["reference"], found["optimizer"], found["gradients"]) == (held, held, states, held)
