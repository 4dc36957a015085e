"""What ``run.json`` says about the model, the data, the rewards and the adapters of a run."""

import inspect
import re
from enum import Enum
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model

from vlmkernels.rewards import Rewards
from vlmkernels.train.processes import digest_rows
from vlmkernels.train.reference import ADAPTER, policy_parameters

MAX_ITEMS, MAX_CHARACTERS = 32, 512  # of a value; what exceeds them is cut


def run_details(
    train_dataset: Any, eval_dataset: Any, columns: dict[str, list[str]], rewards: Rewards, model: torch.nn.Module
) -> dict[str, Any]:
    """Return the sections "model", "dataset", "eval_dataset", "rewards" and "adapters" of ``run.json``.

    Args:
        train_dataset, eval_dataset: the arguments of the trainer.
        columns: the columns of each dataset; see ``CheckedDatasets``.
        model: the policy without wrappers.
    """
    if isinstance(eval_dataset, dict):
        evaluated: Any = {key: _dataset(rows, columns.get(f"eval_dataset[{key!r}]")) for key, rows in eval_dataset.items()}
    else:
        evaluated = _dataset(eval_dataset, columns.get("eval_dataset"))
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy_parameters(model)]  # ds_: under ZeRO-3
    return {
        "model": {
            "parameters": sum(size for size, _ in sizes),
            "trained parameters": sum(size for size, is_trained in sizes if is_trained),
        },
        "dataset": _dataset(train_dataset, columns.get("train_dataset")),
        "eval_dataset": evaluated,
        "rewards": _rewards(rewards),
        "adapters": _adapters(model),
    }


def _dataset(dataset: Any, columns: list[str] | None) -> dict[str, Any] | None:
    """Describe a dataset. The fingerprint is that of ``datasets``, or a hash of the prompts of some of the rows."""
    if dataset is None:
        return None
    path, split = getattr(dataset, "loaded_from", None), getattr(dataset, "split", None)
    if path is None and (files := getattr(dataset, "cache_files", None)):
        path = files[0]["filename"]
    return {
        "path": None if path is None else str(path),
        "split": None if split is None else str(split),
        "rows": len(dataset),
        "columns": columns,
        "fingerprint": getattr(dataset, "_fingerprint", None) or digest_rows(dataset),
    }


def _rewards(rewards: Rewards) -> list[dict[str, Any]]:
    """Describe the rewards: name, function, weight, and options as in the configuration file."""
    described = []
    for entry in rewards.entries:
        function, options = entry.function, {}
        while isinstance(function, partial):
            options, function = function.keywords | options, function.func
        kind = function if inspect.isroutine(function) else type(function)
        if kind is not function:  # an object, whose options are its attributes
            attributes = getattr(function, "__dict__", {})  # absent with __slots__
            options |= {key: value for key, value in attributes.items() if not key.startswith("_") and key != "name"}
        described.append(
            {
                "name": entry.name,
                "function": _name(kind),
                "weight": entry.weight,
                "options": _shown(options),
                "timeout": entry.timeout,
                "on_error": entry.on_error,
            }
        )
    return described


def _adapters(model: torch.nn.Module) -> dict[str, dict[str, Any]] | None:
    """Describe the adapters by name, without the settings that are unset; None for a model without adapters."""
    if not is_peft_model(model):
        return None
    settings = {name: config.to_dict() for name, config in model.peft_config.items() if name != ADAPTER}
    return {
        name: {key: _shown(x) for key, x in values.items() if x is not None and x != {} and x != []}
        for name, values in settings.items()
    }


def _shown(value: Any) -> Any:
    """Return a value for ``run.json``: large ones are cut, functions become their names, and other objects their class."""
    if isinstance(value, dict):
        items = list(value.items())
        rest = {"...": f"{len(items) - MAX_ITEMS} more"} if len(items) > MAX_ITEMS else {}
        return {str(key): _shown(item) for key, item in items[:MAX_ITEMS]} | rest
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        rest = [f"... {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else []
        return [_shown(item) for item in value[:MAX_ITEMS]] + rest
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (str, Path, re.Pattern, torch.dtype)):
        text = value.pattern if isinstance(value, re.Pattern) else str(value)
        return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}... {len(text) - MAX_CHARACTERS} more"
    if value is None or isinstance(value, Number):
        return value
    return _name(value)


def _name(value: Any) -> str:
    """Return the module and name of a function or class, or of the class of another object. Reprs can be large."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"
