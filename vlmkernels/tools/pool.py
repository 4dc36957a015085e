"""Runs the tool calls and environments of trajectories in worker processes, side by side, while the engine samples."""

import logging
import math
import os
import pickle
import selectors
import signal
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vlmkernels.data.images import ImageLimits
from vlmkernels.tools.calls import MalformedCall, ToolCall
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.results import Part, error_parts
from vlmkernels.tools.session import Done, End, Request, Reset, Session, Started, Turn, restored
from vlmkernels.tools.workers import Template, Worker

logger = logging.getLogger(__name__)

WARN_AFTER_S = 60.0  # a call that takes this long is logged, and again after each doubling
UNKNOWN = "unknown"  # the name of the tool in the result of a call without one


@dataclass(frozen=True)
class ToolResult:
    """The result of a call.

    Args:
        name: the tool.
        parts: the content of its message, see ``content_parts``; after an error, the text ``{"error": ...}``.
        error: the reason if the call failed, otherwise None.
        seconds: how long the call ran.
    """

    name: str
    parts: list[Part]
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Ended:
    """The outcome of a trajectory.

    Args:
        state: an object with the attributes of the environment, see ``restored``; None without an environment.
        reward: what its ``get_reward`` returned, otherwise None.
        lost: why the environment was lost, otherwise None. A lost environment has neither state nor reward.
    """

    state: Any = None
    reward: float | None = None
    lost: str | None = None


class Seeds(NamedTuple):
    """Seeds of random numbers: those of ``reset``, which a group shares so that it has one task, and those of the calls."""

    reset: str
    calls: str


@dataclass
class _Trajectory:
    environment: str | None
    seeds: Seeds | None
    worker: "_PoolWorker | None" = None
    lost: str | None = None
    turn: int = 0
    task: "_Task | None" = None


@dataclass(eq=False)
class _Task:
    """A request for a worker, and what has become of its calls."""

    key: int
    names: list[str]
    results: list[Done | None]
    request: Request
    running: set[int] = field(default_factory=set)
    since: float = 0.0
    warn_after: float = 0.0

    def start(self, indices: Iterable[int]) -> None:
        self.running, self.since, self.warn_after = set(indices), time.monotonic(), WARN_AFTER_S

    def missing(self) -> list[int]:
        return [index for index, result in enumerate(self.results) if result is None]

    def running_names(self) -> str:
        return ", ".join(dict.fromkeys(self.names[index] for index in sorted(self.running)))


@dataclass(eq=False)
class _PoolWorker:
    """A worker, the name of the environment that it constructs, and the trajectory that holds it."""

    process: Worker
    environment: str | None
    owner: int | None = None
    task: _Task | None = None


class ToolPool:
    """Runs tools and environments in worker processes. A pool is used from one thread.

    The pool is a fork of this process, and keeps the memory that this process has at construction, also after it is freed here.
    So it is best made before a model is loaded. After an exception or KeyboardInterrupt, ``clear`` makes it usable again.

    A trajectory with an environment holds a worker from ``begin`` to ``end``; an environment is constructed once and reset for
    each trajectory. A turn of a trajectory without an environment takes any free worker, so that what a tool keeps in variables
    is seen by some later calls only. Calls of one turn run in their order, except that async ones run last and concurrently.

    Args:
        timeout: time limit of one call, of ``reset``, of the construction of an environment and of ``get_reward``, in seconds.
            The worker of a call that takes longer is killed. None: no limit; long calls are logged.
        max_images: maximum number of images in one result.
        limits: limits of each image.
        max_workers: how many turns, resets and rewards run at the same time. The others wait.

    Raises:
        ValueError: a number is not positive.
        NotImplementedError: the system has no ``os.fork``.
    """

    def __init__(self, tools: Tools, *, timeout: float | None, max_images: int, limits: ImageLimits, max_workers: int = 32):
        for name, value in (("timeout", timeout), ("max_workers", max_workers)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if max_images < 0:
            raise ValueError(f"max_images must be >= 0, got {max_images}")
        self._tools, self._timeout, self._max_workers = tools, timeout, max_workers
        self._template = Template(lambda connection: Session(tools, limits, max_images, connection).serve())
        self._selector = selectors.DefaultSelector()
        self._workers: list[_PoolWorker] = []
        self._trajectories: dict[int, _Trajectory] = {}
        self._queue: deque[_Task] = deque()
        self._finished: list[tuple[int, list[ToolResult]]] = []

    def begin(
        self, trajectories: Iterable[tuple[int, str | None, dict[str, Any], Seeds | None]]
    ) -> list[str | list[Part] | None]:
        """Begin trajectories and reset their environments side by side.

        Args:
            trajectories: for each trajectory, a new key, the name of its environment, the row of the dataset, whose columns
                are the arguments of ``reset``, and the seeds of the random numbers of its tools, or None.

        Returns:
            For each trajectory, the observation that ``reset`` returned: None, a text or content parts.

        Raises:
            ValueError: a key is in use.
            RuntimeError: ``reset`` or the constructor raised an error, took too long or ended their process.
        """
        keys, tasks = [], {}
        for key, environment, row, seeds in trajectories:
            if key in self._trajectories:
                raise ValueError(f"key must not be that of a trajectory that has not ended, got {key}")
            self._trajectories[key] = _Trajectory(environment, seeds)
            keys.append(key)
            if self._tools.environments:
                hidden = {"environment"} if self._tools.multi_environment else set()
                own = (None, None) if seeds is None else (f"{seeds.reset} reset", f"{seeds.calls} calls")
                request = Reset(environment, {k: v for k, v in row.items() if k not in hidden}, *own)
                tasks[key] = self._add(_Task(key, ["reset"], [None], request))
        done = self._results(tasks)
        for key, result in done.items():
            if result.error is not None:
                raise RuntimeError(f"{self._label(key)} could not be reset: {result.error}")
        return [done[key].value if key in done else None for key in keys]

    def submit(self, key: int, calls: Sequence[ToolCall | MalformedCall]) -> None:
        """Start the calls of a turn, without waiting for them.

        Args:
            key: a trajectory that has begun and runs no calls.
            calls: the calls. A malformed call fails with its reason.

        Raises:
            ValueError: the trajectory has not begun, or runs calls.
        """
        trajectory = self._idle(key)
        names = set(self._tools.names(trajectory.environment))
        valid, results = [], list[Done | None]()
        for index, call in enumerate(calls):
            if isinstance(call, MalformedCall):
                reason: str | None = str(call)
            elif call.name not in names:
                reason = f"Tool {call.name} not found."
            else:
                reason = trajectory.lost
                valid.append((index, call.name, call.arguments))
            results.append(None if reason is None else Done(index, reason, reason, 0.0))
        is_seeded = trajectory.seeds is not None and not self._tools.environments  # with them, reset has seeded the calls
        seed = f"{trajectory.seeds.calls} turn {trajectory.turn}" if is_seeded else None
        trajectory.turn += 1
        self._add(_Task(key, [call.name or UNKNOWN for call in calls], results, Turn(valid, seed)))
        self._advance(wait=False)

    def finished(self, wait: bool) -> list[tuple[int, list[ToolResult]]]:
        """Return the trajectories whose calls have all ended, with the results in the order of the calls.

        Time limits and waiting turns depend on this call, so an engine should call it often.

        Args:
            wait: whether to wait until there is at least one, unless no calls run.
        """
        self._advance(wait=False)
        while wait and not self._finished and (self._queue or self._tasks()):
            self._advance(wait=True)
        finished, self._finished = self._finished, []
        return finished

    def end(self, keys: Sequence[int]) -> list[Ended]:
        """End trajectories: collect the states and rewards of their environments side by side, and free their workers.

        Raises:
            ValueError: a trajectory has not begun, or runs calls.
            RuntimeError: ``get_reward`` raised an error.
        """
        tasks = {}
        for key in keys:
            if self._idle(key).worker is not None:
                tasks[key] = self._add(_Task(key, ["get_reward"], [None], End()))
        done = self._results(tasks)
        ended = []
        for key in keys:
            trajectory = self._trajectories[key]
            if trajectory.lost is not None or key not in done:
                ended.append(Ended(lost=trajectory.lost))
            elif done[key].error is not None:
                raise RuntimeError(f"{self._label(key)} could not end: {done[key].error}")
            else:
                attributes, reward = done[key].value
                ended.append(Ended(restored(attributes, self._tools.environment_class(trajectory.environment)), reward))
        for key in keys:
            if (worker := self._trajectories.pop(key).worker) is not None:
                worker.owner = None
        return ended

    def clear(self) -> None:
        """Drop all trajectories. Workers that run calls are killed."""
        self._trajectories.clear()
        self._queue.clear()
        self._finished.clear()
        for worker in list(self._workers):
            worker.owner = None
            if worker.task is not None:
                worker.task = None
                self._lose(worker)

    def close(self) -> None:
        """End all processes. The pool cannot be used any more. Does nothing in a process that was forked from this one."""
        if os.getpid() != self._template.owner:
            return
        self._template.close()
        self.clear()
        for worker in list(self._workers):
            self._lose(worker)

    # ---- tasks and workers ----

    def _idle(self, key: int) -> _Trajectory:
        if key not in self._trajectories:
            raise ValueError(f"key must be that of a trajectory that has begun, got {key}")
        trajectory = self._trajectories[key]
        if trajectory.task is not None:
            raise ValueError(f"trajectory {key} must not be used while its calls run: {', '.join(trajectory.task.names)}")
        return trajectory

    def _label(self, key: int) -> str:
        name = self._trajectories[key].environment
        return "the environment" if name is None else f"the environment {name!r}"

    def _add(self, task: _Task) -> _Task:
        self._trajectories[task.key].task = task
        self._queue_or_complete(task)
        return task

    def _queue_or_complete(self, task: _Task) -> None:
        if task.missing():
            self._queue.append(task)
            return
        self._trajectories[task.key].task = None
        if isinstance(task.request, Turn):
            results = [done for done in task.results if done is not None]
            self._finished.append((task.key, [_tool_result(*item) for item in zip(task.names, results, strict=True)]))

    def _results(self, tasks: dict[int, _Task]) -> dict[int, Done]:
        """Wait for tasks of one call and return their results."""
        self._advance(wait=False)
        while any(None in task.results for task in tasks.values()):
            self._advance(wait=True)
        return {key: task.results[0] for key, task in tasks.items() if task.results[0] is not None}

    def _advance(self, wait: bool) -> None:
        """Read events, kill workers that exceed the time limit and start waiting tasks.

        Args:
            wait: whether to wait for an event or a time limit if any task runs.
        """
        timeout = self._until_next_limit() if wait else 0.0
        while ready := self._selector.select(timeout):
            for key, _ in ready:
                self._read(key.data)
            timeout = 0.0
        self._check_limits()
        self._dispatch()

    def _dispatch(self) -> None:
        running = sum(worker.task is not None for worker in self._workers)
        while self._queue and running < self._max_workers:
            self._run(self._queue.popleft())
            running += 1

    def _run(self, task: _Task) -> None:
        trajectory = self._trajectories[task.key]
        if trajectory.lost is not None:  # while the task was in the queue
            self._fail(task, task.missing(), trajectory.lost)
            self._queue_or_complete(task)
            return
        worker = trajectory.worker or self._free_worker(trajectory.environment)
        if self._tools.environments:
            trajectory.worker, worker.owner = worker, task.key
        worker.task, request, missing = task, task.request, task.missing()
        task.start(missing)
        if isinstance(request, Turn):
            request = replace(request, calls=[call for call in request.calls if call[0] in missing])
        try:
            worker.process.send(request)
        except OSError:
            self._lose(worker)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            worker.task = None
            self._fail(task, missing, f"TypeError: the arguments must be picklable: {error}")
            self._queue_or_complete(task)

    def _free_worker(self, environment: str | None) -> _PoolWorker:
        for worker in self._workers:
            if worker.task is None and worker.owner is None and worker.environment == environment:
                return worker
        worker = _PoolWorker(self._template.start(), environment)
        self._selector.register(worker.process.socket, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _read(self, worker: _PoolWorker) -> None:
        try:
            events = worker.process.receive()
        except EOFError:
            self._lose(worker)
            return
        for event in events:
            if (task := worker.task) is None:
                continue
            if isinstance(event, Started):
                task.start(event.indices)
            else:
                task.running.discard(event.index)
                task.results[event.index] = event
                if not task.missing():
                    worker.task = None
                    self._queue_or_complete(task)

    def _fail(self, task: _Task, indices: Iterable[int], reason: str) -> None:
        for index in indices:
            seconds = time.monotonic() - task.since if index in task.running else 0.0
            task.results[index] = Done(index, reason, reason, seconds)

    def _lose(self, worker: _PoolWorker, reason: str | None = None) -> None:
        """Remove a worker that has ended, or kill it for a reason. Calls that had not started run in another worker."""
        self._workers.remove(worker)
        self._selector.unregister(worker.process.socket)
        code = self._template.stop(worker.process)
        task, trajectory = worker.task, self._trajectories.get(-1 if worker.owner is None else worker.owner)
        if reason is None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            reason = f"the process of {task.running_names() if task and task.running else 'the environment'} {how}"
        if task is not None:
            self._fail(task, task.running, reason)
        if trajectory is not None:
            trajectory.worker, trajectory.lost = None, f"The environment of this conversation was lost: {reason}"
            logger.warning("trajectory %d has lost its environment: %s", worker.owner, reason)
            if task is not None:
                self._fail(task, task.missing(), trajectory.lost)
        if task is not None:
            self._queue_or_complete(task)

    # ---- time limits ----

    def _tasks(self) -> list[tuple[_PoolWorker, _Task]]:
        return [(worker, worker.task) for worker in self._workers if worker.task is not None]

    def _until_next_limit(self) -> float | None:
        """Return the seconds until a task exceeds its time limit or is to be logged; 0 if no task runs."""
        limits = [task.since + min(task.warn_after, self._timeout or math.inf) for _, task in self._tasks()]
        return max(0.0, min(limits) - time.monotonic()) if limits else 0.0

    def _check_limits(self) -> None:
        now = time.monotonic()
        for worker, task in self._tasks():
            seconds = now - task.since
            if self._timeout is not None and seconds >= self._timeout and not worker.process.is_sending:
                self._lose(worker, f"{task.running_names()} returned no result within {self._timeout:g} s")
            elif seconds >= task.warn_after:
                task.warn_after *= 2
                logger.warning("%s of trajectory %d has run for %.0f s", task.running_names(), task.key, seconds)


def _tool_result(name: str, done: Done) -> ToolResult:
    if done.error is None:
        return ToolResult(name, done.value, None, done.seconds)
    return ToolResult(name, error_parts(done.value), done.error, done.seconds)
