"""The command line: training from files to a saved model, evaluation of it, and errors that name the argument."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import tiny, tool_models

from vlmkernels.cli import main
from vlmkernels.cli.evaluate import model_names, steps_of
from vlmkernels.cli.flags import read_yaml
from vlmkernels.cli.train import build_parser
from vlmkernels.train import GRPOConfig
from vlmkernels.train.checkpoint import last_complete_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a model and a dataset of four images."""
    folder = tmp_path_factory.mktemp("files")
    tiny.vlm().save_pretrained(folder / "model")
    tiny.processor().save_pretrained(folder / "model")
    lines = []
    for index, row in enumerate(tiny.rows(4, "one")):
        row["image"].save(folder / f"{index}.png")
        lines.append(json.dumps({**row, "image": f"{index}.png"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def arguments(files, *more):
    return ["--model", str(files / "model"), "--dataset", str(files / "data.jsonl"), *more]


def test_train_from_yaml_and_flags_then_resume_then_eval(files, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"model: {files / 'model'}\ndataset: {files / 'data.jsonl'}\nlearning_rate: 1e-3\n"
        "rewards: [{name: cer, weight: 1.0}, {name: exact_match, weight: 2.0, log_as: exact}]\n"
        "num_generations: 4\nmax_completion_length: 4\nmax_steps: 9\nlogging_steps: 1\n"
        f"disable_tqdm: true\noutput_dir: {tmp_path / 'out'}\ngeneration_kwargs: {{suppress_tokens: [0]}}\n"
    )
    run = ["train", "--config", str(tmp_path / "run.yaml"), "--save-steps", "1"]
    assert main([*run, "--max_steps", "1", "--lr_scheduler_type", "constant"]) == 0
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
    assert main([*run, "--max_steps", "2", "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "last"]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2]
    first = state["log_history"][0]
    assert first["learning_rate"] == 1e-3
    assert first["reward"] == pytest.approx(first["rewards/cer/mean"] + 2 * first["rewards/exact/mean"])
    assert f"model saved in {tmp_path / 'out'}" in capsys.readouterr().out

    output = tmp_path / "eval.json"
    flags = ["--model", str(tmp_path / "out"), "--dataset", str(files / "data.jsonl"), "--reward", "cer", "--batch-size", "3"]
    assert main(["eval", *flags, "--max_completion_length", "4", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["num_samples"] == 4
    assert result["accuracy"] == result["rewards"]["exact_match"]
    assert 0 <= result["rewards"]["cer"] <= 1
    assert 1 <= result["completions"]["mean_length"] <= 4
    printed = capsys.readouterr().out
    assert re.search(r"^exact +accuracy +\d", printed, flags=re.MULTILINE)
    assert re.search(rf"^exact +rewards/cer +{result['rewards']['cer']:.3f}", printed, flags=re.MULTILINE)


def test_the_shipped_configuration(files, tmp_path):
    shipped = str(Path(__file__).parents[2] / "configs" / "grpo.yaml")
    smaller = [
        "--max_completion_length",
        "4",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--save_strategy",
        "no",
    ]
    smaller += ["--model_init_kwargs", '{"dtype": "float32"}', "--gradient_accumulation_steps", "1", "--disable_tqdm", "true"]
    assert main(["train", "--config", shipped, *arguments(files), *smaller, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "completions" / "step-000001.html").exists()


def test_train_and_eval_lora(files, tmp_path):
    """With new adapters the policy begins as its teacher, so that their divergence is 0 in the first step."""
    flags = [
        "--teacher",
        str(files / "model"),
        "--reward",
        "cer",
        "--lora_r",
        "4",
        "--num_generations",
        "4",
        "--max_completion_length",
        "4",
        "--max_steps",
        "1",
    ]
    output = ["--output_dir", str(tmp_path), "--disable_tqdm", "true", "--beta", "0.1", "--logging_steps", "1"]
    assert main(["train", *arguments(files, *flags, *output)]) == 0
    assert (tmp_path / "adapter_config.json").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["distillation/divergence"] < 1e-6
    dataset = ["--dataset", str(files / "data.jsonl"), "--output", str(tmp_path / "eval.json")]
    assert main(["eval", "--model", str(tmp_path), *dataset, "--max_completion_length", "4"]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["num_samples"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "bleu"], "reward must be one of exact_match, .* or an import path 'module:function', got 'bleu'"),
        (["--reward", "cer", "--num_generations", "3"], "num_generations must divide .* = 8, got 3"),
        (["--reward", "cer", "--num_generations", "many"], "argument --num_generations.*: invalid int value: 'many'"),
        (["--reward", "cer", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["--reward", "cer", "--cast-lm-head-to-fp32"], "arguments: --cast-lm-head-to-fp32: log-probabilities are always"),
        (["--reward", "cer", "--learning_rat", "1"], "unrecognized arguments: --learning_rat 1 .did you mean --learning_rate"),
        (["--reward", "cer", "--dataset", "nowhere.jsonl"], "--dataset: dataset must be an existing file .*nowhere.jsonl"),
        (["--teacher", "/nowhere"], "teacher cannot be loaded: model must be an existing folder .*/nowhere"),
        (["--reward", "cer", "--model", "/nowhere"], "--model: .*/nowhere"),
        (["--reward", "cer", "--resume_from_checkpoint", "/nowhere"], "resume_from_checkpoint must be a complete .*/nowhere"),
        (["--reward", "cer", "--config", "/nowhere.yaml"], "--config /nowhere.yaml: .*No such file"),
        (["--reward", "cer", "--generation_kwargs", "top_k"], r"generation_kwargs must map names to values .*, got 'top_k'"),
        (["--reward", "cer", "--generation_kwargs", '{"topk": 5}'], "generation_kwargs must hold only .*, got topk"),
        (["--reward", "cer", "--generation_kwargs", '{"topk": null}'], "generation_kwargs must hold only .*, got topk"),
        (
            [
                "--reward",
                "cer",
                "--use_vllm",
                "true",
                "--vllm_mode",
                "server",
                "--vllm_server_timeout",
                "0.1",
                "--vllm_server_base_url",
                "http://127.0.0.1:9",
            ],
            "vllm_server_base_url must be the URL of a healthy vLLM server within .* = 0.1 s, got http://127.0.0.1:9",
        ),
        (
            ["--reward", "cer", "--share_prefix", "false", "--rollout_correction", "token_mask"],
            "rollout_correction must be None with an engine that returns no log-probabilities, .*, got 'token_mask'",
        ),
        ([], "--reward must be given"),
        (["--rewards", "[cer]"], "argument --rewards: invalid json_list value: '.cer.'"),
        (["--rewards", '[{"name": "cer"}]', "--reward", "cer"], "--reward must not be used together with --rewards"),
        (["--rewards", '[{"name": "iou", "fram": "resized"}]'], "options of the reward iou must be among .*frame.*, got fram"),
        (["--reward", "cer", "--tools", "nowhere:zoom"], "--tools: tool must be importable, got 'nowhere:zoom'"),
        (
            ["--reward", "cer", "--tools", "math:pi"],
            "--tools: tool must be a function or a class, got 'math:pi', which is float",
        ),
        (
            ["--environment", "a=support.tool_models:Microscope", "--environment", "support.tool_models:Microscope"],
            "--environment: environment must be one import path, or NAME=path with distinct names, got a=support.*, support",
        ),
        (["--reward", "cer", "--max_tool_calling_iterations", "-1"], "max_tool_calling_iterations must be >= 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_end_with_code_2_and_one_line(files, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(["train", *arguments(files, "--output_dir", str(tmp_path), *flags)])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"vlmkernels train: error: .*{message}", " ".join(lines))
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tools", "nowhere:zoom"], "--tools: tool must be importable, got 'nowhere:zoom'"),
        (["--tools", "support.tool_models:zoom", "--tool_timeout", "0"], "--tools: tool_timeout must be .*, got 0"),
        (["--tools", "support.tool_models:zoom", "--hide", "grey"], "--hide must not be used with tools, which can return the"),
        (["--tools", "support.tool_models:zoom"], "chat_template must write the tool_calls of the assistant"),
        (["--environment", "support.tool_models:zoom"], "--tools: environment_factory must return an environment if called .*"),
    ],
)
def test_bad_tools_end_eval_before_the_model_is_loaded(files, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(["eval", *arguments(files, "--output", str(tmp_path / "eval.json"), *flags)])
    assert exit.value.code == 2
    error = " ".join(capsys.readouterr().err.strip().splitlines())
    assert re.search(f"vlmkernels eval: error: {message}", error)
    assert "Loading weights" not in error
    with pytest.raises(SystemExit):
        main(["eval", "--predictions", "p.jsonl", "--dataset", str(files / "data.jsonl"), *flags])
    assert "--tools and --environment need --model: saved predictions have been sampled" in capsys.readouterr().err


def test_train_passes_tools_to_the_trainer(files, tmp_path, monkeypatch):
    made = []

    class Trainer:
        def __init__(self, model, rewards, args, *data, **more):
            made.append((rewards, args.max_tool_calling_iterations, args.tool_timeout, more))
            raise NotImplementedError("this test only reads arguments")

    monkeypatch.setattr("vlmkernels.train.GRPOTrainer", Trainer)
    (tmp_path / "run.yaml").write_text("tools: support.tool_models:zoom\nmax_tool_calling_iterations: 3\ntool_timeout: 5\n")
    names = ["--environment", "a=support.tool_models:Microscope", "--environment", "b=support.tool_models:Microscope"]
    for flags in (
        ["--config", str(tmp_path / "run.yaml"), "--reward", "cer"],
        ["--environment", f"{Path(tool_models.__file__)}:Microscope"],  # which can own the rewards
        [*names, "--tools", "support.tool_models:zoom", "--tools", "support.tool_models:describe"],
    ):
        with pytest.raises(SystemExit):
            main(["train", *arguments(files, "--output_dir", str(tmp_path), *flags)])
    Microscope = tool_models.Microscope
    unset = {"peft_config": None, "environment_factory": None, "teacher": None}
    assert made[0] == (["cer"], 3, 5.0, {"tools": [tool_models.zoom], **unset})
    (rewards, limit, _, more) = made[1]
    assert (rewards, limit, more["tools"], more["environment_factory"].__name__) == (None, None, [], "Microscope")
    assert made[2][3]["tools"] == [tool_models.zoom, tool_models.describe]
    assert made[2][3]["environment_factory"] == {"a": Microscope, "b": Microscope}


def test_yaml_errors(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("num_generation: 4\n")
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", str(path)])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "unknown key 'num_generation' (did you mean num_generations?); valid keys: " in message
    assert "max_completion_length, " in message
    path.write_text("cast_lm_head_to_fp32: true\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert "unknown key 'cast_lm_head_to_fp32': log-probabilities are always" in capsys.readouterr().err
    path.write_text("- a\n- b\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert "must map names to values, got list" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["cer", "[cer, exact_match]"])
def test_repeated_flags_override_yaml(tmp_path, value):
    (tmp_path / "run.yaml").write_text(f"reward: {value}\n")
    parser = build_parser()
    read_yaml(parser, str(tmp_path / "run.yaml"))
    given = yaml.safe_load(value)
    for flags, expected in (([], given), (["--reward", "iou"], ["iou"]), (["--reward", "iou", "--reward", "f"], ["iou", "f"])):
        assert parser.parse_args([*flags, "--output_dir", str(tmp_path)]).reward == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("gspo", 3e-4, 0.3, 100)),
        (["--epsilon_high", "0.1", "--max_prompt_length", "50"], ("gspo", 3e-4, 0.1, 50)),
        (["--preset", "dapo"], ("dapo", 0.2, 0.3, 100)),
    ],
)
def test_presets_in_yaml_are_overridden_by_flags(tmp_path, flags, expected):
    path = tmp_path / "run.yaml"
    path.write_text("preset: gspo\nepsilon_high: 0.3\nmax_prompt_length: 100\n")
    parser = build_parser()
    read_yaml(parser, str(path))
    args = parser.parse_args([*flags, "--output_dir", str(tmp_path)])
    config = GRPOConfig(**{name: getattr(args, name) for name in ("preset", "epsilon_high", "max_prompt_length", "output_dir")})
    assert (config.preset, config.epsilon, config.epsilon_high, config.max_prompt_length) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--use_vllm"], True),
        (["--use-vllm", "--vllm_mode", "server"], True),
        (["--use_vllm", "false"], False),
    ],
)
def test_use_vllm_needs_no_value(flags, expected):
    assert build_parser().parse_args([*flags, "--output_dir", "run"]).use_vllm is expected


def test_bad_sample_is_named(files, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text((files / "data.jsonl").read_text())
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--model", str(files / "model"), "--dataset", str(tmp_path / "data.jsonl")])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert f"vlmkernels eval: error: dataset: {tmp_path / 'data.jsonl'}, line 1: sample 0: image cannot be read" in error
    assert "Loading weights" not in error  # rows are checked before the model is loaded


def test_eval_limits_images(files, tmp_path, capsys):
    flags = ["--model", str(files / "model"), "--dataset", str(files / "data.jsonl"), "--max_image_pixels", "9"]
    with pytest.raises(SystemExit):
        main(["eval", *flags, "--output", str(tmp_path / "eval.json")])
    message = "line 1: sample 0: image cannot be read: image must have at most 9 pixels (max_image_pixels), got 28 x 28"
    assert message in capsys.readouterr().err


def test_help(capsys):
    for argv in (["--help"], ["train", "--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "commands:\n  demo" in printed
    assert "--num_generations VALUE" in printed
    assert "--adam_beta1" not in printed
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    assert "--adam_beta1 VALUE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["fly"])
    assert exit.value.code == 2
    assert "COMMAND must be one of demo, train, report, doctor, eval, plan, env, got 'fly'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "error: COMMAND must be one of demo, train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train"])
    assert "--model and --dataset and --reward must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate"])
    assert "got 'evaluate' (did you mean eval?)" in capsys.readouterr().err


def test_rewards_of_the_current_folder(files, tmp_path):
    """The installed command finds them, although only ``python -m`` has the current folder on the path by itself."""
    (tmp_path / "own_rewards.py").write_text("def half(completions, **columns):\n    return [0.5] * len(completions)\n")
    (tmp_path / "predictions.jsonl").write_text("".join(f'{{"index": {i}, "completion": "1"}}\n' for i in range(4)))
    flags = [
        "eval",
        "--predictions",
        "predictions.jsonl",
        "--dataset",
        str(files / "data.jsonl"),
        "--reward",
        "own_rewards:half",
    ]
    installed = [sys.executable, "-I", "-c", "import sys; from vlmkernels.cli import main; sys.exit(main())"]
    done = subprocess.run([*installed, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["rewards"]["half"] == 0.5


def test_names_of_models():
    assert model_names(["runs/a/checkpoint-10", "runs/a/checkpoint-20"]) == ["a/checkpoint-10", "a/checkpoint-20"]
    assert model_names(["x/qwen", "y/qwen", "z/other/"]) == ["x/qwen", "y/qwen", "other"]
    assert model_names(["/"]) == ["/"]
    assert model_names(["/x/qwen", "x/qwen"]) == ["/x/qwen", "x/qwen"]
    assert steps_of(["a/checkpoint-10", "a/checkpoint-9"]) == [10, 9]
    assert steps_of(["a/checkpoint-10", "b/checkpoint-10"]) is None
    assert steps_of(["base", "a/checkpoint-10"]) is None


def test_the_command_line_imports_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import vlmkernels.cli, vlmkernels.env\n"
        "assert vlmkernels.cli.main(['env']) == 0"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
