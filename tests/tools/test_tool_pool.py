"""Tools and environments run in worker processes: results, environments, faults, time limits, and the end of processes."""

import asyncio
import functools
import logging
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image
from support.tool_pools import act, add, begin, end, is_alive, run, texts

from vlmkernels.tools import pool as pool_module
from vlmkernels.tools.calls import MalformedCall, ToolCall
from vlmkernels.tools.pool import Ended, Seeds


def test_any_callable_is_a_tool_and_its_process_is_not_this_one(make_pool):
    """Closures, bound methods, partials and local classes are never pickled, and what they change is not changed here."""
    seen = []

    class Local:
        total = 0

        def grow(self, by: int):
            """Grow.

            Args:
                by: A number.
            """
            self.total += by
            return self.total

    def closure(value: str):
        """Remember a value.

        Args:
            value: A text.
        """
        seen.append(value)
        return f"{len(seen)} {os.getpid() != parent}"

    parent, local = os.getpid(), Local()
    pool = make_pool([closure, local.grow, functools.partial(add, b=2)], max_workers=1)
    begin(pool, 0, None, {})
    results = run(pool, ("closure", {"value": "a"}), ("closure", {"value": "b"}), ("grow", {"by": 3}), ("add", {"a": 4}))
    assert texts(results) == ["1 True", "2 True", "3", "6"]
    assert [result.name for result in results] == ["closure", "closure", "grow", "add"]
    assert [result.error for result in results] == [None] * 4
    assert end(pool, 0) == Ended()
    assert seen == []
    assert local.total == 0


def test_images_and_texts(make_pool):
    pool = make_pool([act])
    begin(pool, 0, None, {})
    image, many, long = run(
        pool,
        ("act", {"what": "image", "value": 700}),
        ("act", {"what": "images", "value": 3}),
        ("act", {"what": "text", "value": 1e7}),
    )
    (part,) = image.parts
    assert part["image"].size == (700, 700)
    assert part["image"].getpixel((0, 699)) == (1, 2, 3)
    assert many.error == "ToolError: result must have at most 2 images, got 3"
    assert texts([many, long]) == [
        str({"error": "result must have at most 2 images, got 3"}),
        str({"error": "result must have at most 1048576 characters, got 10000000"}),
    ]


def test_sync_calls_run_first_and_async_calls_concurrently(make_pool):
    """Results have the order of the calls."""
    order, event = [], []

    def note(name: str):
        """Note.

        Args:
            name: A name.
        """
        asyncio.run(asyncio.sleep(0))  # a sync tool can have an event loop of its own
        order.append(name)
        return ",".join(order)

    async def wait(name: str):
        """Wait for a signal.

        Args:
            name: A name.
        """
        event.append(asyncio.Event())
        order.append(name)
        await event[0].wait()
        return ",".join(order)

    async def send(name: str):
        """Send the signal.

        Args:
            name: A name.
        """
        event[0].set()
        order.append(name)
        if name == "broken":
            raise KeyError(name)
        return ",".join(order)

    pool = make_pool([note, wait, send], max_workers=1)
    begin(pool, 0, None, {})
    names = [("wait", "a"), ("note", "b"), ("send", "broken"), ("note", "c"), ("send", "d")]
    results = run(pool, *((name, {"name": value}) for name, value in names))
    assert texts(results) == ["b,c,a,broken,d", "b", str({"error": "'broken'"}), "b,c", "b,c,a,broken,d"]
    assert [result.error for result in results] == [None, None, "KeyError: 'broken'", None, None]
    assert texts(run(pool, ("send", {"name": "e"}))) == ["b,c,a,broken,d,e"]  # the event loop goes on


def test_calls_that_fail(make_pool):
    """The texts are those of TRL; a turn goes on after a failure."""
    pool = make_pool([act, add])
    begin(pool, 0, None, {})
    results = run(
        pool,
        ("act", {"what": "raise", "value": 3}),
        MalformedCall("arguments are no JSON"),
        ("getenv", {"key": "HOME"}),
        ("add", {"a": 1}),
        ("act", {"what": "sys.exit"}),
        ("act", {"what": "allocate", "value": 100}),
        ("act", {"what": "unprintable"}),
        ("act", {"what": "input"}),
        ("add", {"a": 1, "b": 2}),
    )
    messages = [
        "3",
        "arguments are no JSON",
        "Tool getenv not found.",
        "add() missing 1 required positional argument: 'b'",
        "enough",
        "MemoryError",
        "Unprintable",
        "EOF when reading a line",
    ]
    assert texts(results) == [*(str({"error": message}) for message in messages), "3"]
    names = ["KeyError: 3", messages[1], messages[2], f"TypeError: {messages[3]}", "SystemExit: enough"]
    assert [result.error for result in results[:5]] == names
    assert [result.name for result in results[:4]] == ["act", "unknown", "getenv", "add"]
    assert results[-1].error is None


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("exit", "ended with exit code 3"),
        ("segfault", "was killed by SIGSEGV"),
        ("kill", "was killed by SIGKILL"),
        ("child", "ended with exit code 3"),
    ],
)
def test_a_tool_that_ends_its_process(make_pool, what, reason):
    """Its call fails. The calls after it run in another process."""
    pool = make_pool([act], timeout=None)
    begin(pool, 0, None, {})
    done, failed, *after = run(
        pool, ("act", {"what": "pid"}), ("act", {"what": what, "value": 3}), *[("act", {"what": "pid"})] * 2
    )
    assert failed.error == f"the process of act {reason}"
    assert texts([failed]) == [str({"error": failed.error})]
    pids = [int(text) for text in texts([done, *after])]
    assert pids[0] != pids[1] == pids[2]
    assert not is_alive(pids[0])
    assert int(texts(run(pool, ("act", {"what": "pid"})))[0]) == pids[1]


def test_a_tool_that_hangs(make_pool):
    """Its process is killed after the time limit, even if it does not return to Python. Waiting costs no CPU time."""

    async def wait(seconds: float):
        """Wait.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return seconds

    def hang():
        """Hang."""
        return 9**9**9

    pool = make_pool([act, wait, hang], timeout=1.0)
    begin(pool, 0, None, {})
    start, cpu = time.monotonic(), time.process_time()
    results = run(
        pool,
        ("act", {"what": "pid"}),
        ("wait", {"seconds": 0.0}),
        ("hang", {}),
        ("wait", {"seconds": 100}),
        ("act", {"what": "sleep", "value": 0.6}),
        ("act", {"what": "sleep", "value": 0.6}),
    )
    assert time.process_time() - cpu < 0.5
    assert 3.2 < time.monotonic() - start < 15
    pid, *found = texts(results)
    assert found == [
        "0.0",
        str({"error": "hang returned no result within 1 s"}),
        str({"error": "wait returned no result within 1 s"}),
        "slept",
        "slept",
    ]
    assert [result.seconds >= 0.5 for result in results] == [False, False, True, True, True, True]
    assert not is_alive(int(pid))


def test_a_result_is_in_time_if_the_engine_is_late(make_pool):
    """A large result needs a reader to leave the worker; the time until it has one does not count."""
    pool = make_pool([act], timeout=1.0)
    begin(pool, 0, None, {})
    pool.submit(0, [ToolCall("act", {"what": "image", "value": 1500}), ToolCall("act", {"what": "pid"})])
    time.sleep(1.5)
    ((_, results),) = pool.finished(wait=True)
    assert results[0].parts[0]["image"].size == (1500, 1500)
    assert [result.error for result in results] == [None, None]


def test_turns_run_side_by_side_and_wait_for_a_worker(make_pool, tmp_path):
    """At most max_workers turns run at the same time, and each trajectory is reported once."""

    def span():
        """Return when this call ran."""
        start = time.monotonic()
        time.sleep(0.15)
        return f"{start} {time.monotonic()} {os.getpid()}"

    pool = make_pool([span], max_workers=2)
    for key in range(5):
        begin(pool, key, None, {})
        pool.submit(key, [ToolCall("span", {})])
    begin(pool, 5, None, {})
    pool.submit(5, [])
    assert pool.finished(wait=False) == [(5, [])]
    assert pool.finished(wait=False) == []
    results = {}
    while finished := pool.finished(wait=True):
        assert results.keys().isdisjoint(key for key, _ in finished)
        results |= dict(finished)
    assert results.keys() == set(range(5))
    spans = [texts(result)[0].split() for result in results.values()]
    times = [(float(start), float(end)) for start, end, _ in spans]
    running = [sum(start <= moment < end for start, end in times) for moment, _ in times]
    assert max(running) == 2
    assert len({pid for *_, pid in spans}) == 2
    pool.submit(0, [ToolCall("span", {})])
    with pytest.raises(ValueError, match="trajectory 0 must not be used while its calls run: span"):
        pool.submit(0, [])
    with pytest.raises(ValueError, match="trajectory 0 must not be used"):
        end(pool, 0)
    with pytest.raises(ValueError, match="trajectory that has begun, got 9"):
        pool.submit(9, [])
    with pytest.raises(ValueError, match="trajectory that has not ended, got 0"):
        begin(pool, 0, None, {})


# ---- environments ----

made = []


class Counter:
    """Counts, and remembers where."""

    def __init__(self):
        made.append(self)
        self.born, self.resets = os.getpid(), 0
        self.lock = lambda: None

    def reset(self, start: int = 0, say=None, prompt=None, **columns):
        self.resets += 1
        self.count, self.columns = start, columns
        if say == "raise":
            raise KeyError("no level")
        if say == "exit":
            os._exit(4)
        if say == "sleep":
            time.sleep(100)
        return say

    def step(self, by: int):
        """Count.

        Args:
            by: By what.
        """
        self.count += by
        if by < 0:
            os._exit(5)
        if by > 100:
            time.sleep(100)
        return f"{self.count}"

    @property
    def double(self):
        return 2 * self.count

    def get_reward(self):
        if self.count == 13:
            raise ValueError("no luck")
        self.count = -1
        return 0.5


class Slotted:
    __slots__ = ("__dict__", "drawn", "hidden")

    def reset(self):
        self.drawn, self.hidden, self.other = [random.random()], open(os.devnull), np.ones(2)  # noqa: SIM115

    async def draw(self):
        """Draw a number."""
        self.drawn.append(random.random())
        return self.drawn[-1]

    async def get_reward(self):
        await asyncio.sleep(0)
        return np.float32(sum(self.drawn))


def test_an_environment_lives_from_begin_to_end(make_pool):
    """It is constructed once in its worker, reset for each trajectory, and keeps its state in between."""
    made.clear()
    pool = make_pool([add], Counter)
    assert len(made) == 1  # by Tools
    rows = {key: {"start": 10 * key, "say": f"begin {key}", "level": key} for key in (1, 2)}
    observations = pool.begin([(key, None, row, None) for key, row in rows.items()])
    assert observations == ["begin 1", "begin 2"]
    for key in (1, 2):
        pool.submit(key, [ToolCall("step", {"by": 1}), ToolCall("add", {"a": 1, "b": 2}), ToolCall("step", {"by": key})])
    results = {}
    while finished := pool.finished(wait=True):
        results |= {key: texts(found) for key, found in finished}
    assert results == {1: ["11", "3", "12"], 2: ["21", "3", "23"]}
    one, two = pool.end([1, 2])
    assert (one.reward, one.lost) == (0.5, None)
    state = one.state
    assert type(state).__name__ == "Counter"
    assert isinstance(state, Counter)
    assert (state.count, state.double, state.resets, state.columns) == (12, 24, 1, {"level": 1})  # before get_reward
    assert len({state.born, two.state.born, os.getpid()}) == 3
    with pytest.raises(AttributeError, match=r"Counter\.lock stayed in the process of the environment: .*lambda"):
        _ = state.lock
    with pytest.raises(AttributeError, match="'Counter' object has no attribute 'missing'"):
        _ = state.missing
    assert begin(pool, 3, None, {}) is None
    assert end(pool, 3).state.resets == 2  # reused
    assert len(made) == 1


def test_states_of_local_classes_and_slots(make_pool):
    class Local(Slotted):
        pass

    pool = make_pool((), {"slots": Slotted, "local": Local})
    pool.begin([(key, name, {"environment": name}, Seeds("7", "7")) for key, name in enumerate(("slots", "local"))])
    texts(run(pool, ("draw", {}), ("draw", {})))
    slots, local = pool.end([0, 1])
    assert len(slots.state.drawn) == 3
    assert slots.reward == pytest.approx(sum(slots.state.drawn), rel=1e-6)
    assert isinstance(slots.reward, float)
    assert np.array_equal(slots.state.other, np.ones(2))
    with pytest.raises(AttributeError, match=r"Slotted.hidden stayed .*TextIOWrapper"):
        _ = slots.state.hidden
    assert isinstance(local.state, Local)
    assert local.state.drawn == slots.state.drawn[:1]


@pytest.mark.parametrize(
    ("by", "reason"),
    [(-1, "the process of step ended with exit code 5"), (101, "step returned no result within 1 s")],
)
def test_a_lost_environment(make_pool, caplog, by, reason):
    """The rest of its trajectory gets errors, others go on, and there is neither state nor reward."""
    pool = make_pool([add], Counter, timeout=1.0)
    pool.begin([(key, None, {}, None) for key in (0, 1)])
    results = run(pool, ("step", {"by": 1}), ("step", {"by": by}), ("step", {"by": 1}), ("add", {"a": 1, "b": 1}))
    lost = f"The environment of this conversation was lost: {reason}"
    assert texts(results) == ["1", *(str({"error": text}) for text in (reason, lost, lost))]
    assert texts(run(pool, ("step", {"by": 1}))) == [str({"error": lost})]
    assert f"trajectory 0 has lost its environment: {reason}" in caplog.text
    assert texts(run(pool, ("step", {"by": 1}), key=1)) == ["1"]
    ended, other = pool.end([0, 1])
    assert ended == Ended(None, None, lost)
    assert other.state.count == 1
    begin(pool, 0, None, {})
    assert texts(run(pool, ("step", {"by": 2}))) == ["2"]


def test_an_environment_that_is_lost_while_its_turn_waits(make_pool):
    pool = make_pool([act], Counter, max_workers=1)
    pool.begin([(key, None, {}, None) for key in (0, 1)])
    (pid,) = texts(run(pool, ("act", {"what": "pid"}), key=1))
    pool.submit(0, [ToolCall("act", {"what": "sleep", "value": 0.5})])
    pool.submit(1, [ToolCall("step", {"by": 1})])
    os.kill(int(pid), signal.SIGKILL)
    results = dict(pool.finished(wait=True))
    results |= dict(pool.finished(wait=True))
    lost = "The environment of this conversation was lost: the process of the environment was killed by SIGKILL"
    assert texts(results[0]) == ["slept"]
    assert texts(results[1]) == [str({"error": lost})]
    assert results[1][0].seconds == 0
    assert end(pool, 1).lost == lost


def test_observations(make_pool):
    pool = make_pool((), Counter)
    image = Image.new("RGB", (3, 2))
    content = begin(pool, 0, None, {"say": [image, "text"]})
    assert [part["type"] for part in content] == ["image", "text"]
    assert content[0]["image"].size == (3, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"say": "raise"}, r"(?s)the environment could not be reset: Traceback.*KeyError: 'no level'"),
        ({"say": "exit"}, "the process of reset ended with exit code 4"),
        ({"say": "sleep"}, "reset returned no result within 1 s"),
        ({"say": 3}, "reset must return None, a string or a list of content blocks, got 3"),
        ({"say": "\ud800"}, "must be valid Unicode"),
        ({"begin": lambda: None}, "TypeError: the arguments must be picklable: .*lambda"),
    ],
)
def test_a_reset_that_fails(make_pool, row, message):
    """It raises, and the pool can be used after clear()."""
    pool = make_pool((), Counter, timeout=1.0)
    with pytest.raises(RuntimeError, match=message):
        begin(pool, 0, None, row)
    pool.clear()
    assert begin(pool, 0, None, {"say": "ok"}) == "ok"


def test_a_reward_that_fails(make_pool):
    pool = make_pool((), Counter)
    begin(pool, 0, None, {"start": 13})
    with pytest.raises(RuntimeError, match=r"(?s)the environment could not end: Traceback.*ValueError: no luck"):
        end(pool, 0)


# ---- randomness ----


def test_seeds(make_pool):
    """A seed gives the same numbers in any worker, each turn has its own, and without a seed all differ."""
    pool = make_pool([act])
    for key, seed in enumerate([5, 5, 6, None, None]):
        begin(pool, key, None, {}, seed)
        pool.submit(key, [ToolCall("act", {"what": "random"})])
    found = {}
    while len(found) < 5:
        found |= {key: texts(results)[0] for key, results in pool.finished(wait=True)}
    assert found[0] == found[1]
    assert len(set(found.values())) == 4
    second = [texts(run(pool, ("act", {"what": "random"}), key=key))[0] for key in (0, 1)]
    assert second[0] == second[1] != found[0]


def test_the_seed_of_an_environment(make_pool):
    """A new and a reused environment draw the same numbers."""
    pool = make_pool((), Slotted)
    drawn = []
    for seed in (3, 4, 3):
        begin(pool, 0, None, {}, seed)
        run(pool, ("draw", {}), ("draw", {}))
        drawn.append(end(pool, 0).state.drawn)
    assert drawn[0] == drawn[2] != drawn[1]
    assert len({*drawn[0], *drawn[1]}) == 6


def test_a_group_shares_the_seed_of_reset(make_pool):
    """The calls have seeds of their own."""
    pool = make_pool((), Slotted)
    drawn = []
    for calls in ("a", "b"):
        begin(pool, 0, None, {}, Seeds("group", calls))
        run(pool, ("draw", {}), ("draw", {}))
        drawn.append(end(pool, 0).state.drawn)
    (of_reset, *first), (of_other_reset, *second) = drawn
    assert of_reset == of_other_reset
    assert len({*first, *second}) == 4


def test_long_calls_are_logged(make_pool, monkeypatch, caplog):
    monkeypatch.setattr(pool_module, "WARN_AFTER_S", 0.1)
    pool = make_pool([act], timeout=None)
    begin(pool, 3, None, {})
    with caplog.at_level(logging.WARNING):
        run(pool, ("act", {"what": "sleep", "value": 0.5}), key=3)
    messages = [record.message for record in caplog.records]
    assert messages[-3:] == ["act of trajectory 3 has run for 0 s"] * 3  # after 0.1, 0.2 and 0.4 s
    assert len(messages) <= 5  # and perhaps while the worker started
