"""The pages of docs/: examples run, links and commands exist, and docs/data.md is true row by row."""

import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
sys.path.insert(0, str(ROOT / "bench"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def runnable(path: Path) -> list[str]:
    """The Python blocks of a page, except those that need a model of the reader or another project.

    tests/integrations runs those of trainers.
    """
    return (
        []
        if path.parent.name in ("integrations", "conformance")
        else [block for block in blocks(path, "python") if "path/to" not in block]
    )


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in runnable(page):
        exec(block, names)
    differentiable = [x for x in names.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = [x.grad for x in differentiable if x.is_leaf and x.grad is not None]
    assert all(x.isfinite().all() for x in (*differentiable, *gradients)), f"{page.name} computes values that are not finite"


def test_the_trainer_of_the_conformance_page_fails_the_contracts_that_the_page_names(capsys):
    page = DOCS / "conformance.md"
    names: dict = {}
    exec(blocks(page, "python")[0], names)
    failed = {result.contract for result in names["results"] if result.status != "pass" and "not" not in result.status}
    assert failed == {name for name in re.findall(r"\(`(\w+/\w+)`\)", page.read_text())}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([\w/.-]+\.md)\)", index)}
    assert {page for page in DOCS.rglob("*.md") if page.name != "index.md"} <= linked


def test_pages_start_with_an_example():
    """Title, at most a few lines of purpose, then a block of code before the first section."""
    for page in DOCS.rglob("*.md"):
        if page.name != "index.md" and page.parent.name != "conformance":
            before_sections = page.read_text().split("\n## ")[0]
            assert "```" in before_sections, page.name


def commands(page: Path) -> list[list[str]]:
    """The vlmkernels commands in a page's shell blocks and in its text."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    found = re.findall(
        r"(?:^|[ /])vlmkernels(?:\.cli)? ((?:train|report|doctor|eval|plan|env|demo)\b[^#|&\n]*)", shell, re.MULTILINE
    )
    found += re.findall(r"`vlmkernels ((?:train|report|doctor|eval|plan|env|demo)\b[^`]*)`", page.read_text())
    return [shlex.split(command.replace("\n", " ")) for command in found]


def flags_of(command: str) -> set[str]:
    from vlmkernels.cli import COMMANDS

    class Stop(Exception):
        pass

    found: set[str] = set()

    def parse(parser, *arguments, **options):
        found.update(parser._option_string_actions)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr("argparse.ArgumentParser.parse_known_args", parse)
        patch.setattr("argparse.ArgumentParser.parse_args", parse)
        importlib.import_module(f"vlmkernels.cli.{COMMANDS[command][0]}").main([])
    return found


def test_commands_have_these_flags():
    named: dict[str, set[str]] = {}
    for page in PAGES:
        for command, *arguments in commands(page):
            named.setdefault(command, set()).update(a.split("=")[0] for a in arguments if a.startswith("--"))
    assert {"train", "eval", "report", "doctor", "plan", "env"} <= named.keys()
    for command, flags in named.items():
        assert flags <= flags_of(command), f"vlmkernels {command} has no {flags - flags_of(command)}"


def test_make_targets_and_scripts_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:  # without tables: results of an older commit have its paths
        text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        named = set(re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE))
        assert named <= targets, f"{page.name}: {named - targets}"
        for script in re.findall(r"(?:bench|examples|hub|tests)/[\w/]+\.(?:py|md|yaml|ipynb)", text):
            assert (ROOT / script).exists(), f"{page.name}: {script}"
        for path in re.findall(r"`(vlmkernels/[\w/.]+|csrc/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one; modules that patch a library are not imported."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:  # ``module`` is a module without submodules
        return hasattr(importlib.import_module(module), attribute)


def test_names_exist():
    """Dotted names of the package in the pages exist."""
    for page in PAGES:
        names = set(re.findall(r"`(vlmkernels(?:\.\w+)+)(?:\(.*?\))?`", page.read_text())) - {"vlmkernels.json"}
        missing = {name for name in names if not exists(name)}
        assert not missing, page.name


FOREIGN = {
    "LDGSTS",
    "manylinux_2_34",
    "SHARDED_STATE_DICT",
    "UTMALDG",
    "vlmkernels_sapo",
}  # of other projects, or put together at run time


def test_words_in_backticks():
    """Arguments, functions, settings and metrics that the pages name occur in the sources."""
    folders = ("vlmkernels", "csrc", "tests", "bench", "examples", "configs")
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h", ".yaml", ".sh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    sources = "\n".join(path.read_text() for path in [*files, ROOT / "setup.py", ROOT / "Makefile"])
    for page in (page for page in PAGES if page.parent.name != "conformance"):  # those name the code of other projects
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        names = set(re.findall(r"`([A-Za-z_]\w*[_A-Z]\w*)(?:\(.*?\))?`", text)) - FOREIGN
        unknown = {name for name in names if name not in sources}
        assert not unknown, page.name


def test_walks_of_the_architecture():
    """Each hop of docs/architecture.md names a function that its file defines, and a walk has at most eight hops."""
    for walk in (DOCS / "architecture.md").read_text().split("\n### ")[1:]:
        hops = re.findall(r"^\d+\. `([\w/.]+):(\w+)`", walk, flags=re.MULTILINE)
        assert 4 <= len(hops) <= 8, walk[:40]
        for path, name in hops:
            definition = rf"^ *def {name}\(" if path.endswith(".py") else rf"\b{name}\("
            assert re.search(definition, (ROOT / path).read_text(), flags=re.MULTILINE), f"{path}:{name}"
        assert path.startswith("csrc/cuda/")
        assert name.endswith("_kernel")


@pytest.mark.parametrize("name", ["plot", "tree_plot"])
def test_plot_is_current(name):
    plot = importlib.import_module(name)
    assert plot.PLOT.read_text() == plot.svg(), f"run python bench/{name}.py"


def test_configuration_of_rewards(monkeypatch):
    import yaml

    from vlmkernels.rewards import Rewards

    async def politeness(completions, **kwargs):
        return [0.0] * len(completions)

    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(politeness=politeness))
    (text,) = blocks(DOCS / "rewards.md", "yaml")
    names = ["iou", "think_answer_format", "cosine_length", "politeness"]
    assert Rewards(yaml.safe_load(text)["rewards"]).names == names


# docs/data.md

DATA = DOCS / "data.md"
ROWS, PREDICTIONS = blocks(DATA, "jsonl")[:4], blocks(DATA, "jsonl")[4:]


def draw_images(value, folder: Path) -> None:
    """Generate the images that a row names."""
    if isinstance(value, list):
        for item in value:
            draw_images(item, folder)
    elif isinstance(value, str):
        path = folder / value
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (56, 42), (200, 10, 10)).save(path)


@pytest.fixture
def dataset(tmp_path):
    """The file of all rows of the page, with their images."""
    path = tmp_path / "test.jsonl"
    path.write_text("".join(ROWS))
    for line in path.read_text().splitlines():
        for column in ("image", "images", "videos"):
            draw_images(json.loads(line).get(column), tmp_path)
    return path


def test_rows_of_the_page(dataset):
    from vlmkernels.data.dataset import load_dataset
    from vlmkernels.data.samples import read_sample

    samples = [read_sample(row, index) for index, row in enumerate(load_dataset(dataset))]
    assert [(len(sample.images), len(sample.videos)) for sample in samples] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    kinds = [[part["type"] for part in sample.prompt[0]["content"]] for sample in samples]
    assert kinds == [["text"], ["image", "text"], ["text", "image", "text", "image", "text"], ["video", "text"]]
    assert samples[3].fps == 1
    assert samples[3].videos[0].shape == (3, 3, 42, 56)


def test_prompts_that_are_strings_need_placeholders(dataset):
    from support import tiny

    from vlmkernels.data.samples import read_sample, render

    row = {"image": str(dataset.parent / "images/street.png")}
    prompt = "<|vision_start|><|image_pad|><|vision_end|>How many?"
    assert render(read_sample(row | {"prompt": prompt}, 0), tiny.processor()) == prompt
    with pytest.raises(ValueError, match="sample 0"):
        render(read_sample(row | {"prompt": "How many?"}, 0), tiny.processor())


def test_arguments_of_reward_functions():
    from vlmkernels.rewards.signature import PROVIDED

    table = DATA.read_text().split("## What a reward function receives")[1].split("\n\nThe function returns")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) - {"answer"} == set(PROVIDED)


def test_reward_of_the_page():
    from vlmkernels.rewards import Rewards

    names: dict = {}
    exec(blocks(DATA, "python")[1], names)
    texts, answer = ["5.2", "about five", "9", "7"], ["5", "5", "5", None]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, conversations):
        scores = Rewards(names["close_number"])(4, completions=completions, answer=answer, prompts=[""] * 4)
        assert str(scores.rewards.flatten().tolist()) == "[1.0, 0.0, 0.0, nan]"


def test_what_a_reward_function_receives(tmp_path, dataset):
    """The types of the page's table, in a step of the trainer."""
    from support import tiny
    from transformers import TrainerState

    from vlmkernels.data.dataset import load_dataset
    from vlmkernels.train import GRPOConfig, GRPOTrainer

    received = {}

    def reward(**arguments):
        received.update(arguments)
        return [0.0] * len(arguments["completions"])

    rows = [load_dataset(dataset)[index] for index in (1, 2)]
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"), num_generations=2, per_device_train_batch_size=4, max_steps=1,
        max_completion_length=4, report_to="none", save_strategy="no", use_cpu=True, shuffle_dataset=False,
    )  # fmt: skip
    GRPOTrainer(tiny.vlm(), reward, config, rows, processing_class=tiny.processor()).train()
    assert isinstance(received.pop("trainer_state"), TrainerState)
    assert all(len(values) == 4 for values in received.values())
    assert received["prompts"][0] == received["prompts"][1] == rows[0]["prompt"]
    assert all([message["role"] for message in completion] == ["assistant"] for completion in received["completions"])
    assert all(isinstance(number, int) for ids in received["completion_ids"] for number in ids)
    assert [[image.mode for image in images] for images in received["images"]] == [["RGB"]] * 2 + [["RGB", "RGB"]] * 2
    assert received["image_sizes"] == [[(56, 42)]] * 2 + [[(56, 42)] * 2] * 2
    assert all(isinstance(width, int) for sizes in received["resized_sizes"] for width, _ in sizes)
    assert received["answer"] == ["3", "3", "the door", "the door"]


@pytest.mark.parametrize("content", PREDICTIONS, ids=["texts", "objects"])
def test_predictions_of_the_page(tmp_path, dataset, content):
    from vlmkernels.cli import main

    predictions, output = tmp_path / "predictions.jsonl", tmp_path / "eval.json"
    predictions.write_text(content)
    first_rows = "".join(line + "\n" for line in dataset.read_text().splitlines()[:2])
    dataset.write_text(first_rows)
    command = re.search(r"vlmkernels (eval --predictions predictions.jsonl .*)", DATA.read_text())[1]
    places = {"predictions.jsonl": predictions, "test.jsonl": dataset, "eval.json": output}
    assert main([str(places.get(argument, argument)) for argument in command.split()]) == 0
    found = json.loads(output.read_text())
    assert found
