"""The README's snippets run, and its tables that come from the code are current."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = [s for s in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if "path/to" not in s]
sys.path.insert(0, str(ROOT / "bench"))


def test_snippets():
    assert len(SNIPPETS) == 6
    names: dict = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["logits"].grad.abs().sum() > 0
    assert names["loss"].isfinite()
    assert names["head"].weight.grad.abs().sum() > 0
    assert len(names["rows"]) == names["layout"].cu_seqlens[-1]


def test_configuration_of_rewards(monkeypatch):
    import yaml

    from vlmkernels.rewards import Rewards

    async def politeness(completions, **kwargs):
        return [0.0] * len(completions)

    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(politeness=politeness))
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert Rewards(yaml.safe_load(text)["rewards"]).names == ["iou", "format", "cosine_length", "politeness"]


def test_tables_are_current():
    import tables

    named = [set(re.findall(r"<!-- table: ([\w-]+)", page.read_text())) for page in tables.PAGES]
    assert set().union(*named) == tables.TABLES.keys()
    for page in tables.PAGES:
        assert page.read_text() == tables.fill(page.read_text()), f"{page.name} is out of date: run python bench/tables.py"


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", TEXT))
    assert {"demo", "test", "bench", "gpu-test"} <= named | {"gpu-test"}
    assert named <= targets
    scripts = set(re.findall(r"python (bench/\w+\.py)", TEXT))
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)
