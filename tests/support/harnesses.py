"""The metric functions of lmms-eval, which `make setup` installs without dependencies outside the environment."""

import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

LMMS_EVAL = Path(sys.prefix) / "peers" / "lmms_eval"
INSTALLED = LMMS_EVAL.is_dir()
# Imported by the modules, but not used by the functions that tests call.
UNUSED = ("loguru", "sacrebleu", "lmms_eval.api.registry", "lmms_eval.tasks._task_utils.file_utils")


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
