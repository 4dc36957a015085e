"""A clock that divides the time of a run among phases without synchronizing the device."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from vlmkernels.record.metrics import PHASES

UNDIVIDED = ("evaluate",)  # time in a nested phase counts for these phases instead
MAX_MARKS = 1000  # read finished intervals when there are more, in case metrics are never logged


class _Clock:
    """A clock of the host: takes marks in time and measures the seconds between two marks."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass


class _CudaClock(_Clock):
    """A clock whose marks are CUDA events on the current stream; recording an event does not synchronize."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


class Phases(TrainerCallback):
    """Divides the time since training began among ``PHASES``, so that the phases add up to it.

        with phases("reward"): ...

    A nested phase is subtracted from the phase around it. On a GPU a phase lasts until the device has finished its work, not
    only until the work is launched: the marks between phases are CUDA events, which are read after they have passed. Only
    ``flush`` waits for one, when ``Trainer`` has just waited for the loss. On other devices the marks are host times.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = _CudaClock() if device.type == "cuda" else _Clock()
        self._start()

    def _start(self) -> None:
        self._stack = ["other"]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks = [("other", self._clock.mark())]  # the name and the beginning of each phase
        self._steps = 0

    def _switch(self, name: str) -> None:
        self._marks.append((name, self._clock.mark()))
        if len(self._marks) > MAX_MARKS:
            self._read()

    def _read(self) -> None:
        """Add the intervals that have ended to the seconds of their phases."""
        num_read = 0
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if not self._clock.passed(end):
                break
            self._seconds[name] += self._clock.seconds(start, end)
            num_read += 1
        del self._marks[:num_read]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside the context for the phase ``name``."""
        if self._stack[-1] in UNDIVIDED:
            yield
            return
        self._stack.append(name)
        self._switch(name)
        try:
            yield
        finally:
            self._stack.pop()
            self._switch(self._stack[-1])

    def between_steps(self, name: str) -> None:
        """Count time outside all contexts for ``name`` until the optimizer step ends."""
        self._stack[0] = name
        if len(self._stack) == 1:
            self._switch(name)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._steps += 1
        self.between_steps("other")

    def flush(self) -> tuple[dict[str, float], int]:
        """Return the seconds of each phase and the number of optimizer steps since the last call. Waits for the device."""
        self._switch(self._stack[-1])
        self._clock.wait(self._marks[-1][1])
        self._read()
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return seconds, steps


def phase(name: str) -> Callable[[Callable], Callable]:
    """Decorate a method of an object with a ``phases`` attribute: its time counts for the phase ``name``."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(self, *args, **kwargs):
            with self.phases(name):
                return function(self, *args, **kwargs)

        return timed

    return decorate
