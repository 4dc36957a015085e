"""What ``run.json`` says about the data, the rewards and the adapters of a run."""

import inspect
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model

from vlmkernels.data.dataset import column_names
from vlmkernels.rewards import Rewards
from vlmkernels.train.processes import digest_rows
from vlmkernels.train.reference import ADAPTER


def run_details(train_dataset: Any, eval_dataset: Any, rewards: Rewards, model: torch.nn.Module) -> dict[str, Any]:
    """Return the sections "dataset", "eval_dataset", "rewards" and "adapters" of ``run.json``.

    Args:
        train_dataset, eval_dataset: the arguments of the trainer.
        model: the policy without wrappers.
    """
    if isinstance(eval_dataset, dict):
        evaluated: Any = {name: _dataset(dataset) for name, dataset in eval_dataset.items()}
    else:
        evaluated = _dataset(eval_dataset)
    return {
        "dataset": _dataset(train_dataset),
        "eval_dataset": evaluated,
        "rewards": _rewards(rewards),
        "adapters": _adapters(model),
    }


def _dataset(dataset: Any) -> dict[str, Any] | None:
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
        "columns": column_names(dataset),
        "fingerprint": getattr(dataset, "_fingerprint", None) or digest_rows(dataset),
    }


def _rewards(rewards: Rewards) -> list[dict[str, Any]]:
    """Describe the rewards: name, function, weight, and options as in the configuration file."""
    described = []
    for entry, weight in zip(rewards.entries, rewards.weights.tolist(), strict=True):
        function, options = entry.function, {}
        while isinstance(function, partial):
            options, function = function.keywords | options, function.func
        kind = function if inspect.isroutine(function) else type(function)
        if kind is not function:  # an object, whose options are its attributes
            options |= {key: value for key, value in vars(function).items() if not key.startswith("_") and key != "name"}
        options = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str, list, tuple))}
        described.append(
            {
                "name": entry.name,
                "function": f"{kind.__module__}:{kind.__qualname__}",
                "weight": round(weight, 6),
                "options": options,
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
        name: {key: _sorted(x) for key, x in values.items() if x not in (None, {}, [])} for name, values in settings.items()
    }


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value
