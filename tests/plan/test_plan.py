"""The planner's algebra beside what torch counts: operations, bytes and tokens of small models. Its times are measured by
bench/bench_plan.py."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from support import tiny, tiny_families
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlmkernels.cli import main
from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.attention import use_group_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.group import pack_groups, prompt_positions
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.ops.group_attention import GroupLayout
from vlmkernels.plan import MACHINES, Machine, ModelShape, Workload, calibrate, machine, plan
from vlmkernels.plan.step import _Costs, kind_of, saved_bytes
from vlmkernels.plan.workload import Tokens
from vlmkernels.rollout.generate import Rollout

torch.set_num_threads(1)

MODELS = {"qwen2_5_vl": tiny.vlm, "qwen3_vl": tiny.qwen3_vl}
CPU = Machine(
    "cpu", "by hand", "fp32", ((1, 1e9), (100, 3e9)), attention=1e9, attention_backward=1e9, bandwidth=1e9, weights=1e9,
    fresh=1e9, calls=dict.fromkeys(machine.CALLS, 0.001), overlaps=False, memory=1e9,
)  # fmt: skip
SMALL = Workload(
    prompts=2, group_size=3, prompt_tokens=20, completion_tokens=6, width=112, height=56, precision="fp32", weights="fp32"
)


def test_the_published_models_have_their_published_numbers_of_parameters():
    assert ModelShape.named("qwen2.5-vl-7b").params == 8_292_166_656
    assert round(ModelShape.named("qwen3-vl-32b").params / 1e9, 1) == 33.4


@pytest.mark.parametrize("name", [*tiny_families.BUILDERS])
def test_every_family_is_read_from_its_configuration(name):
    case = tiny_families.case(name)
    shape = ModelShape.of(case.model.config)
    assert shape.params == sum(p.numel() for p in case.model.parameters())
    assert shape.decoder.layers == case.model.config.get_text_config().num_hidden_layers
    shared = replace(SMALL, images=int(shape.vision is not None), share_prefix=shape.unshared is None)
    assert 0 < plan(shape, shared, CPU).seconds < math.inf


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
def test_tokens_are_those_of_the_batch(name):
    model, processor = MODELS[name](), big_processor()
    batch = prompts_of(model, processor, SMALL.prompts)
    shape = ModelShape.of(model.config)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    of_images = (batch.inputs["input_ids"] == model.config.image_token_id).sum().item()
    text = lengths[0] - of_images // SMALL.prompts
    work = replace(SMALL, prompt_tokens=text)
    shared, apart = Tokens.of(shape, work), Tokens.of(shape, replace(work, share_prefix=False))
    assert lengths == [shared.prompt] * SMALL.prompts
    assert (shared.image_tokens, shared.patches) == (of_images, len(batch.inputs["pixel_values"]))
    assert (apart.image_tokens, apart.patches) == (3 * of_images, 3 * len(batch.inputs["pixel_values"]))

    count, length = SMALL.prompts * SMALL.group_size, SMALL.completion_tokens
    ids = torch.ones(count, length, dtype=torch.int64)
    group = torch.arange(SMALL.prompts).repeat_interleave(SMALL.group_size)
    positions = prompt_positions(model, batch.inputs)
    inputs = pack_groups(batch.inputs, positions, group, ids, ids.bool()).inputs
    assert inputs["input_ids"].numel() == shared.passed
    rollout = Rollout(batch, group, ids, ids.bool(), torch.zeros(count, dtype=torch.bool))
    assert rollout.padded(torch.arange(count)).inputs["input_ids"].numel() == apart.passed
    for budget in (shared.prompt + length, shared.prompt + 2 * length, 2 * shared.passed):
        packs = rollout.parts(slice(None), budget, shared=True, hidden_size=32)
        found = Tokens.of(shape, replace(work, microbatch_tokens=budget))
        assert len(packs) == found.packs
        sizes = [shared.prompt * len({group[k].item() for k in pack}) + length * len(pack) for pack in packs]
        assert sum(sizes) == found.passed
    layout = inputs["group_layout"]
    behind = sum(n * (first - begin) for begin, first, end in layout.groups for n in [end - first])
    assert shared.pairs == sum(n**2 / 2 for n in layout.segments) + behind


# Operations


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name):
    model, processor = MODELS[name](), big_processor()
    shape = ModelShape.of(model.config)
    batch = prompts_of(model, processor, 2)
    length = batch.inputs["input_ids"].shape[1]
    costs = _Costs(shape, replace(SMALL, prompts=1, group_size=2, completion_tokens=1, share_prefix=False), CPU)
    t = Tokens.of(shape, replace(SMALL, prompts=1, group_size=2, share_prefix=False))
    model.set_attn_implementation("eager")  # every pair, and the backward pass without computing again
    with FlopCounterMode(display=False) as forward:
        hidden = model.model(**batch.inputs).last_hidden_state
    decoder = costs.decoder(2 * length, 2 * length**2, 1)
    tower = costs.tower(t.patches, t.image_tokens, t.vision_pairs, 1)
    assert forward.get_total_flops() - rotary(forward) == pytest.approx(sum(w.gemm + w.attention for w in (decoder, tower)))
    with FlopCounterMode(display=False) as back:
        hidden.sum().backward()
    decoder = costs.decoder(2 * length, 2 * length**2, 1, backward=True)
    tower = costs.tower(t.patches, t.image_tokens, t.vision_pairs, 1, backward=True)
    pixels = next(p for n, p in model.named_parameters() if "patch_embed.proj.weight" in n).numel() * t.patches * 2
    expected = decoder.gemm + tower.gemm - pixels + 0.8 * (decoder.attention + tower.attention)  # 2 of 2.5 times
    assert back.get_total_flops() == pytest.approx(expected)

    scored = costs.scores()
    with FlopCounterMode(display=False) as head:
        logits = model.lm_head(hidden.detach()[:, -1:].requires_grad_())
    assert head.get_total_flops() == scored.gemm
    with FlopCounterMode(display=False) as back:
        logits.sum().backward()
    assert head.get_total_flops() + back.get_total_flops() == costs.scores(loss=True).gemm


def rotary(counter) -> int:
    """Of the outer products that make angles of positions, which are no work to speak of."""
    return sum(
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("language_model.rotary_emb")
    )


def test_lora_takes_half_of_the_backward_products():
    shape = ModelShape.of(tiny.vlm().config)
    full, lora = (_Costs(shape, replace(SMALL, lora_r=r), CPU) for r in (0, 4))
    of_adapters = 4 * lora.adapters * 100
    assert lora.decoder(100, 0, 1, backward=True).gemm - of_adapters == full.decoder(100, 0, 1, backward=True).gemm / 2
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
    """Bytes that operations other than products read and write, views and broadcast numbers aside."""

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
    """(what autograd keeps, traffic forward, traffic backward) in bytes, and the shape; of ``many`` layers."""
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
    use_group_attention(model)
    weights = {p.shape for p in model.parameters() if p.dim() > 1}
    kept = {}

    def keep(x):
        copied = amp and (x.shape in weights or x.movedim(-1, 0).shape in weights)  # weights, which are counted apart
        if not copied:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no other gets its place
        return x

    forward, backward = Traffic(), Traffic()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=amp), forward:
        if tower:
            side = math.isqrt(rows)
            pixels = torch.randn(rows, 3 * 2 * 14 * 14)
            hidden = model.model.visual(pixels, grid_thw=torch.tensor([[1, side, side]])).last_hidden_state
        else:
            ids = torch.full((1, rows), 7)
            layout = GroupLayout((rows // 2,), ((rows // 4, rows // 4),))
            positions = torch.arange(rows).expand(3, 1, rows)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
            hidden = model.model(**inputs, group_layout=layout, use_cache=False).last_hidden_state
    with backward:
        hidden.float().sum().backward()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    return torch.tensor([saved, forward.bytes, backward.bytes]), ModelShape.of(model.config)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tower", [False, True], ids=["decoder", "tower"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_layer_are_those_that_torch_holds(name, tower, amp):
    rows = 64 if tower and not amp else 144  # windows of one size; with amp no weight has so many rows
    (few, shape), (more, _) = (cost_of_layers(name, tower, amp, many, rows) for many in (1, 3))
    saved, forward, backward = ((more - few) / 2 / rows).tolist()
    stack = shape.vision.stack if tower else shape.decoder
    kind = kind_of(stack, tower)
    assert saved_bytes(stack, tower, "bf16" if amp else "fp32") == pytest.approx(saved, rel=0.1 if amp else 0.02)
    if not amp:  # the widths of bf16 are taken for all of it
        assert 4 * kind.forward.of(stack) == pytest.approx(forward, rel=0.15)
        assert 4 * kind.backward.of(stack) == pytest.approx(backward, rel=0.15)


def test_bytes_of_weights_gradients_and_optimiser_are_those_that_torch_allocates():
    model = tiny.vlm()
    shape = ModelShape.of(model.config)
    optimiser = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = sum(x.nbytes for state in optimiser.state.values() for x in state.values() if x.dim())
    found = plan(shape, replace(SMALL, microbatch_tokens=60, reference=True), CPU).memory
    held = sum(p.nbytes for p in model.parameters())
    assert (found["weights"], found["reference"], found["optimiser"], found["gradients"]) == (held, held, states, held)


# Plans


@pytest.fixture(scope="module")
def seven():
    return ModelShape.named("qwen2.5-vl-7b")


def test_what_a_choice_changes(seven):
    base = Workload(prompts=8, gpus=8, checkpointing=True)
    h100 = MACHINES["h100"]
    found = plan(seven, base, h100)
    assert found.fits
    assert plan(seven, replace(base, parallel="ddp"), h100).memory["weights"] == 8 * found.memory["weights"]
    apart = plan(seven, replace(base, share_prefix=False), h100)
    assert apart.tokens.passed == found.tokens.passed + 7 * found.tokens.prompt
    assert apart.phase("backward").seconds > 2 * found.phase("backward").seconds
    large = replace(base, checkpointing=False)  # most memory is held in the forward pass
    assert plan(seven, large, h100).memory["activations"] > 10 * 2**30
    assert 0 < plan(seven, large, h100).memory["gradients by logits"] <= base.dlogits_bytes
    assert plan(seven, replace(large, dlogits_bytes=1), h100).memory["gradients by logits"] == 1
    again = plan(seven, replace(base, checkpointing=False), h100).phase("backward")
    decoder = found.phase("backward").flops - again.flops
    assert decoder == pytest.approx(found.phase("forward and loss").flops - 6 * 8 * 512 * seven.head)
    frozen = plan(seven, replace(base, freeze_vision=True), h100)
    assert frozen.phase("forward and loss").flops < found.phase("forward and loss").flops
    assert frozen.phase("sampling").flops == found.phase("sampling").flops
    server = plan(seven, replace(base, engine="server", server_gpus=2), h100)
    assert server.phase("sampling").wire == 2 * seven.params
    assert plan(seven, replace(base, reward_seconds=3.0), h100).seconds == pytest.approx(found.seconds + 3)
    big = plan(seven, replace(base, prompts=512, gpus=512), h100)
    assert big.memory["weights"] == 4 * seven.params / 512
    assert big.phase("sampling").seconds > found.phase("sampling").seconds  # its gather goes from node to node


def test_seconds_of_work():
    work = machine.Work(gemm=2e9, rows=10, attention=1e9, traffic=3e9, weights=1e9, calls={"forward": 2})
    parts = CPU.parts(work)
    assert parts["GEMMs"] == pytest.approx(1.0)  # halfway, in logarithms, between 1 and 100 rows
    assert CPU.seconds(parts) == pytest.approx(1 + 1 + 3 + 1 + 0.002)
    assert replace(CPU, overlaps=True).seconds(parts) == pytest.approx(4)
    node = replace(CPU, link=100.0, network=10.0, devices=4)
    assert node.collective(1000.0, 1) == 0
    assert node.collective(1000.0, 4) == pytest.approx(7.5)
    assert node.collective(1000.0, 8) == pytest.approx(12.5)  # half of it to each node, over four adapters


def test_calibration_is_kept_and_read_again(tmp_path, monkeypatch):
    once = machine._time
    monkeypatch.setattr(machine, "_time", lambda run, clock, repeats=1: once(run, clock, 1))
    found = calibrate()
    figures = [rate for _, rate in found.gemm] + [found.attention, found.bandwidth, found.weights, found.fresh]
    assert all(0 < figure < math.inf for figure in figures)
    found.save(tmp_path / "cpu.json")
    assert Machine.named(str(tmp_path / "cpu.json")) == found
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"machine must be a file that --calibrate wrote, got .*bad.json"):
        Machine.named(str(tmp_path / "bad.json"))


def test_command(tmp_path, capsys):
    CPU.save(tmp_path / "cpu.json")
    tiny.vlm().config.save_pretrained(tmp_path)
    flags = ["plan", "--model", str(tmp_path / "config.json"), "--machine", str(tmp_path / "cpu.json"), "--prompts", "2"]
    assert main([*flags, "--image-size", "112x56", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = ModelShape.of(tiny.vlm().config)
    expected = plan(shape, Workload(prompts=2, width=112, height=56, precision="fp32"), CPU)
    assert found["seconds"] == expected.seconds
    assert [phase["name"] for phase in found["phases"]] == [phase.name for phase in expected.phases]
    assert main(["plan", "--model", "qwen2.5-vl-7b", "--prompts", "64", "--gpus", "2", "--old", "--reference"]) == 0
    text = capsys.readouterr().out
    for part in ("8.29 B parameters", "2 x h100 (fsdp2)", "old log-probs", "data sheet", "It does not fit: ", "limited by"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nowhere", "model must be qwen2.5-vl-7b, qwen3-vl-32b or the path of a configuration, got nowhere"),
        ("--gpus 3", "prompts must be a multiple of gpus, 3: groups are whole, got 8"),
        ("--gpus 0", "gpus must be >= 1, got 0"),
        ("--group-size 1", "group_size must be >= 2, to compare completions, got 1"),
        ("--engine server", "server_gpus must be >= 1 with engine server, else 0, got 0"),
        ("--microbatch-tokens 100", "microbatch_tokens must be at least 1792, a prompt of 1280 tokens .* got 100"),
        ("--machine nowhere", "machine must be h100, h200 or a file that --calibrate wrote, got nowhere"),
        ("--precision fp32", "precision must be that of h100, bf16, got fp32"),
        ("--machine h100 --calibrate", "machine must be absent with --calibrate, got h100"),
        ("--image-size 3y", "invalid size value: '3y'"),
        ("--image-size 0x8", "argument --image_size.*: invalid size value: '0x8'"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments_are_named(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--model", "qwen2.5-vl-7b", *flags.split()])
    assert exit.value.code == 2
    assert re.search(f"vlmkernels plan: error: .*{message}", capsys.readouterr().err)
