"""Call reward functions with timeouts, attribute errors to single completions, and run coroutine functions concurrently."""

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Real
from typing import Any, cast

import torch

from vlmkernels.ops.checks import require_one_of, require_positive
from vlmkernels.rewards.batch import Unparsed
from vlmkernels.rewards.signature import RewardFunction, accepted
from vlmkernels.rewards.workers import ProcessWorker, ThreadWorker, attempt

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
WARN_AFTER_S = 60.0
MAX_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Entry:
    """One reward function of a run and how it is called.

    Args:
        function: see ``RewardFunction``.
        name: name in the logs.
        weight: factor of this reward in the sum of rewards.
        timeout: maximum seconds per completion; None = no limit. With a timeout, the function is called once per completion.
        on_error: what to do if the function raises, exceeds its timeout or returns something other than a finite number or None
            for a completion: "raise" an error, or "skip" (do not score) the completion.
        process: calls the function in a process of its own, where a timeout can interrupt everything; used only with a timeout.
            None: a thread calls it.
    """

    function: RewardFunction
    name: str
    weight: float = 1.0
    timeout: float | None = None
    on_error: str = "raise"
    process: ProcessWorker | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Real) or isinstance(self.weight, bool):
            raise TypeError(f"weight must be a number for the reward {self.name}, got {self.weight!r}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite for the reward {self.name}, got {self.weight}")
        if self.timeout is not None:
            require_positive("timeout", self.timeout)
        require_one_of("on_error", self.on_error, ON_ERROR)

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function, or an object whose ``__call__`` is one."""
        function = self.function
        while isinstance(function, partial):
            function = function.func
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call(entry: Entry, count: int, arguments: dict[str, Any]) -> list[Any]:
    """Call a reward function for ``count`` completions.

    If the call raises, the function is called again for each completion, to find the completions that fail. With a timeout, the
    function is called once per completion from the start.

    Returns:
        One entry per completion: the returned score, or the exception that was raised for the completion.

    Raises:
        ImportError: a package is missing, which no completion is responsible for.
        RuntimeError: the call for the whole batch raised, but none of the calls for single completions did.
        ValueError: the function did not return one value per completion.
    """
    arguments = accepted(entry.function, arguments)
    if entry.timeout is None:
        scores = attempt(entry.function, arguments)
        if isinstance(scores, ImportError):
            raise scores
        if isinstance(scores, Exception):
            results = [attempt(entry.function, one) for one in _one_by_one(arguments, count)]
            return _attributed(entry, results, scores)
        return _as_list(scores, entry.name, count)
    if entry.process is not None:
        return _single(entry, [entry.process.call(one, entry.timeout) for one in _one_by_one(arguments, count)])
    worker, results = ThreadWorker(entry.function), []
    for one in _one_by_one(arguments, count):
        worker = ThreadWorker(entry.function) if worker.abandoned else worker
        results.append(worker.call(one, entry.timeout))
    worker.stop()
    return _single(entry, results)


async def _awaited(entry: Entry, arguments: dict[str, Any]) -> Any:
    """Return the result of a coroutine function. The items of an iterator are returned as a list."""
    result = await cast(Coroutine[Any, Any, Any], entry.function(**arguments))
    return list(result) if isinstance(result, Iterator) else result


async def call_async(entry: Entry, count: int, arguments: dict[str, Any]) -> tuple[list[Any], float]:
    """Run ``call`` for a coroutine function, and also return how many seconds it took."""
    start = time.perf_counter()
    arguments = accepted(entry.function, arguments)

    async def attempt(sample: dict[str, Any]) -> Any:
        try:
            return await asyncio.wait_for(_awaited(entry, sample), entry.timeout)
        except asyncio.TimeoutError as error:  # the builtin TimeoutError since Python 3.11
            return error if entry.timeout is None else TimeoutError(f"no result within {entry.timeout} s")
        except Exception as error:
            return error

    async def call_each() -> list[Any]:
        return list(await asyncio.gather(*(attempt(sample) for sample in _one_by_one(arguments, count))))

    if entry.timeout is not None:
        scores = _single(entry, await call_each())
    else:
        try:
            scores = await _awaited(entry, arguments)
        except ImportError:
            raise
        except Exception as error:
            scores = _attributed(entry, await call_each(), error)
        scores = _as_list(scores, entry.name, count)
    return scores, time.perf_counter() - start


def to_number(entry: Entry, value: Any, where: str) -> float | BaseException:
    """Return the score of a completion as a number; NaN if the completion is not scored.

    Args:
        entry: the reward function.
        value: an element of the result of ``call``. Every finite number counts, also a bool, a ``Decimal``, and an array or
            tensor with one element.
        where: description of the completion, for error messages.

    Returns:
        The score, or with ``on_error`` "skip" the reason why the completion has none.

    Raises:
        RuntimeError: the value is an exception, and ``on_error`` is "raise".
        ValueError: the value is not a finite number, and ``on_error`` is "raise".
    """
    if isinstance(value, BaseException):
        if entry.on_error == "skip":
            return value
        raise RuntimeError(f"reward {entry.name} failed for {where}: {type(value).__name__}: {value}") from value
    if value is None or isinstance(value, Unparsed):
        return math.nan if value is None else value
    try:
        has_one = hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1
        value = value.item() if has_one else value
        number = float(value) if isinstance(value, (Real, Decimal)) else math.nan
    except (ArithmeticError, ValueError, TypeError, RuntimeError):  # a huge int, a signaling NaN, a tensor without data
        number = math.nan
    if abs(number) <= MAX_REWARD:
        return number
    error = ValueError(f"reward {entry.name} must return finite numbers or None, got {value!r:.80} for {where}")
    if entry.on_error == "skip":
        return error
    raise error


def to_numbers(entry: Entry, value: Any, where: str, num_turns: int | None) -> float | BaseException | list[float]:
    """Return the score of a completion, or the scores of its turns if the function returned a list for it.

    Args:
        entry, value, where: see ``to_number``.
        num_turns: the number of turns; None if the function cannot score turns.

    Returns:
        See ``to_number``. Of several turns that cannot be scored, the first reason.

    Raises:
        RuntimeError, ValueError: see ``to_number``. The list has a wrong length.
    """
    if num_turns is None or not isinstance(value, (list, tuple)):
        return to_number(entry, value, where)
    if len(value) == num_turns:
        numbers = [to_number(entry, number, f"turn {turn} of {where}") for turn, number in enumerate(value)]
        errors = [number for number in numbers if isinstance(number, BaseException)]
        return errors[0] if errors else [float(cast(float, number)) for number in numbers]
    error = ValueError(f"reward {entry.name} must return one number per turn, {num_turns}, got {len(value)} for {where}")
    if entry.on_error == "skip":
        return error
    raise error


@contextmanager
def warn_when_slow(name: str) -> Iterator[None]:
    """Log a warning with the name of the reward if the context has not ended after 1, 2, 4, ... minutes.

    Without a timeout, a call that never returns blocks the whole run, because the other ranks wait for this one.
    """
    ended = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not ended.wait(waited or WARN_AFTER_S):
            waited = 2 * waited or WARN_AFTER_S
            logger.warning("reward %s has not returned after %g s; set its timeout to limit the call", name, waited)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def warn_of_errors(entry: Entry, values: list[Any]) -> None:
    """Log for how many completions the reward failed, with the first error."""
    errors = [value for value in values if isinstance(value, BaseException)]
    if errors:
        text = "reward %s failed for %d of %d completions, which are not scored; first error: %s: %s"
        logger.warning(text, entry.name, len(errors), len(values), type(errors[0]).__name__, errors[0])


def _as_list(scores: Any, name: str, count: int) -> list[Any]:
    """Return what a function returned for ``count`` completions as a list. Any sequence, array or tensor is accepted."""
    try:
        if isinstance(scores, (Mapping, Set, str, bytes)):
            raise TypeError(f"a {type(scores).__name__} has no order of completions")
        values = list(scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores)
    except TypeError as error:
        raise ValueError(f"reward {name} must return a list of {count} numbers, got {scores!r:.80}: {error}") from error
    if len(values) != count:
        raise ValueError(f"reward {name} must return one number per completion, {count}, got {len(values)}")
    return values


def _one_by_one(arguments: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield the arguments for a call with a single completion, for each completion."""
    for i in range(count):
        yield {k: v[i : i + 1] if isinstance(v, (list, tuple)) and len(v) == count else v for k, v in arguments.items()}


def _single(entry: Entry, results: list[Any]) -> list[Any]:
    """Return the score or the exception of each call with a single completion. An ImportError among them is raised."""
    for result in results:
        if isinstance(result, ImportError):
            raise result
    return [r if isinstance(r, Exception) else _as_list(r, entry.name, 1)[0] for r in results]


def _attributed(entry: Entry, results: list[Any], error: Exception) -> list[Any]:
    """Return the results of the single calls after the batch call raised ``error``. Raises if no single call failed."""
    if not any(isinstance(result, Exception) for result in results):
        raise RuntimeError(f"reward {entry.name} failed for the batch but not for any single completion: {error}") from error
    return _single(entry, results)
