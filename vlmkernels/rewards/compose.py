"""The rewards of a run: found by name or import path, weighted, called, timed, and checked.

A reward is a function, a name, or what a configuration says of one:

    rewards:
      - {name: iou, weight: 1.0, frame: resized, column: box}
      - {name: format, weight: 0.2}
      - {name: "my_rewards:politeness", timeout: 2, on_error: skip}

``name`` is a built-in reward or an import path "module:function"; ``weight``, ``log_as`` (the name in the logs), ``timeout``
and ``on_error`` are those of ``Entry``; everything else is an option of the reward itself.
"""

import asyncio
import importlib
import inspect
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require, require_number, require_one_of, require_positive
from vlmkernels.rewards.batch import Unparsed
from vlmkernels.rewards.builtin import NAMES, PROVIDED, arguments_of, build, check_options, required_columns

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
WARN_AFTER_S = 60.0


@dataclass(frozen=True)
class Entry:
    """One reward of a run.

    function: called with keyword arguments, each a list with one entry per completion (and ``trainer_state``); a coroutine
    function too. Returns a number per completion, None for "not scored", or an exception for one that failed.
    name: in the logs. weight: in the sum. timeout: seconds for one completion, which are then scored one by one. on_error:
    "raise", or "skip": a completion whose reward fails or takes too long counts as not scored.
    """

    function: Callable
    name: str
    weight: float = 1.0
    timeout: float | None = None
    on_error: str = "raise"

    def __post_init__(self):
        require_number("weight", self.weight, f"be a number for the reward {self.name}")
        require(math.isfinite(self.weight), "weight", f"be finite for the reward {self.name}", self.weight)
        if self.timeout is not None:
            require_positive("timeout", self.timeout)
        require_one_of("on_error", self.on_error, ON_ERROR)

    @property
    def is_async(self) -> bool:
        function = self.function
        while isinstance(function, partial):
            function = function.func
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def resolve(reward: str | Callable, **options) -> Callable:
    """The function itself, a built-in one by its name, or one by its import path "module:function"; with options.

    Of a class, an object made with the options.
    """
    name = reward
    if isinstance(reward, str):
        module, _, attribute = reward.partition(":")
        if reward in NAMES:
            return build(reward, **options)
        if not attribute:
            raise ValueError(f"reward must be one of {', '.join(NAMES)} or an import path 'module:function', got {reward!r}")
        try:
            reward = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward must be importable, got {reward!r}: {error}") from error
    if not callable(reward) or isinstance(reward, torch.nn.Module):
        raise TypeError(f"reward must be a function or its name, got {type(reward).__name__}")
    check_options(str(name), options, arguments_of(reward))
    if isinstance(reward, type):
        return reward(**options)
    return partial(reward, **options) if options else reward


def name_of(reward: Callable) -> str:
    """The name under which a reward is logged."""
    return getattr(reward, "__name__", None) or name_of(getattr(reward, "func", type(reward)))


def entry(reward: str | Callable | dict) -> Entry:
    """A reward as it is given to ``Rewards``."""
    if not isinstance(reward, dict):
        function = resolve(reward)
        return Entry(function, name_of(function))
    require("name" in reward, "rewards", "have a name each", reward)
    settings = {key: reward[key] for key in ("weight", "timeout", "on_error") if key in reward}
    options = {key: value for key, value in reward.items() if key not in (*settings, "name", "log_as")}
    function = resolve(reward["name"], **options)
    return Entry(function, reward.get("log_as") or name_of(function), **settings)


class Scores(NamedTuple):
    """Rewards of N completions by R functions.

    rewards: (N, R) fp32 on the CPU, NaN = not scored. unparsed, failed: (N, R) bool: the answer could not be parsed; the
    function raised or took too long. seconds: (R,) fp64.
    """

    rewards: torch.Tensor
    unparsed: torch.Tensor
    failed: torch.Tensor
    seconds: torch.Tensor

    @classmethod
    def cat(cls, parts: Sequence["Scores"]) -> "Scores":
        """Of several batches, one after the other; the times add up."""
        *by_completion, seconds = zip(*parts, strict=True)
        return cls(*map(torch.cat, by_completion), torch.stack(seconds).sum(0))

    def of(self, chosen: torch.Tensor) -> "Scores":
        """Of some completions; the times are those of all."""
        return Scores(self.rewards[chosen], self.unparsed[chosen], self.failed[chosen], self.seconds)

    def metrics(self, names: list[str]) -> dict[str, float]:
        """The shares of answers that could not be parsed and of rewards that failed, and the time that each function took."""
        rates = {"unparsed": self.unparsed.double().mean(0), "failed": self.failed.double().mean(0), "time": self.seconds}
        return {
            f"rewards/{name}/{key}": v for key, values in rates.items() for name, v in zip(names, values.tolist(), strict=True)
        }


class Rewards:
    """The reward functions of a run, with distinct names.

    Args:
        rewards: one or more functions, names, import paths, or dicts; see above.
        weights: one per function; by default those of the dicts, 1 where they have none.
    """

    def __init__(self, rewards: list | str | Callable | dict, weights: list[float] | None = None):
        rewards = rewards if isinstance(rewards, (list, tuple)) else [rewards]
        require(len(rewards) > 0, "reward_funcs", "name at least one function", "none")
        self.entries = [entry(reward) for reward in rewards]
        self.names = [e.name for e in self.entries]
        distinct = len(set(self.names)) == len(self.names)
        require(distinct, "reward_funcs", "have distinct names (log_as gives one another)", ", ".join(self.names))
        if weights is not None:
            twice = any(isinstance(reward, dict) and "weight" in reward for reward in rewards)
            require(not twice, "reward_weights", "be absent where rewards have a weight of their own", weights)
            rule = f"hold one number per reward function, {len(self.names)}"
            require(len(weights) == len(self.names), "reward_weights", rule, weights)
        self.weights = torch.tensor([e.weight for e in self.entries] if weights is None else weights, dtype=torch.float32)

    def check_columns(self, columns: list[str], dataset: str) -> None:
        """Raise where a function needs an argument that is neither provided nor a column of the dataset."""
        for e in self.entries:
            for name in required_columns(e.function):
                rule = f"have a column {name!r}, which reward {e.name} needs"
                require(name in (*PROVIDED, *columns), dataset, rule, ", ".join(columns))

    def check_row(self, row: dict, where: str) -> None:
        """Raise where a row of the dataset holds what a built-in reward cannot compare an answer with."""
        for e in self.entries:
            try:
                getattr(e.function, "check", lambda row: None)(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: {error} (reward {e.name})") from error

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One loop for coroutine functions, in a thread of its own: the caller may be in another, and what they keep belongs to
        the loop that made it."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def __call__(self, num_completions: int, rows: list[int] | None = None, /, **arguments) -> Scores:
        """Score completions. Coroutine functions run together, beside the others.

        Args:
            num_completions: N.
            rows: the index in the dataset of each completion's sample, for errors.
            arguments: passed on to the functions; lists of N are one entry per completion.
        """
        results: dict[str, tuple[list, float]] = {}
        waiting = [e for e in self.entries if e.is_async]
        later = waiting and asyncio.run_coroutine_threadsafe(_all(waiting, num_completions, arguments), self._loop)
        try:
            for e in self.entries:
                if not e.is_async:
                    start = time.perf_counter()
                    with _watched(e.name):
                        results[e.name] = _call(e, num_completions, arguments), time.perf_counter() - start
            if waiting:
                names = [e.name for e in waiting]
                with _watched(", ".join(names)):
                    results |= dict(zip(names, later.result(), strict=True))
        finally:
            if waiting:
                later.cancel()

        where = lambda i: f"completion {i}" + ("" if rows is None else f" of sample {rows[i]}")  # noqa: E731
        values = [results[e.name][0] for e in self.entries]
        numbers = [
            [_number(e, value, where(i)) for i, value in enumerate(of)] for e, of in zip(self.entries, values, strict=True)
        ]
        for e, of in zip(self.entries, values, strict=True):
            _warn(e, of)
        return Scores(
            torch.tensor(numbers, dtype=torch.float32).T.contiguous(),
            *(torch.tensor([[isinstance(v, kind) for v in of] for of in values]).T for kind in (Unparsed, Exception)),
            torch.tensor([results[e.name][1] for e in self.entries], dtype=torch.float64),
        )


@contextmanager
def _watched(name: str) -> Iterator[None]:
    """Say of a call that does not return whose it is: without a timeout nothing else ends it, and the other processes of a run
    wait for this one."""
    ended = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not ended.wait(waited or WARN_AFTER_S):  # 1, 2, 4, ... times that
            waited = 2 * waited or WARN_AFTER_S
            logger.warning("reward %s has not returned for %g s; with a timeout it would count as failed", name, waited)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _warn(e: Entry, values: list) -> None:
    """Say which completions were skipped, and why the first of them."""
    errors = [value for value in values if isinstance(value, Exception)]
    if errors:
        text = "reward %s failed for %d of %d completions, which it does not score; the first error: %s: %s"
        logger.warning(text, e.name, len(errors), len(values), type(errors[0]).__name__, errors[0])


def _number(e: Entry, value, where: str) -> float:
    """What a function returned for a completion, as a number, NaN where it is not scored."""
    if isinstance(value, Exception):
        if e.on_error == "skip":
            return math.nan
        raise RuntimeError(f"reward {e.name} failed for {where}: {type(value).__name__}: {value}") from value
    if value is None or isinstance(value, Unparsed):
        return math.nan if value is None else value
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward {e.name} must return finite numbers or None, got {value!r:.80} for {where}")
    return float(value)


def _as_list(scores, name: str, count: int) -> list:
    try:
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
    except TypeError as error:
        raise ValueError(f"reward {name} must return a list of {count} numbers, got {scores!r:.80}") from error
    require(len(scores) == count, f"reward {name}", f"return one number per completion, {count}", len(scores))
    return scores


def _each(arguments: dict, count: int) -> Iterator[dict]:
    """The arguments of each completion alone."""
    for i in range(count):
        yield {k: v[i : i + 1] if isinstance(v, (list, tuple)) and len(v) == count else v for k, v in arguments.items()}


def _call(e: Entry, count: int, arguments: dict) -> list:
    """What a function returns. Where it raises it is called again for each completion, whose exceptions are then known."""
    if e.timeout is None:
        try:
            scores = e.function(**arguments)
        except ImportError:
            raise  # no fault of a sample
        except Exception as error:
            results = [_attempt(e.function, one) for one in _each(arguments, count)]
            return _attributed(e, results, error)
        return _as_list(scores, e.name, count)
    worker, results = _Worker(e.function), []
    for one in _each(arguments, count):
        worker = _Worker(e.function) if worker.left else worker
        results.append(worker.call(one, e.timeout))
    worker.stop()
    return _single(e, results)


async def _call_async(e: Entry, count: int, arguments: dict) -> tuple[list, float]:
    start = time.perf_counter()

    async def one(sample: dict):
        try:
            return await asyncio.wait_for(e.function(**sample), e.timeout)
        except asyncio.TimeoutError as error:  # TimeoutError itself from Python 3.11 on
            return error if e.timeout is None else TimeoutError(f"no result within {e.timeout} s")
        except Exception as error:
            return error

    async def all_of_them() -> list:
        return list(await asyncio.gather(*(one(sample) for sample in _each(arguments, count))))

    if e.timeout is not None:
        scores = _single(e, await all_of_them())
    else:
        try:
            scores = await e.function(**arguments)
        except ImportError:
            raise
        except Exception as error:
            scores = _attributed(e, await all_of_them(), error)
        scores = _as_list(scores, e.name, count)
    return scores, time.perf_counter() - start


async def _all(entries: list[Entry], count: int, arguments: dict) -> list[tuple[list, float]]:
    return list(await asyncio.gather(*(_call_async(e, count, arguments) for e in entries)))


def _attempt(function: Callable, arguments: dict):
    try:
        return function(**arguments)
    except Exception as error:
        return error


def _single(e: Entry, results: list) -> list:
    """Of calls with one completion each, the score or exception."""
    for result in results:
        if isinstance(result, ImportError):
            raise result
    return [r if isinstance(r, Exception) else _as_list(r, e.name, 1)[0] for r in results]


def _attributed(e: Entry, results: list, error: Exception) -> list:
    """The results of single calls after the whole call raised; raises its error where each completion alone is fine."""
    if not any(isinstance(result, Exception) for result in results):
        raise RuntimeError(f"reward {e.name} failed for the batch, of no single completion: {error}") from error
    return _single(e, results)


class _Worker:
    """A thread that calls a function, so that the caller need not wait for it for ever. ``left``: a call took too long and was
    left behind; Python cannot end it, but the thread does not keep the process alive."""

    def __init__(self, function: Callable):
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.results: queue.SimpleQueue = queue.SimpleQueue()
        self.left = False
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable) -> None:
        while (arguments := self.tasks.get()) is not None:
            self.results.put(_attempt(function, arguments))

    def call(self, arguments: dict, timeout: float):
        self.tasks.put(arguments)
        try:
            return self.results.get(timeout=timeout)
        except queue.Empty:
            self.left = True
            self.stop()
            return TimeoutError(f"no result within {timeout} s")

    def stop(self) -> None:
        self.tasks.put(None)
