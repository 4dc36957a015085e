"""The reward functions of a run: names, weights and options.

A reward is a function, a name, or a dict as in a configuration file::

    rewards:
      - {name: iou, weight: 1.0, frame: resized, column: box}
      - {name: think_answer_format, weight: 0.2}
      - {name: "my_rewards:politeness", timeout: 2, on_error: skip}

``name`` is a built-in reward or an import path "module:function". ``log_as`` is the name in the logs. ``weight``, ``timeout``
and ``on_error`` are described in ``vlmkernels.rewards.calls.Entry``. All other keys are options of the reward itself. See
``vlmkernels.rewards.RewardFunction`` for the arguments and the return value of a function.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch

from vlmkernels.ops.checks import did_you_mean, import_object
from vlmkernels.rewards.batch import Unparsed
from vlmkernels.rewards.builtin import NAMES, PURE, build
from vlmkernels.rewards.calls import Entry, call, call_async, to_numbers, warn_of_errors, warn_when_slow
from vlmkernels.rewards.signature import (
    PROVIDED,
    SETTINGS,
    RewardFunction,
    arguments_of,
    check_options,
    check_signature,
    required_columns,
)
from vlmkernels.rewards.workers import GRACE_S, ProcessWorker

RewardSpec = str | Callable[..., Any] | dict[str, Any]

# Names of TRL's rewards, and the built-in rewards that correspond to them.
TRL_NAMES = {
    "accuracy_reward": "math_equal",
    "reasoning_accuracy_reward": "math_equal",
    "think_format_reward": "think_answer_format",
    "get_soft_overlong_punishment": "soft_overlong",
    "get_cosine_scaled_reward": "cosine_length",
    "get_repetition_penalty_reward": "repetition",
}


def resolve(reward: str | Callable[..., Any], **options: Any) -> RewardFunction:
    """Return a reward function with its options bound.

    Args:
        reward: a function, a class (instantiated with the options), the name of a built-in reward, or an import path
            "module:function".
        options: keyword arguments of the reward.

    Raises:
        ValueError: the reward or an option does not exist, or its module cannot be imported.
        TypeError: ``reward`` is not callable, or is a torch module.
    """
    name = reward
    if isinstance(reward, str):
        if reward in NAMES:
            return build(reward, **options)
        reward = _imported(reward)
    if not callable(reward) or isinstance(reward, torch.nn.Module):
        raise TypeError(f"reward must be a function or the name of one, not a torch module, got {type(reward).__name__}")
    check_options(str(name), options, arguments_of(reward))
    if isinstance(reward, type):
        return cast(RewardFunction, reward(**options))
    return partial(reward, **options) if options else reward


def _imported(path: str) -> Any:
    """Return the object at an import path "module:function"."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        dotted, _, last = path.strip(":").rpartition(".")
        hint = did_you_mean(path, NAMES, TRL_NAMES) or (f" (did you mean {dotted}:{last}?)" if dotted else "")
        raise ValueError(f"reward must be one of {', '.join(NAMES)} or an import path 'module:function', got {path!r}{hint}")
    if module.endswith(".py") or "/" in module or module.startswith("."):
        stem = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(
            f"reward must be an import path 'module:function' with the name of a module on sys.path, not a file, got {path!r} "
            f"(did you mean {stem}:{attribute}?)"
        )
    return import_object("reward", path)


def name_of(reward: Callable[..., Any]) -> str:
    """Return the default name of a reward in the logs."""
    return getattr(reward, "__name__", None) or name_of(getattr(reward, "func", type(reward)))


def to_entry(reward: RewardSpec) -> Entry:
    """Return the ``Entry`` of a function, a name, or a dict with ``name``."""
    if not isinstance(reward, dict):
        function = resolve(reward)
        return Entry(function, name_of(function))
    if "name" not in reward:
        raise ValueError(f"reward must have the key 'name', got {reward}")
    settings = {key: reward[key] for key in ("weight", "timeout", "on_error") if key in reward}
    function = resolve(reward["name"], **{key: value for key, value in reward.items() if key not in SETTINGS})
    process = None
    if reward["name"] in PURE and reward.get("timeout") is not None:
        sent = [name for name in PROVIDED if name not in ("images", "trainer_state", "tool_images", "environments")]
        process = ProcessWorker(function, (*sent, *required_columns(function)))
    return Entry(function, reward.get("log_as") or name_of(function), process=process, **settings)


def environment_reward(name: str) -> RewardFunction:
    """Return a reward function with the rewards that environments of the class ``name`` give themselves (``get_reward``)."""

    def reward(environment_rewards: list[dict[str, float]]) -> list[float | None]:
        return [rewards.get(name) for rewards in environment_rewards]

    reward.__name__ = name
    return cast(RewardFunction, reward)


class Scores(NamedTuple):
    """Rewards of N completions from R functions.

    A function can score the turns of a trajectory instead of the whole. Its advantage is then computed by turn: the trajectory
    has no outcome from this function.

    Attributes:
        rewards: (N, R) fp32 on the CPU; NaN = not scored. The sum over the turns where the function scored turns.
        unparsed: (N, R) bool, True where the answer could not be parsed.
        failed: (N, R) bool, True where the function raised or exceeded its timeout.
        seconds: (R,) fp64, time that each function took.
        scored_turns: (N, R) bool, True where the function scored turns; None if no function did.
        turns: (N, T) fp32, the weighted sum over functions of the rewards of each turn; NaN where no function scored the turn,
            and after the last turn of the trajectory. None if no function scored turns.
    """

    rewards: torch.Tensor
    unparsed: torch.Tensor
    failed: torch.Tensor
    seconds: torch.Tensor
    scored_turns: torch.Tensor | None = None
    turns: torch.Tensor | None = None

    @property
    def outcomes(self) -> torch.Tensor:
        """The rewards of whole completions, (N, R): NaN where the function scored turns."""
        return self.rewards if self.scored_turns is None else self.rewards.masked_fill(self.scored_turns, torch.nan)

    @classmethod
    def cat(cls, parts: Sequence["Scores"]) -> "Scores":
        """Concatenate the scores of several batches and sum their ``seconds``."""
        rewards, unparsed, failed, seconds, *_ = zip(*parts, strict=True)
        scored_turns = turns = None
        if any(part.turns is not None for part in parts):
            width = max(0 if part.turns is None else part.turns.shape[1] for part in parts)
            scored_turns = torch.cat([torch.zeros_like(p.failed) if (s := p.scored_turns) is None else s for p in parts])
            turns = torch.cat([_widened(part.rewards[:, :0] if part.turns is None else part.turns, width) for part in parts])
        return cls(torch.cat(rewards), torch.cat(unparsed), torch.cat(failed), torch.stack(seconds).sum(0), scored_turns, turns)

    def select(self, completions: torch.Tensor) -> "Scores":
        """Return the scores of the completions with these indices or this mask. ``seconds`` still covers all completions."""
        rewards, unparsed, failed = self.rewards[completions], self.unparsed[completions], self.failed[completions]
        scored_turns, turns = (None if x is None else x[completions] for x in (self.scored_turns, self.turns))
        return Scores(rewards, unparsed, failed, self.seconds, scored_turns, turns)

    def expand(self, completions: list[int], count: int) -> "Scores":
        """Return scores of ``count`` completions: these for the given ones, in order; the others are not scored."""
        place = torch.full((count,), len(completions))
        place[completions] = torch.arange(len(completions))
        rows = {"rewards": torch.nan, "unparsed": 0, "failed": 0, "scored_turns": 0, "turns": torch.nan}
        values = {name: getattr(self, name) for name in rows}
        expanded = {
            name: None if x is None else torch.cat([x, x.new_full((1, x.shape[1]), rows[name])])[place]
            for name, x in values.items()
        }
        return self._replace(**expanded)

    def metrics(self, names: list[str]) -> dict[str, float]:
        """Return the share of unparsed answers, the share of failed completions and the time in seconds of each function."""
        rates = {"unparsed": self.unparsed.double().mean(0), "failed": self.failed.double().mean(0), "time": self.seconds}
        return {
            f"rewards/{name}/{key}": v for key, values in rates.items() for name, v in zip(names, values.tolist(), strict=True)
        }


def _widened(turns: torch.Tensor, width: int) -> torch.Tensor:
    """Append turns without a reward, up to ``width``."""
    return torch.nn.functional.pad(turns, (0, width - turns.shape[1]), value=torch.nan)


def _to_float(score: float | BaseException | list[float]) -> float:
    """Return the reward of a completion; NaN if it is not scored."""
    if isinstance(score, list):
        scored = [number for number in score if not math.isnan(number)]
        return math.fsum(scored) if scored else math.nan
    return math.nan if isinstance(score, BaseException) else score


class Rewards:
    """The reward functions of a run, with distinct names.

    Args:
        rewards: one or more functions, names, import paths, or dicts; see the module's docstring. None: there are none, and
            completions have scores (N, 0).
        weights: one weight per function. Default: ``weight`` of its dict, else 1.

    Attributes:
        names: the names in the logs.
        specs: the functions, names or dicts that were given.
        weights: (R,) fp32.
    """

    def __init__(
        self,
        rewards: RewardSpec | Sequence[RewardSpec] | None,
        weights: Sequence[float] | None = None,
    ):
        if isinstance(rewards, (list, tuple)) and not rewards:
            raise ValueError("reward_funcs must have at least one function, got none")
        if rewards is None:
            rewards = []
        rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [cast(RewardSpec, rewards)]
        self.specs = rewards
        self.entries = [to_entry(reward) for reward in rewards]
        self.names = [entry.name for entry in self.entries]
        if len(set(self.names)) < len(self.names):
            names = ", ".join(self.names)
            raise ValueError(f"reward_funcs must have distinct names (set log_as to rename one), got {names}")
        if weights is not None:
            if any(isinstance(reward, dict) and "weight" in reward for reward in rewards):
                raise ValueError(f"reward_weights must be None if a reward sets its own weight, got {weights}")
            if len(weights) != len(self.names):
                raise ValueError(f"reward_weights must have one number per reward function, {len(self.names)}, got {weights}")
            self.entries = [replace(entry, weight=weight) for entry, weight in zip(self.entries, weights, strict=True)]
        self.weights = torch.tensor([entry.weight for entry in self.entries], dtype=torch.float32)

    def __bool__(self) -> bool:
        """Whether there are functions."""
        return bool(self.entries)

    @property
    def columns(self) -> list[str]:
        """The columns of the dataset that the functions need."""
        names = dict.fromkeys(name for entry in self.entries for name in required_columns(entry.function))
        return [name for name in names if name not in PROVIDED]

    def check_columns(self, columns: list[str], dataset: str) -> None:
        """Raise ValueError if a function needs a column that the dataset does not have, or takes arguments by position.

        Args:
            columns: the columns of the dataset.
            dataset: name of the dataset's argument, for the error message.
        """
        for entry in self.entries:
            check_signature(entry.name, entry.function)
            for name in required_columns(entry.function):
                if name not in (*PROVIDED, *columns):
                    raise ValueError(
                        f"{dataset} must have a column {name!r}, which reward {entry.name} needs, got {', '.join(columns)}"
                        f"{did_you_mean(name, columns)}"
                    )

    def check_row(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError if a row of the dataset has a reference that a built-in reward cannot parse.

        Args:
            where: name of the dataset and index of the row, for the error message.
        """
        for entry in self.entries:
            try:
                getattr(entry.function, "check", lambda row: None)(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {error} (reward {entry.name})") from error

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all coroutine functions, running in its own thread.

        The thread is needed because the caller may already run in an event loop. All calls use the same loop because objects
        that a coroutine function caches, such as a client session, belong to the loop in which they were created.
        """
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def __call__(
        self, num_completions: int, rows: list[int] | None = None, num_turns: list[int] | None = None, /, **arguments: Any
    ) -> Scores:
        """Score completions. Coroutine functions run concurrently with each other and with the other functions.

        Args:
            num_completions: N.
            rows: index of each completion's sample in the dataset, for error messages.
            num_turns: the number of turns of each completion, which functions can then score one by one. None: without tools.
            arguments: keyword arguments of the functions; see ``RewardFunction``.

        Raises:
            ImportError: a function needs a package that is not installed.
            RuntimeError: a function raised or exceeded its timeout, and its ``on_error`` is "raise".
            ValueError: a function did not return one finite number or None per completion, or per turn of a completion.
        """
        if not self:
            nothing = torch.zeros(num_completions, 0)
            return Scores(nothing, nothing.bool(), nothing.bool(), torch.zeros(0, dtype=torch.float64))
        results = self._call(num_completions, arguments)
        values = [results[name][0] for name in self.names]
        seconds = [results[name][1] for name in self.names]
        places = [f"completion {i}" + ("" if rows is None else f" of sample {rows[i]}") for i in range(num_completions)]
        counts = [None] * num_completions if num_turns is None else num_turns
        scores = [
            [to_numbers(entry, *of_completion) for of_completion in zip(column, places, counts, strict=True)]
            for entry, column in zip(self.entries, values, strict=True)
        ]
        for entry, column in zip(self.entries, scores, strict=True):
            warn_of_errors(entry, column)

        def are(kind: type) -> torch.Tensor:
            return torch.tensor([[isinstance(score, kind) for score in column] for column in scores]).T

        numbers = [[_to_float(score) for score in column] for column in scores]
        rewards = torch.tensor(numbers, dtype=torch.float32).T.contiguous()
        result = Scores(rewards, are(Unparsed), are(BaseException), torch.tensor(seconds, dtype=torch.float64))
        scored_turns = are(list)
        if num_turns is None or not scored_turns.any():
            return result
        return result._replace(scored_turns=scored_turns, turns=self._weighted_turns(scores, num_turns))

    def _weighted_turns(self, scores: list[list[Any]], num_turns: list[int]) -> torch.Tensor:
        """Return the weighted sum over functions of the rewards of turns, see ``Scores``."""
        total = torch.full((len(num_turns), max(num_turns)), torch.nan)
        for weight, column in zip(self.weights, scores, strict=True):
            for row, score in zip(total, column, strict=True):
                if isinstance(score, list):
                    own, turns = weight * torch.tensor(score, dtype=torch.float32), row[: len(score)]
                    turns.copy_(torch.where(own.isnan(), turns, own + turns.nan_to_num()))
        return total

    def _call(self, count: int, arguments: dict[str, Any]) -> dict[str, tuple[list[Any], float]]:
        """Call all functions. Returns, by name, the result of ``calls.call`` and the seconds that the function took."""
        results: dict[str, tuple[list[Any], float]] = {}
        futures = {
            entry.name: asyncio.run_coroutine_threadsafe(call_async(entry, count, arguments), self._loop)
            for entry in self.entries
            if entry.is_async
        }
        try:
            for entry in self.entries:
                if not entry.is_async:
                    start = time.perf_counter()
                    with warn_when_slow(entry.name):
                        results[entry.name] = call(entry, count, arguments), time.perf_counter() - start
            for entry in self.entries:
                if entry.is_async:
                    with warn_when_slow(entry.name):
                        results[entry.name] = self._result(entry, futures[entry.name], count)
        finally:
            for future in futures.values():
                future.cancel()
        return results

    def _result(self, entry: Entry, future: "Future[tuple[list[Any], float]]", count: int) -> tuple[list[Any], float]:
        """Wait for a coroutine function. One with a timeout that still runs after it blocks the loop, which is abandoned."""
        limit = None if entry.timeout is None else entry.timeout + GRACE_S
        try:
            return future.result(limit)
        except FutureTimeoutError:
            if limit is None or future.done():
                raise
            self.__dict__.pop("_loop", None)  # the next call starts another
            error = TimeoutError(f"no result within {entry.timeout} s; a coroutine function blocks the rewards' event loop")
            return [error] * count, limit
