"""Reward functions: finding them, and calling them.

A reward function is called once per generation batch with keyword arguments, each a list with one entry per completion:
``prompts``, ``completions`` (text, or a list with the assistant's message where the prompt is a conversation),
``completion_ids``, ``images`` (a list per completion) and the dataset's other columns; and with ``trainer_state``. It returns
a number per completion, or None for "not scored".
"""

import importlib
import inspect
import math
from collections.abc import Callable
from numbers import Real

import torch

from vlmkernels.train.rewards.text import cer, exact_match

BUILT_IN = {"cer": cer, "exact_match": exact_match}
PROVIDED = ("prompts", "completions", "completion_ids", "images", "trainer_state")


def resolve(reward: str | Callable) -> Callable:
    """The function itself, a built-in one by its name, or one by its import path "module:function"."""
    if isinstance(reward, str):
        if reward in BUILT_IN:
            return BUILT_IN[reward]
        module, _, name = reward.partition(":")
        if not name:
            known = ", ".join(BUILT_IN)
            raise ValueError(f"reward must be one of {known} or an import path 'module:function', got {reward!r}")
        try:
            reward = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward must be importable, got {reward!r}: {error}") from error
    if not callable(reward) or isinstance(reward, torch.nn.Module):
        raise TypeError(f"reward must be a function or its name, got {type(reward).__name__}")
    if inspect.iscoroutinefunction(reward):
        raise TypeError(f"reward {name_of(reward)} must be an ordinary function, got a coroutine function")
    return reward


def name_of(reward: Callable) -> str:
    """The name under which a reward is logged."""
    return getattr(reward, "__name__", None) or name_of(getattr(reward, "func", type(reward)))


class Rewards:
    """The reward functions of a run, with distinct names."""

    def __init__(self, functions: list[str | Callable] | str | Callable):
        functions = functions if isinstance(functions, (list, tuple)) else [functions]
        if not functions:
            raise ValueError("reward_funcs must name at least one function, got none")
        self.functions = [resolve(function) for function in functions]
        self.names = [name_of(function) for function in self.functions]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"reward_funcs must have distinct __name__s, got {', '.join(self.names)}")

    def check_columns(self, columns: list[str], dataset: str) -> None:
        """Raise where a function needs an argument that is neither provided nor a column of the dataset."""
        for name, function in zip(self.names, self.functions, strict=True):
            for parameter in inspect.signature(function).parameters.values():
                optional = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                if optional or parameter.default is not parameter.empty or parameter.name in (*PROVIDED, *columns):
                    continue
                raise ValueError(
                    f"{dataset} must have a column {parameter.name!r}, which reward {name} needs, got {', '.join(columns)}"
                )

    def __call__(self, num_completions: int, **arguments) -> torch.Tensor:
        """(N, R) fp32 on the CPU, NaN = not scored."""
        columns = [
            _checked(function(**arguments), name, num_completions)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        return torch.tensor(columns, dtype=torch.float32).T.contiguous()


def _checked(scores, name: str, count: int) -> list[float]:
    try:
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
    except TypeError as error:
        raise ValueError(f"reward {name} must return a list of {count} numbers, got {scores!r:.80}") from error
    if len(scores) != count:
        raise ValueError(f"reward {name} must return one number per completion, {count}, got {len(scores)}")
    return [math.nan if score is None else _number(score, name, index) for index, score in enumerate(scores)]


def _number(score, name: str, index: int) -> float:
    value = score.item() if hasattr(score, "item") and getattr(score, "ndim", 0) == 0 else score
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward {name} must return finite numbers or None, got {score!r:.80} for completion {index}")
    return float(value)
