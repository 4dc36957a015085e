"""Imports point down the layers of CONTRIBUTING.md, without cycles, and no test module imports another."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "vlmkernels"
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("may import | holds")[2].partition("\n\n")[0]
ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", SECTION, flags=re.MULTILINE)
ALLOWED: dict[str, set[str]] = {}
for folder, others in ROWS:
    ALLOWED[folder] = {folder, *(ALLOWED if others == "everything above" else re.findall(r"`(\w+)`", others))}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import in a file, including those in functions and under TYPE_CHECKING."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            # Each name may be a module of its own.
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def file_of(module: str) -> Path | None:
    """The file in the package that an import of ``module`` (or of a name in it) runs."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (
        path.with_suffix(".py"),
        path / "__init__.py",
        path.parent.with_suffix(".py"),
        path.parent / "__init__.py",
    ):
        if candidate.is_file() and candidate.is_relative_to(PACKAGE):
            return candidate
    return None


def layer(path: Path) -> str:
    """The folder or file of vlmkernels/. ``__init__.py`` exports the ops and counts as one, ``__main__.py`` as a command."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": "ops", "__main__": "cli"}.get(name, name)


FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def edges() -> list[tuple[Path, int, Path]]:
    """(file, line, imported file) of each import within the package."""
    return [
        (path, line, target)
        for path in FILES
        for line, module in imports(path)
        if module.split(".")[0] == "vlmkernels" and (target := file_of(module)) and target != path
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of the graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        done.add(node)
        return next((found for other in sorted(graph.get(node, ())) if (found := visit(other, [*path, node]))), [])

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_every_layer_is_in_the_table():
    assert ALLOWED.keys() == {layer(path) for path in FILES}


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {layer(path)} must not import {layer(target)}"
        for path, line, target in edges()
        if layer(target) not in ALLOWED[layer(path)]
    ]
    assert not wrong, "\n" + "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("name", [lambda path: str(path.relative_to(ROOT)), layer], ids=["files", "layers"])
def test_no_cycles(name):
    graph: dict[str, set[str]] = {}
    for path, _, target in edges():
        if name(path) != name(target):
            graph.setdefault(name(path), set()).add(name(target))
    assert not (found := cycle(graph)), " -> ".join(found)


def test_no_test_module_imports_another():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        wrong = [f"{path.relative_to(ROOT)}:{line}: {module}" for line, module in imports(path) if {*module.split(".")} & tests]
        assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_module():
    """A name with a leading underscore is used only where it is defined; also bench/ and hub/ use only public names."""
    for path in [*FILES, *(ROOT / "bench").glob("*.py"), *(ROOT / "hub").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        names = [(line, module) for line, module in imports(path) if module.startswith("vlmkernels.")]
        private = [f"{path.relative_to(ROOT)}:{line}: {module}" for line, module in names if re.search(r"\._(?!_|C\b)", module)]
        assert not private, "\n".join(private)
