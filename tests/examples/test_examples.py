"""The examples, run as their README says, with the tiny model and data that prepare.py writes."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
from support.tool_models import tool_model

from vlmkernels import cli
from vlmkernels.demo.model import build_processor
from vlmkernels.integrations.patch import Patch
from vlmkernels.models.families import FAMILIES
from vlmkernels.rollout.agent import Agent
from vlmkernels.tools.formats import FORMATS, split
from vlmkernels.tools.functions import Tools

pytest.importorskip("sklearn")
pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOOLS = (ROOT / "docs" / "tools.md").read_text()  # the page of examples/zoom.py


@contextmanager
def printed_in(folder: Path, **environment: str):
    """What is printed in the block, whose current folder is ``folder``."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield printed


def run(script: Path | str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run ``python script arguments`` in this process, as the imports of a new one take longer than the example."""
    with printed_in(cwd, **environment) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    run(EXAMPLES / "prepare.py", "digits", "--rows", "64", cwd=folder)
    return folder


def test_own_loop(folder):
    data = ("--model", "digits/model", "--dataset", "digits/train.jsonl")
    printed = run(EXAMPLES / "own_loop.py", *data, "--steps", "2", cwd=folder)
    rewards = [float(value) for value in re.findall(r"reward (\S+)", printed)]
    assert len(rewards) == 2
    assert min(rewards) > 0.2  # the model that prepare.py writes reads about half of the numbers


def test_trl(folder):
    data = ("--model", "digits/model", "--dataset", "digits/train.jsonl")
    try:
        printed = run(EXAMPLES / "trl_grpo.py", *data, "--steps", "2", cwd=folder)
    finally:
        Patch.active["patch_trl"].undo()
    assert len(re.findall(r"'rewards/exact_match/mean'", printed)) == 2


def test_yaml(folder):
    with printed_in(folder):
        cli.main(["train", "--config", str(EXAMPLES / "digits.yaml"), "--max_steps", "2", "--eval_steps", "2"])
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
    assert "after 2 steps" in run("notebook.py", cwd=folder, MPLBACKEND="agg")


@pytest.fixture(scope="module")
def launched(folder):
    """launched(recipe, program, *flags): the arguments that a recipe gives to a program, in place of which nothing runs."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("vllm", "accelerate", "vlmkernels"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.txt\n')
        (programs / name).chmod(0o755)
    variables = {"MODEL": "digits/model", "DATASET": "digits/train.jsonl"}

    def launch(recipe: str, program: str, *flags: str) -> list[str]:
        environment = os.environ | variables | {"PATH": f"{programs}:{os.environ['PATH']}"}
        subprocess.run(["bash", EXAMPLES / "recipes" / recipe, *flags], cwd=folder, env=environment, timeout=60, check=True)
        return (folder / f"{program}.txt").read_text().splitlines()

    return launch


def test_lora_recipe(folder, launched):
    """One step on the CPU; the vision tower gets no adapter."""
    small = ("--max_steps", "1", "--per_device_train_batch_size", "16", "--use_cpu", "true", "--bf16", "false")
    dtype = ("--model_init_kwargs", '{"dtype": "float32"}')
    flags = launched("lora-24gb.sh", "vlmkernels", *small, *dtype, "--max_completion_length", "8")
    with printed_in(folder):
        cli.main(flags)
    adapters = json.loads((folder / "lora-run" / "adapter_config.json").read_text())
    assert set(adapters["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def config_of(flags: list[str]):
    """The configuration that flags of ``vlmkernels train`` describe, on the CPU."""
    from vlmkernels.cli.train import build_parser
    from vlmkernels.train import GRPOConfig

    args = build_parser().parse_args(flags)
    names = [field.name for field in fields(GRPOConfig) if field.init]
    return GRPOConfig(**{name: getattr(args, name) for name in names} | {"use_cpu": True, "bf16": False})


def test_full_recipe_has_valid_flags(launched):
    found = launched("full-8xh100.sh", "accelerate")
    assert Path(found[found.index("--config_file") + 1]).resolve() == ROOT / "configs" / "fsdp2.yaml"
    config = config_of(found[found.index("train") + 1 :])
    assert config.prompts_per_generation == 8
    assert config.vllm_mode == "server"


def test_qlora_recipe_has_valid_flags(launched, monkeypatch):
    monkeypatch.setattr("vlmkernels.models.quantized.has_bitsandbytes", lambda: True)
    found = launched("qlora-16gb.sh", "vlmkernels")
    assert found[0] == "train"
    config = config_of(found[1:])
    assert config.model_init_kwargs["quantization_config"] == {"load_in_4bit": True}
    assert (config.max_tokens_per_microbatch, config.output_dir) == (4096, "qlora-run")


@pytest.fixture(scope="module")
def zoom_folder(tmp_path_factory) -> Path:
    """A tiny model that calls ``zoom`` in most completions, and four rows."""
    folder = tmp_path_factory.mktemp("zoom")
    made = tool_model("qwen2_5_vl")
    made.model.save_pretrained(folder / "model")
    made.processor.save_pretrained(folder / "model")
    for k, row in enumerate(made.rows):
        row["images"][0].save(folder / f"{k}.png")
    rows = [{"prompt": row["prompt"], "image": f"{k}.png", "answer": f"saw {k}"} for k, row in enumerate(made.rows)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def zoom_script(folder: Path, name: str, *changes: tuple[str, str], **options) -> None:
    """Write the example with other options and other changes."""
    text = (EXAMPLES / "zoom.py").read_text()
    options = {"max_completion_length": 150, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1} | options
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    for before, after in (('GRPOConfig("zoom", max_completion_length=2048', f'GRPOConfig("{name}"{arguments}'), *changes):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / f"{name}.py").write_text(text)


def run_zoom(folder: Path, name: str, **environment: str) -> str:
    return run(f"{name}.py", "model", "train.jsonl", cwd=folder, **environment)


@pytest.mark.parametrize("package", ["vlmkernels.train", "trl"])
def test_zoom(zoom_folder, package):
    """The same script with this trainer and with TRL's, which differ in one import. The tool is called, and its images seen."""
    seen = "answers = [c"
    spy = "print('images', sum(isinstance(m['content'], list) for c in completions for m in c))\n    answers = [c"
    imported = "from vlmkernels.train import"
    zoom_script(zoom_folder, "run", (imported, f"from {package} import"), (seen, spy), max_steps=4, save_strategy="no")
    printed = run_zoom(zoom_folder, "run", TRL_EXPERIMENTAL_SILENCE="1")
    images = [int(count) for count in re.findall(r"images (\d+)", printed)]
    assert len(images) == 4
    assert min(images) > 0
    if package == "vlmkernels.train":
        log = [json.loads(line) for line in (zoom_folder / "run" / "metrics.jsonl").read_text().splitlines()]
        succeeded = [8 * entry["tools/zoom/calls"] * (1 - entry["tools/zoom/failures"]) for entry in log[:4]]
        assert all(round(count) >= shown for count, shown in zip(succeeded, images, strict=True))


def test_the_page_of_tools_shows_the_example():
    code = (EXAMPLES / "zoom.py").read_text()
    assert f"```python\n{code}```" in TOOLS
    assert len(code.splitlines()) <= 40


def test_formats_of_the_page():
    """The table names every format, in order, with a call that it reads."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `(.+)` \|$", TOOLS, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMATS)
    for name, written in rows:
        text, calls, _ = split(written.replace(r"\|", "|"), FORMATS[name], opened=False)
        assert (text, calls) == ("", [("zoom", {"index": 1 if FORMATS[name].typed else "1"})]), name


def test_the_chat_template_of_the_page():
    """A model without tools in its template, such as Qwen2.5-VL, can call tools and see their images with it."""
    (template,) = re.findall(r"```jinja\n(.*?)\n```", TOOLS, flags=re.DOTALL)
    processor = build_processor()
    processor.chat_template = template

    def zoom(index: int) -> list:
        """Look at a quarter of the image.

        Args:
            index: Which quarter.
        """

    tools = Tools([zoom])
    agent = Agent(tools)
    try:
        agent.prepare(processor, next(family for family in FAMILIES if family.name == "qwen2_5_vl"))
    finally:
        agent.close()
    assert agent.encoder.images_unsupported is None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, tools=tools.schemas(), tokenize=False, add_generation_prompt=True)
    assert json.dumps(tools.schemas()[0]) in text
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"index": 1}}}
    text = processor.apply_chat_template([{"role": "assistant", "content": "Hm.", "tool_calls": [call]}], tokenize=False)
    turn = agent.parser(processor.tokenizer(text.split("assistant\n")[1])["input_ids"], tools.schemas())
    assert turn.message() == {"role": "assistant", "content": "Hm.", "tool_calls": [call]}


def test_the_tests_of_the_page_exist():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TOOLS))
    assert len(named) > 15
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert {pair for pair in named if f"def {pair[1]}(" not in sources.get(pair[0], "")} == set()
