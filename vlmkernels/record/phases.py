"""Where the time of a run goes, without making the device wait."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from vlmkernels.record.metrics import PHASES

WHOLE = ("evaluate",)  # phases inside of these are theirs


class _Clock:
    """Marks in time, and the seconds between two: of the host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass


class _CudaClock(_Clock):
    """CUDA events on the current stream: recording one waits for nothing."""

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
    """Divides the time since training began among ``PHASES``, so that they add up to it; a phase within another counts alone.

    On a GPU the marks between phases are CUDA events, so that a phase lasts until the GPU is done with it, not until it has
    been launched; they are read once they have passed, and waited for in ``take`` alone, when ``Trainer`` has just waited for
    the loss to log it. Elsewhere they are times of the host.

        with phases("reward"): ...
    """

    def __init__(self, device: torch.device):
        self._clock = _CudaClock() if device.type == "cuda" else _Clock()
        self._start()

    def _start(self) -> None:
        self._stack = ["other"]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks = [("other", self._clock.mark())]  # each phase with its beginning
        self._steps = 0

    def _switch(self, name: str) -> None:
        self._marks.append((name, self._clock.mark()))
        if len(self._marks) > 1000:  # without logs nobody takes them
            self._read()

    def _read(self) -> None:
        """Add up the intervals that have ended."""
        done = 0
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if not self._clock.passed(end):
                break
            self._seconds[name] += self._clock.seconds(start, end)
            done += 1
        del self._marks[:done]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._stack[-1] in WHOLE:
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
        """The time outside of all contexts belongs to ``name`` until the optimiser's step is over."""
        self._stack[0] = name
        if len(self._stack) == 1:
            self._switch(name)

    def on_train_begin(self, args, state, control, **kwargs):
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        self.between_steps("other")

    def take(self) -> tuple[dict[str, float], int]:
        """Seconds of each phase, and optimiser steps, since the last call. Waits for the device."""
        self._switch(self._stack[-1])
        self._clock.wait(self._marks[-1][1])
        self._read()
        taken = self._seconds, self._steps
        self._seconds, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return taken


def phase(name: str) -> Callable[[Callable], Callable]:
    """For methods of an object with ``phases``: their time is that of the phase ``name``."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(self, *args, **kwargs):
            with self.phases(name):
                return function(self, *args, **kwargs)

        return timed

    return decorate
