"""The README's snippets run, and its tables that come from the code are current."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = [s for s in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if "path/to" not in s]
sys.path.insert(0, str(ROOT / "bench"))


def test_snippets():
    assert len(SNIPPETS) == 4
    names: dict = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["logits"].grad.abs().sum() > 0
    assert names["loss"].isfinite()
    assert names["head"].weight.grad.abs().sum() > 0
    assert len(names["rows"]) == names["layout"].cu_seqlens[-1]


@pytest.mark.parametrize("name", ["losses", "backends"])
def test_tables_are_current(name):
    import tables

    shown = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", TEXT, flags=re.DOTALL)[1]
    assert shown.rstrip("\n") == "\n".join(tables.TABLES[name]()), "run: python bench/tables.py"


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", TEXT))
    assert {"demo", "test", "bench", "gpu-test"} <= named | {"gpu-test"}
    assert named <= targets
    scripts = set(re.findall(r"python (bench/\w+\.py)", TEXT))
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)
