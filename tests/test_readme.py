"""The README: its diffs are right, its tables are current, and it stays short. tests/test_docs.py tests links and commands."""

import ast
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "bench"))


def diffs() -> list[tuple[str, str]]:
    """Each diff as the code before and the code after."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", TEXT, flags=re.DOTALL):
        lines = block.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] != skipped) for skipped in "+-")
        found.append((before, after))
    return found


def test_length():
    assert len(TEXT.splitlines()) <= 130
    first_screen = "\n".join(TEXT.splitlines()[:45])
    for part in ("docs/training-step.svg", "python bench/plot.py", "pip install .", "make demo", "make test", "| TRL 1.16 |"):
        assert part in first_screen, part


def test_diff_of_a_training_loop():
    logits, targets = torch.randn(2, 5, 11, dtype=torch.float64), torch.randint(11, (2, 5))
    results = []
    for code in diffs()[1]:
        names = {"logits": logits.clone().requires_grad_(), "targets": targets, "temperature": 0.7}
        exec(code, names)
        (gradient,) = torch.autograd.grad((names["logps"] + 0.1 * names["entropy"]).sum(), names["logits"])
        results.append((names["logps"].detach(), names["entropy"].detach(), gradient))
    torch.testing.assert_close(*results)


def test_diff_of_trl():
    """It adds an import and a call, and changes nothing else; tests/integrations/test_trl.py tests the patched trainer."""
    before, after = (ast.dump(ast.parse(code)) for code in diffs()[0])
    added = {"from vlmkernels.integrations.trl import patch_trl", "patch_trl()"}
    lines = [line[1:] for line in re.search(r"```diff\n(.*?)```", TEXT, flags=re.DOTALL)[1].splitlines() if line[:1] == "+"]
    assert before != after
    assert {line for line in lines if line} == added


def test_tables_are_current():
    import tables

    named = [set(re.findall(r"<!-- table: ([\w-]+)", page.read_text())) for page in tables.PAGES]
    assert set().union(*named) == tables.TABLES.keys()
    for page in tables.PAGES:
        assert page.read_text() == tables.fill(page.read_text()), f"{page.name} is out of date: run python bench/tables.py"
