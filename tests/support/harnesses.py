"""The metric functions of lmms-eval, which `make setup` installs without dependencies outside the environment."""

import ast
import functools
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

LMMS_EVAL = Path(sys.prefix) / "peers" / "lmms_eval"
INSTALLED = LMMS_EVAL.is_dir()
# Imported by the modules, but not used by the functions that tests call.
UNUSED = ("loguru", "sacrebleu", "lmms_eval.api.registry", "lmms_eval.tasks._task_utils.file_utils")


@functools.cache
def load(path: str) -> types.ModuleType:
    """Load a module of lmms-eval by its path in the wheel, with registry decorators that do nothing."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), LMMS_EVAL / path)
    module = importlib.util.module_from_spec(spec)
    stubs = {name: mock.MagicMock() for name in UNUSED}
    for name in ("register_metric", "register_aggregation"):
        setattr(stubs["lmms_eval.api.registry"], name, lambda *_, **__: lambda function: function)
    packages = ("lmms_eval", "lmms_eval.api", "lmms_eval.tasks", "lmms_eval.tasks._task_utils")
    with mock.patch.dict(sys.modules, {**{name: types.ModuleType(name) for name in packages}, **stubs}):
        if "vqav2" in path:
            sys.modules["lmms_eval.tasks._task_utils.vqa_eval_metric"] = load("tasks/_task_utils/vqa_eval_metric.py")
        spec.loader.exec_module(module)
    return module


@functools.cache
def answer_processor():
    """Return lmms-eval's processor of VQA answers. It remembers the texts that it has processed."""
    processor = load("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    for name in ("process_punctuation", "process_digit_article"):
        setattr(processor, name, functools.cache(getattr(processor, name)))
    return processor


@functools.cache
def _process_results() -> Callable:
    """Return ``ConfigurableTask.process_results``, without the imports of its module."""
    tree = ast.parse((LMMS_EVAL / "api" / "task.py").read_text())
    (task,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ConfigurableTask"]
    methods = [node for node in task.body if isinstance(node, ast.FunctionDef) and node.name == "process_results"]
    for method in methods:
        method.decorator_list = []  # retries
    names: dict = {"np": np}
    exec(compile(ast.Module(methods, []), "api/task.py", "exec"), names)
    return names["process_results"]


@functools.cache
def _reasoning_tags() -> list[list[str]]:
    """Return the default of the command's ``--reasoning_tags``."""
    return json.loads(re.search(r"""--reasoning_tags".*?default='(.*?)',""", (LMMS_EVAL / "__main__.py").read_text(), re.S)[1])


def results_of(process_results: Callable | None, completion: str, doc: dict, **metrics: dict) -> dict:
    """Return what lmms-eval computes from a completion: it removes reasoning and surrounding white space first.

    Args:
        process_results: the function of a task's configuration. None: the configuration has a list of metrics.
        completion: the text that the model wrote.
        doc: the row; without a function, ``target`` is the reference.
        metrics: functions of ``api/metrics.py`` with their options, by name.
    """
    text = load("api/reasoning.py").strip_reasoning_tags(completion, _reasoning_tags())
    several = isinstance(doc.get("target"), list)
    functions = {name: getattr(load("api/metrics.py"), options.pop("function")) for name, options in metrics.items()}
    task = types.SimpleNamespace(
        OUTPUT_TYPE="generate_until",
        config=types.SimpleNamespace(process_results=process_results, doc_to_choice=None),
        doc_to_target=lambda doc: doc["target"],
        multiple_target=len(doc["target"]) if several else 0,
        _metric_fn_list=functions,
        _metric_fn_kwargs=metrics,
    )
    return _process_results()(task, doc, [text])
