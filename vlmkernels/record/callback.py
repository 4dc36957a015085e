"""The callback that writes a run's metrics, description and completions to its ``output_dir``."""

import json
import math
import os
import platform
import re
import shutil
from dataclasses import MISSING, Field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vlmkernels.env import PACKAGES, version
from vlmkernels.record.completions import Groups, save_step, stored_steps
from vlmkernels.record.files import COMPLETIONS_FOLDER, METRICS_FILE, PREVIOUS_FOLDER, RUN_FILE, append_atomic, write_atomic
from vlmkernels.record.loggers import LOGGERS

SECRET = re.compile(r"token$|api_?key|password|secret|authorization|credential", re.IGNORECASE)
# The user and password of a URL, and the value of a secret in its query.
SECRET_IN_URL = re.compile(
    r"(?<=://)[^/?#\s]+(?=@)|(?<=[?&])((?:\w*token|\w*api_?key|key|password|\w*secret)=)[^&#\s]+", re.IGNORECASE
)


def json_value(value: Any, key: str = "") -> Any:
    """Convert any value to JSON: NaN and infinities become strings, other objects their ``str``, secrets "hidden"."""
    if isinstance(value, dict):
        return {str(name): json_value(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, key) for item in value]
    if isinstance(value, str):
        return "hidden" if SECRET.search(key) else SECRET_IN_URL.sub(lambda match: f"{match[1] or ''}hidden", value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float)) else json_value(str(value), key)


def json_line(entry: dict) -> str:
    """Return the line of ``metrics.jsonl`` for one log."""
    return json.dumps(json_value(entry), ensure_ascii=False) + "\n"


def environment() -> dict:
    """Describe the machine and the Python of this process."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def run_description(args: TrainingArguments, state: TrainerState, model: PreTrainedModel, details: dict | None = None) -> dict:
    """Return the content of ``run.json``.

    Args:
        model: the trained model without wrappers.
        details: further sections, such as the dataset and the rewards, and further entries of the section "model".
    """
    details = details or {}
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from_step": state.global_step,
        "max_steps": state.max_steps,
        "processes": args.world_size,
        "model": {
            "class": type(model).__name__,
            "path": getattr(model, "name_or_path", ""),
            **details.get("model", {}),
        },
        **{name: section for name, section in details.items() if name != "model"},
        "arguments": args.to_dict(),
        "changed": changed_arguments(args),
        "model config": config,
        "versions": {name: version(name) for name in ("vlmkernels", *PACKAGES)},
        "environment": environment(),
    }


def changed_arguments(args: TrainingArguments) -> list[str]:
    """Return the names of the arguments that differ from their defaults."""

    def is_off(value: Any) -> bool:
        return value is None or value is False or value in ("", "none") or value == []

    def is_default(field: Field) -> bool:
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return value == default or (is_off(value) and is_off(default)) or value == AcceleratorConfig()

    return [field.name for field in fields(args) if field.init and not is_default(field)]


class RunRecord(TrainerCallback):
    """Writes these files to ``output_dir``, on the main process:

    - ``metrics.jsonl``: one JSON object per log, written immediately. It has the entries of ``log_history`` in
      ``trainer_state.json``, with NaN and infinities as strings. A resumed run starts with the log of its checkpoint, so that
      each step occurs once.
    - ``run.json``: datasets, rewards, adapters, arguments, versions and environment of the run.
    - ``completions/step-*.json`` and pages of them (with ``log_completions``). The loggers receive the completions too.

    No start removes what an earlier start wrote. A run that starts at step 0 moves the files of the earlier run to
    ``previous/1``, ``previous/2``, ...; a run that resumes moves the earlier ``run.json`` there, the logs that its checkpoint
    does not have, and the completions of steps after its checkpoint.

    Args:
        details: further sections of ``run.json``.
    """

    def __init__(self, details: dict | None = None) -> None:
        self._details = details
        self._logged_before_training: list[dict] = []  # for example by evaluate()
        self._training_began = False

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        folder, self._training_began = Path(args.output_dir), True
        lines = [json_line(entry) for entry in [*self._logged_before_training, *state.log_history]]
        _keep_previous_start(folder, state.global_step, set(map(_sorted_keys, lines)))
        write_atomic(folder / METRICS_FILE, "".join(lines))
        description = json_value(run_description(args, state, model, self._details))
        write_atomic(folder / RUN_FILE, json.dumps(description, indent=1, ensure_ascii=False) + "\n")
        self._logged_before_training = []

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            entry = state.log_history[-1]  # not logs, which other callbacks may have changed
            if not self._training_began:
                self._logged_before_training.append(entry)
            append_atomic(Path(args.output_dir) / METRICS_FILE, json_line(entry))

    def save_completions(
        self, args: TrainingArguments, state: TrainerState, groups: Groups, callbacks: list[TrainerCallback]
    ) -> None:
        """Store the completions of a step and send them to the loggers of ``report_to`` that can show them."""
        save_step(Path(args.output_dir) / COMPLETIONS_FOLDER, state.global_step, groups)
        for name in args.report_to:
            if name in LOGGERS:
                LOGGERS[name](state.global_step, groups, callbacks)


def _keep_previous_start(folder: Path, from_step: int, continued: set[str]) -> None:
    """Move what an earlier start wrote, and this one will not continue, to the next free folder in ``previous``.

    Args:
        from_step: the step that training starts from. Completions up to this step are continued, unless it is 0.
        continued: the lines of ``metrics.jsonl`` that this start begins with, with sorted keys.
    """
    numbers = [int(path.name) for path in folder.glob(f"{PREVIOUS_FOLDER}/*") if path.name.isdecimal()]
    kept = folder / PREVIOUS_FOLDER / str(max(numbers, default=0) + 1)
    metrics, about, completions = (folder / name for name in (METRICS_FILE, RUN_FILE, COMPLETIONS_FOLDER))
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    if lines := [line for line in lines if _sorted_keys(line) not in continued]:
        write_atomic(kept / METRICS_FILE, b"".join(lines).decode("utf-8", "replace"))
    moved = [about] if about.exists() else []
    for step, path in stored_steps(completions).items():
        if from_step == 0 or step > from_step:
            moved += [file for file in (path, path.with_suffix(".html")) if file.exists()]
    for path in moved:
        target = kept / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def _sorted_keys(line: str | bytes) -> str | bytes:
    """Return a line of ``metrics.jsonl`` as a resumed run has it, because ``trainer_state.json`` has sorted keys."""
    try:
        return json.dumps(json.loads(line), sort_keys=True)
    except ValueError:  # not written to its end
        return line
