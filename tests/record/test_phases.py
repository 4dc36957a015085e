"""The division of time among phases, with a clock whose ticks the test controls."""

import math

import pytest
import torch

from vlmkernels.record import phases
from vlmkernels.record.phases import Phases


class Ticks(phases._Clock):
    """A clock whose marks a device has passed up to the tick ``done``."""

    def __init__(self):
        self.now, self.done, self.waits = 0, math.inf, 0

    def mark(self):
        return self.now

    def passed(self, mark):
        return mark <= self.done

    def wait(self, mark):
        self.waits += 1
        self.done = max(self.done, mark)


@pytest.fixture
def clock(monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(phases, "_Clock", lambda: ticks)
    return ticks


def test_phases_add_up(clock):
    """Nested phases are subtracted, except inside an evaluation, and a step ends in the optimizer phase."""
    timer = Phases(torch.device("cpu"))

    def spend(ticks, name=None):
        if name is None:
            clock.now += ticks
        else:
            with timer(name):
                clock.now += ticks

    spend(1)
    with timer("backward"):
        spend(2)
        spend(4, "forward")
        spend(8)
    timer.between_steps("optimizer")
    spend(16)
    timer.on_step_end(None, None, None)
    spend(32)
    with timer("evaluate"):
        spend(64, "generate")
    with pytest.raises(TypeError):
        spend("an error", "save")
    spend(128, "save")
    spend(256)
    seconds, steps = timer.flush()
    expected = {"other": 1 + 32 + 256, "backward": 2 + 8, "forward": 4, "optimizer": 16, "evaluate": 64, "save": 128}
    assert {name: value for name, value in seconds.items() if value} == expected
    assert (sum(seconds.values()), steps) == (clock.now, 1)
    spend(5, "log")
    assert {name: value for name, value in timer.flush()[0].items() if value} == {"log": 5}


def test_only_a_flush_waits_for_the_device(clock):
    timer, clock.done = Phases(torch.device("cpu")), 100
    for _ in range(3000):
        with timer("forward"):
            clock.now += 1
    assert clock.waits == 0
    assert timer.flush()[0]["forward"] == 3000
    assert clock.waits == 1
    clock.done = math.inf
    for _ in range(3000):
        with timer("forward"):
            clock.now += 1
    assert len(timer._marks) < 2000  # marks are read once they have passed, even without a flush
    assert (timer.flush()[0]["forward"], clock.waits) == (3000, 2)


@pytest.mark.gpu
def test_phases_of_a_gpu():
    timer = Phases(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    with timer("forward"):
        for _ in range(50):
            x @ x
    with timer("backward"):
        pass
    seconds, _ = timer.flush()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        x @ x
    end.record()
    end.synchronize()
    assert seconds["forward"] > 0.2 * start.elapsed_time(end) / 1e3  # the time of the device, not of the launches
    assert seconds["backward"] < seconds["forward"]
