"""What a run leaves in its output_dir beside the model, for ``vlmkernels report`` and for others to read."""

import json
import math
import os
import platform
import re
import shutil
from dataclasses import MISSING, Field, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import AcceleratorConfig

from vlmkernels.env import PACKAGES, version
from vlmkernels.record import completions
from vlmkernels.record.completions import Row
from vlmkernels.record.files import ABOUT_FILE, COMPLETIONS_FOLDER, METRICS_FILE, append, write_whole
from vlmkernels.record.loggers import LOGGERS

PREVIOUS = "previous"  # holds what a former run left, where another one starts in its folder
SECRET = re.compile(r"token$|api_key|password|secret", re.IGNORECASE)


def _plain(value, key: str = ""):
    """JSON of anything: numbers that JSON lacks by their names, objects by theirs, no secrets."""
    if isinstance(value, dict):
        return {str(name): _plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return "hidden" if SECRET.search(key) else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def line(entry: dict) -> str:
    return json.dumps(_plain(entry), ensure_ascii=False) + "\n"


def environment() -> dict:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def about(args, state, model) -> dict:
    """What run.json holds; model: without wrappers."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from_step": state.global_step,
        "max_steps": state.max_steps,
        "processes": args.world_size,
        "model": {
            "class": type(model).__name__,
            "path": getattr(model, "name_or_path", ""),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        },
        "arguments": args.to_dict(),
        "changed": changed(args),
        "model config": config,
        "versions": {name: version(name) for name in ("vlmkernels", *PACKAGES)},
        "environment": environment(),
    }


def changed(args) -> list[str]:
    """Names of the arguments that were given, or derived from such."""
    default = lambda f: f.default if f.default_factory is MISSING else f.default_factory()  # noqa: E731
    off = lambda value: value is None or value is False or value in ("", "none") or value == []  # noqa: E731

    def same(field: Field) -> bool:
        value, usual = getattr(args, field.name), default(field)
        return value == usual or (off(value) and off(usual)) or value == AcceleratorConfig()

    return [field.name for field in fields(args) if field.init and not same(field)]


class RunRecord(TrainerCallback):
    """Keeps, in output_dir, by the main process:

    - ``metrics.jsonl``: an object per log, as in the log_history of ``trainer_state.json``, but at once; NaN and infinities are
      strings. A resumed run has each step once: it begins with the log of its checkpoint.
    - ``run.json``: configuration, versions and environment of the process that trains.
    - ``completions/step-*.json`` and pages of them (``log_completions``), which also go to the loggers.

    A run that starts anew moves these of a former one to the folder ``previous``.
    """

    def __init__(self) -> None:
        self._before: list[dict] = []  # logged before training, as by evaluate()
        self._begun = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        folder, self._begun = Path(args.output_dir), True
        if state.global_step == 0:
            _set_aside(folder)
        for step, path in completions.stored(folder / COMPLETIONS_FOLDER).items():
            if step > state.global_step:
                completions.remove(path)
        write_whole(folder / METRICS_FILE, "".join(map(line, [*self._before, *state.log_history])))
        write_whole(folder / ABOUT_FILE, json.dumps(_plain(about(args, state, model)), indent=1, ensure_ascii=False) + "\n")
        self._before = []

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            entry = state.log_history[-1]  # callbacks change their logs
            if not self._begun:
                self._before.append(entry)
            append(Path(args.output_dir) / METRICS_FILE, line(entry))

    def completions(self, args, state, groups: list[list[Row]], callbacks: list[TrainerCallback]) -> None:
        """Store the completions of a step, and show them in those loggers of ``report_to`` that have tables or images."""
        completions.save(Path(args.output_dir) / COMPLETIONS_FOLDER, state.global_step, groups)
        for name in args.report_to:
            if name in LOGGERS:
                LOGGERS[name](state.global_step, groups, callbacks)


def _set_aside(folder: Path) -> None:
    left = [folder / name for name in (METRICS_FILE, ABOUT_FILE, COMPLETIONS_FOLDER) if (folder / name).exists()]
    if left:
        shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
        (folder / PREVIOUS).mkdir(parents=True)
        for path in left:
            shutil.move(path, folder / PREVIOUS / path.name)
