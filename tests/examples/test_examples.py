"""The examples, run as their README says, with the tiny model and data that prepare.py writes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command, cwd: Path, **environment: str) -> str:
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), **os.environ, **environment}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    run(sys.executable, EXAMPLES / "prepare.py", "digits", "--rows", "64", cwd=folder)
    return folder


def test_own_loop(folder):
    printed = run(
        sys.executable, EXAMPLES / "own_loop.py", "--model", "digits/model", "--dataset", "digits/train.jsonl", "--steps", "2",
        cwd=folder,
    )  # fmt: skip
    rewards = [float(value) for value in re.findall(r"reward (\S+)", printed)]
    assert len(rewards) == 2
    assert min(rewards) > 0.2  # the model that prepare.py writes reads about half of the numbers


def test_trl(folder):
    printed = run(
        sys.executable, EXAMPLES / "trl_grpo.py", "--model", "digits/model", "--dataset", "digits/train.jsonl", "--steps", "2",
        cwd=folder,
    )  # fmt: skip
    assert len(re.findall(r"'rewards/exact_match/mean'", printed)) == 2


def test_yaml(folder):
    run("vlmkernels", "train", "--config", EXAMPLES / "digits.yaml", "--max_steps", "2", "--eval_steps", "2", cwd=folder)
    metrics = [json.loads(line) for line in (folder / "digits" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/exact_match/mean" in entry for entry in metrics)
    assert (folder / "digits" / "run" / "model.safetensors").exists()


def test_notebook(folder):
    """Every cell in order, in one process, with few training steps."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code, replaced = re.subn(r"max_steps=\d+", "max_steps=2", code)
    assert replaced == 1
    code = code.replace("\nwarm_up(", "\n# warm_up(")  # 20 seconds; prepare.py runs it in the fixture
    (folder / "notebook.py").write_text(code)
    assert "after 2 steps" in run(sys.executable, "notebook.py", cwd=folder)


def test_lora_recipe(folder):
    """One step on the CPU; the vision tower gets no adapter."""
    small = ("--max_steps", "1", "--per_device_train_batch_size", "16", "--use_cpu", "true", "--bf16", "false")
    dtype = ("--model_init_kwargs", '{"dtype": "float32"}')
    recipe = EXAMPLES / "recipes" / "lora-24gb.sh"
    environment = {"MODEL": "digits/model", "DATASET": "digits/train.jsonl", "OUTPUT": "lora"}
    run("bash", recipe, *small, *dtype, "--max_completion_length", "8", cwd=folder, **environment)
    adapters = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert set(adapters["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_full_recipe_has_valid_flags(folder):
    """Programs that need GPUs are replaced by ones that print their arguments."""
    from vlmkernels.cli.train import build_parser
    from vlmkernels.train import GRPOConfig

    programs = folder / "programs"
    programs.mkdir()
    for name in ("vllm", "accelerate"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.txt\n')
        (programs / name).chmod(0o755)
    command = f"PATH={programs}:$PATH exec bash {EXAMPLES / 'recipes' / 'full-8xh100.sh'}"
    run("bash", "-c", command, cwd=folder, MODEL="digits/model", DATASET="digits/train.jsonl")
    launched = (folder / "accelerate.txt").read_text().splitlines()
    assert Path(launched[launched.index("--config_file") + 1]).resolve() == ROOT / "configs" / "fsdp2.yaml"
    flags = launched[launched.index("train") + 1 :]
    args = build_parser().parse_args(flags)
    names = [field.name for field in fields(GRPOConfig) if field.init]
    config = GRPOConfig(**{name: getattr(args, name) for name in names} | {"use_cpu": True, "bf16": False})
    assert config.prompts_per_generation == 8
    assert config.vllm_mode == "server"
