"""``pytest --conformance``: outcomes, reports, and adapters that break their interface."""

import json
import re

import pytest

import vlmkernels.conformance.plugin  # noqa: F401  pytester removes modules that are imported during its runs

pytest_plugins = ["pytester"]

# Rewards of group_advantages with faults; each class breaks one rule of the interface.
ADAPTERS = """
import torch
from vlmkernels import group_advantages
from vlmkernels.conformance import Adapter, Documented, NeedsCUDA, NotApplicable


class _Base(Adapter):
    def advantages(self, batch):
        return group_advantages(batch.rewards, group_sizes=batch.group_sizes, weights=batch.weights).advantages


class Right(_Base):
    name = "right"
    packages = ("torch", "no-such-package")


class Wrong(_Base):
    name = "wrong"
    def advantages(self, batch):
        return super().advantages(batch).roll(1)


class Chosen(Wrong):
    name = "chosen"
    documented = (Documented("advantages/*", "The next completion gets the advantage.", "docs/of/the/project.md"),)


class Shape(_Base):
    name = "shape"
    def advantages(self, batch):
        return super().advantages(batch)[:-1]


class Kind(_Base):
    name = "kind"
    def advantages(self, batch):
        return super().advantages(batch).tolist()


class Integers(_Base):
    name = "integers"
    def advantages(self, batch):
        return super().advantages(batch).long()


class Changes(_Base):
    name = "changes"
    def advantages(self, batch):
        out = super().advantages(batch)
        batch.rewards.zero_()
        return out


class Raises(_Base):
    name = "raises"
    def advantages(self, batch):
        return self.no_such_attribute


class Refuses(_Base):
    name = "refuses"
    def advantages(self, batch):
        raise NotApplicable("there are no groups here")


class Device(_Base):
    name = "device"
    needs_cuda = {"advantages": "a Triton kernel"}


class Nothing(Adapter):
    name = "nothing"
"""

# The status of "advantages/value", and what its message contains.
EXPECTED = {
    "right": ("pass", ""),
    "wrong": ("fail", "advantages["),
    "chosen": ("documented", "The next completion gets the advantage. (docs/of/the/project.md)"),
    "shape": ("error", "advantages must return a tensor of shape (8,), returned (7,)"),
    "kind": ("error", "advantages must return a tensor, returned list"),
    "integers": ("error", "advantages must return a floating-point tensor, returned torch.int64"),
    "changes": ("error", "advantages changed one of its arguments, a tensor of shape (8, 1)"),
    "raises": ("error", "AttributeError: 'Raises' object has no attribute 'no_such_attribute'"),
    "refuses": ("not applicable", "there are no groups here"),
    "device": ("needs CUDA", "a Triton kernel"),
    "nothing": ("not applicable", "the adapter has no method advantages"),
}


def run(pytester, *arguments):
    """Run pytest in this process, on a few contracts."""
    return pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "-p", "no:benchmark", "-k", "advantages/value or load", *arguments
    )


def test_each_adapter_is_reported_and_the_run_goes_on(pytester):
    pytester.makepyfile(adapters=ADAPTERS)
    pytester.makepyfile(broken="x = 1")
    result = run(pytester, "--conformance", "broken.py", "--conformance", "adapters.py")
    output = pytester.path / "conformance-output"
    content = json.loads((output / "conformance.json").read_text())
    cells = {cell["project"]: cell for cell in content["cells"] if cell["contract"] == "advantages/value"}
    assert cells.keys() == EXPECTED.keys()
    for name, (status, message) in EXPECTED.items():
        assert [*cells[name]["counts"]] == [status], name
        assert message in cells[name]["first"].get(status, {"message": ""})["message"], name
    assert content["projects"]["right"] == {"torch": content["versions"]["torch"], "no-such-package": "not installed"}
    assert content["not_loaded"].keys() == {"broken.py"}
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == outcomes["xfailed"] == outcomes["failed"] / 7 == outcomes["skipped"] / 3

    text = result.stdout.str()
    section = text[text.index("wrong::advantages/value") :]
    assert re.search(r"fail: advantages\[\d\] is -?[\d.]+, expected -?[\d.]+ \(tolerance \d", section)
    assert "source: DeepSeekMath" in section
    assert "adapter = load('adapters.py:Wrong')" in section
    assert re.search(r"^advantages/value +✓ +✗ 1/1 +d ", text, re.MULTILINE)
    page = (output / "conformance.html").read_text()
    assert "<h2>Failures</h2>" in page
    assert "<h2>Errors</h2>" in page
    assert "<h2>Documented differences</h2>" in page
    assert "load(&#x27;adapters.py:Wrong&#x27;)" in page
    assert "<script" not in page


# Methods that leave a case in another way than by an error, and what they change.
UNRULY = """
import os, random, sys
import pytest
import torch
from beside import Right
from vlmkernels.conformance import Adapter, GRPOLossConfig, LossBatch


class Exits(Right):
    name = "exits"
    def advantages(self, batch): sys.exit(3)


class Skips(Right):
    name = "skips"
    def advantages(self, batch): pytest.skip("no data")


class Static(Right):
    name = "static"
    @staticmethod
    def advantages(*args): return Right().advantages(*args)


class Sets(Right):
    name = "sets"
    def advantages(self, batch):
        out = super().advantages(batch)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        os.chdir("/")
        return out


class Again(Right):
    name = "sets"


class Constructor(Right):
    name = "constructor"
    def __init__(self): raise RuntimeError("no GPU")


class Suffers(Right):
    name = "suffers, [1] 'é'"
    def loss(self, batch, config):
        assert batch.logps.device.type == "cpu"
        ratio = (batch.logps - batch.old_logps).exp()
        advantages = batch.advantages[:, None]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - config.epsilon_low, 1 + config.clip_high) * advantages)
        return ((loss * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)).mean()
"""
BESIDE = """
from vlmkernels import group_advantages
from vlmkernels.conformance import Adapter

class Right(Adapter):
    name = "right"
    def advantages(self, batch): return group_advantages(batch.rewards, group_sizes=batch.group_sizes).advantages
"""


def test_unruly_adapters_leave_the_others_alone(pytester):
    folder = pytester.mkdir("folder")
    (folder / "unruly.py").write_text(UNRULY, encoding="utf-8")
    (folder / "beside.py").write_text(BESIDE)
    pytester.makeini("[pytest]\naddopts = -W error --import-mode=importlib\ntestpaths = folder")
    keywords = "advantages/value or loss/gradient and token-2x2 or load"
    options = ("-p", "no:benchmark", "-k", keywords, "--conformance", "folder/unruly.py")
    result = pytester.runpytest_inprocess(*options)
    content = json.loads((pytester.path / "conformance-output" / "conformance.json").read_text())
    counts = {(cell["project"], cell["contract"].split("/")[0]): [*cell["counts"]] for cell in content["cells"]}
    assert counts == {
        ("exits", "advantages"): ["error"],
        ("skips", "advantages"): ["error"],
        ("static", "advantages"): ["pass"],
        ("sets", "advantages"): ["pass"],
        **{("suffers, [1] 'é'", part): ["pass"] for part in ("advantages", "loss")},
    }
    assert content["not_loaded"] == {
        "folder/unruly.py:Again": "Again.name must differ from those of other adapters, got 'sets'",
        "folder/unruly.py:Constructor": "Constructor() must return an adapter, it raises RuntimeError: no GPU",
    }
    assert result.parseoutcomes()["failed"] == 4
    again = pytester.runpytest_inprocess(*options, "--lf")
    assert again.parseoutcomes()["failed"] == 4
    assert "passed" not in again.parseoutcomes()
    assert pytester.runpytest_inprocess(*options, "-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


BROKEN = {
    "imports": ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("x = (", "cannot be imported: SyntaxError"),
    "empty": ("x = 1", "must define a subclass of vlmkernels.conformance.Adapter"),
    "unnamed": (
        "from vlmkernels.conformance import Adapter\nclass A(Adapter): pass",
        "A.name must be a string of one line, got None",
    ),
    "declares": (
        "from vlmkernels.conformance import Adapter\nclass A(Adapter):\n name, scales = 'a', ('groups',)",
        "A.scales must be a tuple of some of group, batch, none; got ('groups',)",
    ),
    "parameters": (
        "from vlmkernels.conformance import Adapter\nclass A(Adapter):\n name = 'a'\n def loss(self, batch): pass",
        "A.loss must have the parameters (self, batch: ",
    ),
}


def test_adapters_that_cannot_be_loaded_are_named(pytester):
    pytester.makepyfile(**{name: text for name, (text, _) in BROKEN.items()})
    result = run(pytester, *(word for name in BROKEN for word in ("--conformance", f"{name}.py")))
    content = json.loads((pytester.path / "conformance-output" / "conformance.json").read_text())
    assert result.parseoutcomes() == {"failed": len(BROKEN)}
    for name, (_, message) in BROKEN.items():
        assert message in content["not_loaded"][f"{name}.py"]
        assert message in result.stdout.str()


def test_arguments_are_checked(pytester):
    pytester.makepyfile(test_other="def test(): pass")
    unknown = run(pytester, "--conformance", "no_such_adapter")
    assert "conformance must name a file or one of" in unknown.stderr.str()
    output = run(pytester, "--conformance", "vlmkernels", "--conformance-output", "test_other.py")
    assert "conformance-output must be a folder that can be written, got " in output.stderr.str()
    files = run(pytester, "--conformance", "vlmkernels", "test_other.py")
    assert "--conformance runs without test files, and -k selects cases; got test_other.py" in files.stderr.str()


def test_the_plugin_is_idle_without_its_option(pytester):
    pytester.makepyfile(test_other="import sys\ndef test(): assert 'vlmkernels.conformance' not in sys.modules")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert not (pytester.path / "conformance-output").exists()
