"""Stand-ins for packages that are not installed."""

import contextlib
import importlib.util
import logging
import os
import sys
import types

import pytest

from vlmkernels.conformance.foreign import restored, stand_ins

PROJECT = """
import json
import absent_engine.worker as worker
from absent_engine import LLM, util
from absent_engine.config import Config

@util.remote
def plain(x: "Config | None") -> LLM | None:
    return x + 1

@util.remote(num_cpus=1)
class Actor(LLM):
    def __init__(self, value):
        self.value = value

    def step(self: Config[int]):
        return self.value
"""


def test_stand_ins():
    project = types.ModuleType("project")
    with stand_ins("absent_engine", "json"):
        exec(PROJECT, vars(project))
        assert importlib.util.find_spec("absent_engine") is not None
        assert importlib.util.find_spec("absent_engine_2") is None
    assert project.plain(1) == 2
    assert project.Actor(3).step() == 3
    assert not isinstance(3, project.Config)
    assert project.json.loads("4") == 4  # an installed package is not replaced
    assert not [name for name in sys.modules if name.startswith("absent_engine")]
    with pytest.raises(ModuleNotFoundError, match="absent_engine"):
        importlib.import_module("absent_engine")


def test_stand_ins_are_removed_after_an_error():
    with contextlib.suppress(ZeroDivisionError), stand_ins("absent_engine"):
        engine = importlib.import_module("absent_engine")
        assert engine.__version__ == "0"
        assert engine.anything.at.all(1, 2) is not None
        assert not hasattr(engine, "__file__")
        raise ZeroDivisionError
    assert "absent_engine" not in sys.modules


def test_restored(monkeypatch):
    library = types.ModuleType("library")
    exec("class Trainer:\n    def log(self): return 1\n\ndef seed(): return 2", vars(library))
    library.Trainer.__module__ = "library"
    monkeypatch.setitem(sys.modules, "library", library)
    handlers = [*logging.root.handlers]
    with restored("library"):
        del library.Trainer.log
        library.Trainer.added, library.seed = 3, None
        os.environ["ADDED_BY_A_PROJECT"] = "1"
        logging.root.addHandler(logging.NullHandler())
    assert library.Trainer().log() == 1
    assert library.seed() == 2
    assert not hasattr(library.Trainer, "added")
    assert "ADDED_BY_A_PROJECT" not in os.environ
    assert logging.root.handlers == handlers
