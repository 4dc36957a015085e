"""Plans of steps: shapes of models, what each choice changes, seconds of a cost, calibration."""

import math
from dataclasses import replace

import pytest
import torch
from support import tiny_families
from support.planner import CPU, SMALL

from vlmkernels.plan import MACHINES, Machine, ModelShape, Workload, calibrate, calibration, plan
from vlmkernels.plan.machine import Cost

torch.set_num_threads(1)


def test_the_published_models_have_their_published_numbers_of_parameters():
    assert ModelShape.from_name("qwen2.5-vl-7b").params == 8_292_166_656
    assert round(ModelShape.from_name("qwen3-vl-32b").params / 1e9, 1) == 33.4
    assert round(ModelShape.from_name("qwen2.5-vl-3b").params / 1e9, 2) == 3.75
    assert round(ModelShape.from_name("qwen3-vl-2b").params / 1e9, 2) == 2.13


@pytest.mark.parametrize("name", [*tiny_families.BUILDERS])
def test_every_family_is_read_from_its_configuration(name):
    case = tiny_families.case(name)
    shape = ModelShape.from_config(case.model.config)
    assert shape.params == sum(p.numel() for p in case.model.parameters())
    assert shape.decoder.layers == case.model.config.get_text_config().num_hidden_layers
    shared = replace(SMALL, images=int(shape.vision is not None), image_tokens=4, share_prefix=shape.unshared is None)
    assert 0 < plan(shape, shared, CPU).seconds < math.inf


@pytest.fixture(scope="module")
def seven():
    return ModelShape.from_name("qwen2.5-vl-7b")


def test_what_a_choice_changes(seven):
    base = Workload(prompts=8, gpus=8, checkpointing=True)
    h100 = MACHINES["h100"]
    found = plan(seven, base, h100)
    assert found.fits
    assert plan(seven, replace(base, parallel="ddp"), h100).memory["weights"] == 8 * found.memory["weights"]
    apart = plan(seven, replace(base, share_prefix=False), h100)
    assert apart.tokens.passed == found.tokens.passed + 7 * found.tokens.prompt
    assert apart.phase("backward").seconds > 2 * found.phase("backward").seconds
    large = replace(base, checkpointing=False)  # the peak is in the forward pass
    assert plan(seven, large, h100).memory["activations"] > 10 * 2**30
    assert 0 < plan(seven, large, h100).memory["gradients of logits"] <= base.dlogits_bytes
    assert plan(seven, replace(large, dlogits_bytes=1), h100).memory["gradients of logits"] == 1
    again = plan(seven, replace(base, checkpointing=False), h100).phase("backward")
    decoder = found.phase("backward").flops - again.flops
    assert decoder == pytest.approx(found.phase("forward and loss").flops - 6 * 8 * 512 * seven.head)
    frozen = plan(seven, replace(base, freeze_vision=True), h100)
    assert frozen.phase("forward and loss").flops < found.phase("forward and loss").flops
    assert frozen.phase("sampling").flops == found.phase("sampling").flops
    server = plan(seven, replace(base, engine="vllm_server", server_gpus=2), h100)
    assert server.phase("sampling").wire == 2 * seven.params
    assert plan(seven, replace(base, reward_seconds=3.0), h100).seconds == pytest.approx(found.seconds + 3)
    big = plan(seven, replace(base, prompts=512, gpus=512), h100)
    assert big.memory["weights"] == 4 * seven.params / 512
    assert big.phase("sampling").seconds > found.phase("sampling").seconds  # its all-gather crosses nodes


def test_seconds_of_a_cost():
    work = Cost(gemm=2e9, rows=10, attention=1e9, traffic=3e9, weights=1e9, calls={"forward": 2})
    parts = CPU.seconds_by_resource(work)
    assert parts["GEMMs"] == pytest.approx(1.0)  # 10 rows are halfway between 1 and 100 in logarithms
    assert CPU.seconds(parts) == pytest.approx(1 + 1 + 3 + 1 + 0.002)
    assert replace(CPU, overlaps=True).seconds(parts) == pytest.approx(4)
    node = replace(CPU, link=100.0, network=10.0, devices=4)
    assert node.collective(1000.0, 1) == 0
    assert node.collective(1000.0, 4) == pytest.approx(7.5)
    assert node.collective(1000.0, 8) == pytest.approx(12.5)  # each node receives half, over four adapters


def test_calibration_is_saved_and_read(tmp_path, monkeypatch):
    once = calibration._time
    monkeypatch.setattr(calibration, "_time", lambda run, clock, repeats=1: once(run, clock, 1))
    found = calibrate()
    figures = [rate for _, rate in found.gemm] + [found.attention, found.bandwidth, found.weights, found.fresh]
    assert all(0 < figure < math.inf for figure in figures)
    found.save(tmp_path / "cpu.json")
    assert Machine.from_name(str(tmp_path / "cpu.json")) == found
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"machine must be a file written by --calibrate, got .*bad.json"):
        Machine.from_name(str(tmp_path / "bad.json"))
