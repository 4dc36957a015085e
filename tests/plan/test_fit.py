"""What saves memory in a plan, compared with what torch and bitsandbytes allocate, and the search for a plan that fits."""

import math
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.planner import CPU, SMALL

from vlmkernels.models import offload
from vlmkernels.models.offload import use_activation_offloading
from vlmkernels.plan import MACHINES, ModelShape, Workload, fit, plan
from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.fit import BUDGETS, LEVELS, train_arguments
from vlmkernels.plan.workload import NF4, OPTIMIZERS

L4 = MACHINES["l4"]


@pytest.fixture(scope="module")
def three():
    return ModelShape.from_name("Qwen/Qwen2.5-VL-3B-Instruct")


def test_names_of_models(tmp_path):
    assert ModelShape.from_name("QWEN2.5-vl-3B").name == "qwen2.5-vl-3b"
    with pytest.raises(ValueError, match=r"model must be qwen2.5-vl-3b"):
        ModelShape.from_name("qwen2.5-vl-3b-base")


def test_quantizable_weights_are_those_of_linear_layers_without_the_head():
    model = tiny.vlm(tied=False)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    shape = ModelShape.from_config(model.config)
    assert shape.quantizable == sum(layer.weight.numel() for layer in layers)
    work = replace(SMALL, lora_r=4, weights="nf4", precision="bf16")
    costs = StepCosts(shape, work, replace(CPU, precision="bf16"))
    assert costs.stored == NF4 * shape.quantizable + 2 * (shape.params - shape.quantizable)
    with pytest.raises(ValueError, match="weights must not be nf4 without LoRA"):
        replace(work, lora_r=0)


def test_activations_in_host_memory_match_those_that_are_moved(monkeypatch):
    """Per layer: the difference between models of three layers and of one."""
    moved = []
    monkeypatch.setattr(offload, "is_moved", lambda tensor: tensor.numel() > 1000)
    to_host = offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda tensor: moved.append(tensor.nbytes) or to_host(tensor))
    ids, sizes = torch.ones(1, 64, dtype=torch.int64), {}
    for layers in (1, 3):
        config = tiny.text_model().config
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        model = use_activation_offloading(type(tiny.text_model())(config)).train()
        moved.clear()
        model(input_ids=ids, use_cache=False)
        sizes[layers] = sum(moved)
        shape = ModelShape.from_config(config)
    work = replace(SMALL, images=0, prompts=1, share_prefix=False, activation_offloading=True)
    costs = StepCosts(shape, work, CPU)
    device, host = costs.activations()
    per_layer = host / shape.decoder.layers / (costs.tokens.passed / costs.tokens.packs)
    assert (sizes[3] - sizes[1]) / 2 / 64 == pytest.approx(per_layer, rel=0.25)
    assert device == pytest.approx(host / shape.decoder.layers)


def test_what_a_saving_changes(three):
    base = Workload(lora_r=32, weights="bf16", microbatch_tokens=8192)
    found = plan(three, base, L4)
    moved = plan(three, replace(base, activation_offloading=True), L4)
    assert moved.memory["activations"] * three.decoder.layers == pytest.approx(found.memory["activations"])
    assert moved.host_memory == pytest.approx(found.memory["activations"])
    assert found.host_memory == 0
    copied = moved.host_memory * moved.tokens.packs / (0.7 * 32e9)
    for name in ("forward and loss", "backward"):
        assert moved.phase(name).seconds == pytest.approx(found.phase(name).seconds + copied)
    assert moved.phase("sampling").seconds == found.phase("sampling").seconds
    quantized = plan(three, replace(base, weights="nf4"), L4)
    assert quantized.memory["weights"] < 0.35 * found.memory["weights"]
    assert quantized.phase("sampling").seconds > found.phase("sampling").seconds  # layers are dequantized at each step
    full = plan(three, Workload(), MACHINES["h200"])
    small = plan(three, Workload(optim="adamw_8bit"), MACHINES["h200"])
    assert small.memory["optimizer"] == pytest.approx(full.memory["optimizer"] * OPTIMIZERS["adamw_8bit"] / 8)
    assert small.phase("optimizer").seconds < full.phase("optimizer").seconds
    assert plan(three, Workload(optim="adamw_8bit", activation_offloading=True), CPU_BF16).phase("backward").limit != "PCIe"


CPU_BF16 = replace(CPU, precision="bf16", memory=1e15)


def test_fit_takes_the_fastest_plan_of_the_first_level(three):
    sizes = {"h200": 141e9, "h100": 80e9, "l40s": 48e9, "l4": 24e9}
    names = []
    for name, size in sizes.items():
        found = fit(three, Workload(), MACHINES[name])
        assert found.plan.fits
        assert sum(found.plan.memory.values()) <= size
        names.append(found.level.name)
        tried = [level.name for level in LEVELS]
        assert list(found.smaller) == tried[: tried.index(found.level.name)]
        assert all(not smallest.fits for smallest in found.smaller.values())
        for changes in ({"checkpointing": True}, {"microbatch_tokens": 8192}, {"activation_offloading": True}):
            other = plan(three, replace(found.plan.work, **changes), MACHINES[name])
            assert not other.fits or other.seconds >= found.plan.seconds
    assert names == ["all parameters", "all parameters", "all parameters, optimizer in 8 bits", "LoRA"]
    tight = fit(three, Workload(), replace(L4, memory=6.5 * 2**30))
    assert tight.level.name.startswith("QLoRA")
    assert "weights of linear layers have 4 bits" in tight.compromises


def test_fit_keeps_what_is_given(three):
    work = Workload(lora_r=8, checkpointing=True, microbatch_tokens=4096)
    found = fit(three, work, MACHINES["h200"], ["lora_r", "checkpointing", "microbatch_tokens"])
    assert found.level.name == "LoRA"
    assert (found.plan.work.lora_r, found.plan.work.checkpointing, found.plan.work.microbatch_tokens) == (8, True, 4096)
    frozen = fit(three, Workload(freeze_vision=True), MACHINES["h200"], ["freeze_vision"])
    assert frozen.level.name == "all but the vision tower, optimizer in 8 bits"
    assert train_arguments(frozen.plan, "x")["freeze_vision"] == "true"
    both = fit(three, Workload(optim="adamw_8bit", lora_r=4), L4, ["optim", "lora_r"])
    assert (both.level.name, both.plan.work.optim) == ("LoRA", "adamw_8bit")
    with pytest.raises(ValueError, match="microbatch_tokens must be >= 1792"):
        fit(three, Workload(microbatch_tokens=100), L4, ["microbatch_tokens"])


def test_images_become_smaller_at_last(three):
    work = Workload(width=2240, height=2240, prompts=1, group_size=2, completion_tokens=64)
    need = sum(
        plan(three, replace(LEVELS[4].apply(work, ()), checkpointing=True, activation_offloading=True), L4).memory.values()
    )
    found = fit(three, work, replace(L4, memory=0.9 * need))
    assert found.level.scale < 1
    assert found.plan.work.width == round(math.sqrt(found.level.scale) * 2240)
    arguments = train_arguments(found.plan, "x", resized=True)
    size = found.plan.work.width * found.plan.work.height
    assert arguments["image_resolution_schedule"] == f'[{{"step": 0, "max_pixels": {size}}}]'
    nothing = fit(three, work, replace(L4, memory=2**30))
    assert not nothing.plan.fits
    assert len(nothing.smaller) == len(LEVELS)
    assert nothing.plan.work.microbatch_tokens in BUDGETS


def test_models_without_images_and_several_gpus():
    shape = ModelShape.from_config(tiny.text_model().config)
    found = fit(shape, Workload(images=0, prompts=2), L4)
    assert found.level.name == "all parameters"
    assert found.compromises == []
    none = fit(shape, Workload(images=0, prompts=2), replace(L4, memory=1.0))
    assert [*none.smaller] == ["all parameters", "all parameters, optimizer in 8 bits", "LoRA", "QLoRA, 4 bits"]
    sharded = fit(shape, Workload(images=0, gpus=2), replace(MACHINES["h100"], memory=1.0), ["gpus"])
    assert "QLoRA, 4 bits" not in sharded.smaller  # not with FSDP2
