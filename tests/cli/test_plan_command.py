"""``vlmkernels plan``: its output, and errors that name the argument."""

import json
import re

import pytest
import torch
from support import tiny
from support.planner import CPU

from vlmkernels.cli import main
from vlmkernels.plan import ModelShape, Workload, plan

torch.set_num_threads(1)


def test_command(tmp_path, capsys):
    CPU.save(tmp_path / "cpu.json")
    tiny.vlm().config.save_pretrained(tmp_path)
    flags = ["plan", "--model", str(tmp_path / "config.json"), "--machine", str(tmp_path / "cpu.json"), "--prompts", "2"]
    assert main([*flags, "--image-size", "112x56", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = ModelShape.from_config(tiny.vlm().config)
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
        (
            "--model nowhere",
            "model must be qwen2.5-vl-3b, .*, qwen3-vl-32b or the path of a model or its configuration, got nowhere",
        ),
        ("--gpus 3", "prompts must be a multiple of gpus = 3, because groups are not split, got 8"),
        ("--gpus 0", "gpus must be >= 1, got 0"),
        ("--group-size 1", "group_size must be >= 2, to compare completions, got 1"),
        ("--engine vllm_server", "server_gpus must be >= 1 with engine = vllm_server, else 0, got 0"),
        ("--microbatch-tokens 100", "microbatch_tokens must be >= 1792, a prompt of 1280 tokens .* got 100"),
        ("--machine nowhere", "machine must be h100, h200 or a file written by --calibrate, got nowhere"),
        ("--precision fp32", "precision must be bf16 on h100, got fp32"),
        ("--machine h100 --calibrate", "--machine must not be used together with --calibrate, got h100"),
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
