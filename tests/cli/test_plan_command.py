"""``vlmkernels plan``: its output, and errors that name the argument."""

import json
import re
import shlex
from dataclasses import fields, replace

import pytest
import torch
from support import tiny
from support.planner import CPU

from vlmkernels.cli import main
from vlmkernels.cli.plan import memory_size
from vlmkernels.cli.train import build_parser, lora_config
from vlmkernels.plan import MACHINES, ModelShape, Workload, fit, plan
from vlmkernels.train import GRPOConfig

torch.set_num_threads(1)
SCHEDULE = '[{"step":0,"max_pixels":50176},{"step":3,"max_pixels":200704}]'


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
        ("--machine nowhere", "machine must be h100, h200, .*, l4 or a file written by --calibrate, got nowhere"),
        ("--precision fp32", "precision must be bf16 on h100, got fp32"),
        ("--machine h100 --calibrate", "--machine must not be used together with --calibrate, got h100"),
        ("--reward_seconds nan", "reward_seconds must be >= 0 and finite, got nan"),
        ("--fit much", "argument --fit: must be a size above 0 in MB, .* such as 24GB, got 'much'"),
        ("--fit=-3GB", "argument --fit: must be a size above 0 in MB, .* such as 24GB, got '-3GB'"),
        ("--activation_offloading --gpus 2", "activation_offloading must be false with fsdp2 on 2 GPUs, got true"),
        (
            "--max_steps 3 --image_resolution_schedule " + SCHEDULE,
            "max_steps must be above the last step of the schedule, 3, got 3",
        ),
        (
            "--fit 24GB --max_steps 9 --image_resolution_schedule " + SCHEDULE,
            "--fit must not be used together",
        ),
        ("--max_steps 9", "--max_steps must be used together with --image_resolution_schedule, got 9"),
        ("--images 0 --max_steps 9 --image_resolution_schedule " + SCHEDULE, "images do not keep their size"),
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


@pytest.mark.parametrize("size", ["24GB", "8gb"])
def test_fit_prints_a_command_that_vlmkernels_train_accepts(capsys, monkeypatch, size):
    assert main(["plan", "--fit", size, "--model", "Qwen2.5-VL-3B"]) == 0
    text = capsys.readouterr().out
    found = fit(ModelShape.from_name("qwen2.5-vl-3b"), Workload(), replace(MACHINES["rtx-4090"], memory=memory_size(size)))
    assert f"fits into {memory_size(size) / 2**30:.1f} GiB: {found.level.name}" in text
    assert "does not fit: all parameters (at least " in text
    assert f"of {memory_size(size) / 2**30:.1f} GiB" in text
    printed = text[text.index("vlmkernels train") :]
    words = shlex.split(printed.replace("\\\n", ""))
    assert words[:4] == ["vlmkernels", "train", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"]
    monkeypatch.setattr("vlmkernels.models.quantized.has_bitsandbytes", lambda: True)
    words[words.index("--bf16") + 1] = "false"  # there is no GPU
    args = build_parser().parse_args(words[2:])
    config = GRPOConfig(**{field.name: getattr(args, field.name) for field in fields(GRPOConfig) if field.init})
    work = found.plan.work
    assert config.num_generations == work.group_size
    assert config.prompts_per_generation == work.prompts
    assert config.max_tokens_per_microbatch == work.microbatch_tokens
    assert config.activation_checkpointing == work.checkpointing
    assert config.activation_offloading == work.activation_offloading
    quantizes = "quantization_config" in config.model_init_kwargs
    assert quantizes == (work.weights == "nf4")
    lora = lora_config(args)
    names = [f"model.language_model.layers.3.{part}" for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert all(re.fullmatch(lora.target_modules, name) for name in names)
    assert not re.fullmatch(lora.target_modules, "model.visual.blocks.3.mlp.down_proj")
    assert (lora.r, lora.lora_alpha) == (work.lora_r, 64)


def test_fit_that_finds_nothing(capsys):
    assert main(["plan", "--fit", "3GiB", "--model", "qwen2.5-vl-3b", "--machine", "l4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["command"] is None
    assert not found["fits"]
    needs = found["fit"]["does_not_fit"]
    assert found["fit"]["budget"] == 3 * 2**30 < sum(found["memory"].values()) == min(need["bytes"] for need in needs.values())
    assert main(["plan", "--fit", "3GiB", "--model", "qwen2.5-vl-3b"]) == 1
    text = capsys.readouterr().out
    assert "Nothing fits into 3.0 GiB. The smallest configuration, QLoRA" in text
    assert "GiB are missing" in text


def test_fit_keeps_flags_with_the_value_of_their_default(capsys):
    flags = ["plan", "--model", "qwen2.5-vl-3b", "--lora_r", "0", "--optim", "adamw_torch_fused"]
    assert main([*flags, "--fit", "24GB"]) == 1
    assert "The smallest configuration, all parameters, needs" in capsys.readouterr().out


def test_fit_on_several_gpus_prints_the_launcher(capsys):
    assert main(["plan", "--model", "qwen2.5-vl-3b", "--fit", "80GB", "--gpus", "8"]) == 0
    launcher = "accelerate launch --config_file configs/fsdp2.yaml --num_processes 8 -m vlmkernels.cli train --model"
    assert launcher in capsys.readouterr().out


def test_schedule(capsys):
    flags = [
        "plan",
        "--model",
        "qwen2.5-vl-3b",
        "--image_size",
        "448",
        "--max_steps",
        "10",
        "--image_resolution_schedule",
        SCHEDULE,
    ]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, last = found["entries"]
    assert (first["steps"], first["width"], first["prompt_tokens"]) == (3, 224, 256 + 64)
    assert (last["steps"], last["width"], last["prompt_tokens"]) == (7, 448, 256 + 256)
    expected = plan(ModelShape.from_name("qwen2.5-vl-3b"), Workload(width=448, height=448), MACHINES["h100"]).seconds
    assert last["seconds"] == expected > first["seconds"]
    assert found["seconds"] == pytest.approx(3 * first["seconds"] + 7 * expected)
    assert found["constant_seconds"] == pytest.approx(10 * expected)
    assert main(flags) == 0
    assert "224 x 224" in capsys.readouterr().out


def test_masked_images_and_a_teacher(capsys):
    flags = ["plan", "--model", "qwen2.5-vl-3b", "--perception_loss_weight", "0.01", "--image_use_steps", "10"]
    flags += ["--text_before_images", "20", "--teacher", "Qwen2.5-VL-7B"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "teacher qwen2.5-vl-7b: 8.29 B parameters in bf16" in text
    assert "85,856 in 1 for the loss, with masked images" in text
    assert re.search(r"^image use .*^teacher +43,008 ", text, re.MULTILINE | re.DOTALL)
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["teacher"], found["loss_tokens"]["passed"], found["tokens"]["passed"]) == ("qwen2.5-vl-7b", 85856, 43008)
    assert main([*flags, "--fit", "80GB"]) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed[printed.index("vlmkernels train") :].replace("\\\n", ""))
    args = build_parser().parse_args(words[2:])
    assert (args.teacher, args.teacher_model_init_kwargs) == ("Qwen/Qwen2.5-VL-7B-Instruct", '{"dtype": "bfloat16"}')
    assert (args.perception_loss_weight, args.image_use_steps) == (0.01, 10)
