"""The processes of tools: what they inherit, how they end, and what they send."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tool_pools import act, begin, end, eventually, is_alive, pids_of, run, texts

from vlmkernels.data.images import ImageLimits
from vlmkernels.tools import session
from vlmkernels.tools.calls import ToolCall
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.pool import ToolPool


def test_the_process_of_a_tool(make_pool, capfd):
    """It has one thread, no GPU, no stdin, a process group of its own, and prints to stderr."""
    threads = torch.get_num_threads()
    torch.ones(500, 500) @ torch.ones(500, 500)
    pool = make_pool([act])
    begin(pool, 0, None, {})
    whats = ["threads", "cuda", "group", "print"]
    assert texts(run(pool, *(("act", {"what": what}) for what in whats))) == [f"(1, {300.0**3})", "False", "True", "None"]
    assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "printed\n")


def test_close_ends_all_processes(make_pool):
    pool = make_pool([act])
    for key in range(3):
        begin(pool, key, None, {})
    pids = pids_of(pool, 0, 1)
    pool.submit(2, [ToolCall("act", {"what": "sleep", "value": 100})])
    assert all(map(is_alive, pids))
    pool.close()
    assert not any(map(is_alive, pids))
    pool.close()
    begin(pool, 0, None, {})
    with pytest.raises(RuntimeError, match="the process that starts the workers of tools has ended"):
        pool.submit(0, [ToolCall("act", {"what": "pid"})])
    assert pool.finished(wait=True) == []


def test_a_pool_without_references_ends(make_pool):
    pool = ToolPool(Tools([act]), timeout=None, max_images=1, limits=ImageLimits())
    begin(pool, 0, None, {})
    (pid,) = pids_of(pool, 0)
    del pool
    assert not is_alive(pid)


def test_forked_processes_do_not_end_the_pool(make_pool):
    pool = make_pool([act])
    begin(pool, 0, None, {})
    (pid,) = pids_of(pool, 0)
    child = os.fork()
    if not child:
        pool.close()
        del pool
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pids_of(pool, 0) == [pid]


def test_an_interrupt_leaves_a_usable_pool(make_pool):
    pool = make_pool([act])
    pool.begin([(key, None, {}, None) for key in range(2)])
    (pid,) = pids_of(pool, 0)
    pool.submit(0, [ToolCall("act", {"what": "sleep", "value": 100})])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.finished(wait=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    pool.clear()
    assert not is_alive(pid)
    assert pool.finished(wait=True) == []
    begin(pool, 0, None, {})
    assert pids_of(pool, 0) != [pid]


def test_signals_are_for_the_trainer(make_pool):
    """Ctrl-C and SIGTERM, which reach all processes of a job, end neither template nor workers, but the children of tools."""
    pool = make_pool([act])
    begin(pool, 0, None, {})
    pids = [int(text) for text in texts(run(pool, ("act", {"what": "pid"}), ("act", {"what": "template"})))]
    pool.submit(0, [ToolCall("act", {"what": "sleep", "value": 0.3})])
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    ((_, slept),) = pool.finished(wait=True)
    assert texts(slept) == ["slept"]
    assert texts(run(pool, ("act", {"what": "pid"}), ("act", {"what": "terminate"}))) == [str(pids[0]), str(-signal.SIGTERM)]


def test_a_killed_template(make_pool):
    pool = make_pool([act])
    begin(pool, 0, None, {})
    worker, template = (int(text) for text in texts(run(pool, ("act", {"what": "pid"}), ("act", {"what": "template"}))))
    os.kill(template, signal.SIGKILL)
    eventually(lambda: not is_alive(worker))
    with pytest.raises(RuntimeError, match="the process that starts the workers of tools has ended"):
        run(pool, ("act", {"what": "pid"}))


def test_a_pool_of_a_thread(make_pool):
    """It outlives the thread."""
    with ThreadPoolExecutor(1) as executor:
        pool = executor.submit(make_pool, [act]).result()
    begin(pool, 0, None, {})
    assert texts(run(pool, ("act", {"what": "group"}))) == ["True"]


def train(file):
    """A process that is killed while a tool hangs."""

    def hang():
        """Hang."""
        child = subprocess.Popen(["sleep", "1000"])
        os.write(file, f"{os.getppid()} {os.getpid()} {child.pid}\n".encode())
        return 9**9**9

    pool = ToolPool(Tools([hang]), timeout=None, max_images=1, limits=ImageLimits())
    holder = os.fork()
    if not holder:  # as a worker of a DataLoader: it holds a copy of the sockets
        time.sleep(30)
        os._exit(0)
    os.write(file, f"{holder}\n".encode())
    begin(pool, 0, None, {})
    pool.submit(0, [ToolCall("hang", {})])
    pool.finished(wait=True)


def test_workers_end_if_the_trainer_is_killed():
    """Also a worker in a call that does not return, and what it has started."""
    reader, writer = os.pipe()
    trainer = os.fork()
    if not trainer:
        try:
            train(writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        holder, pids = int(file.readline()), list(map(int, file.readline().split()))
    assert len(pids) == 3
    assert all(map(is_alive, pids))
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    eventually(lambda: not any(map(is_alive, pids)))
    os.kill(holder, signal.SIGKILL)


class Large:
    def __getattr__(self, name):
        if name.startswith("any_"):
            return name
        raise AttributeError(name)

    def reset(self):
        self.small, self.large = b"1" * 10, b"1" * 1000

    def look(self):
        """Look."""


class Other(Large):
    pass


def test_a_large_attribute_stays(make_pool, monkeypatch):
    monkeypatch.setattr(session, "MAX_ATTRIBUTE", 100)
    pool = make_pool((), Large)
    begin(pool, 0, None, {})
    state = end(pool, 0).state
    assert (state.small, state.any_name) == (b"1" * 10, "any_name")
    with pytest.raises(AttributeError, match=r"Large.large stayed .*: it has 10\d\d bytes, more than 100"):
        _ = state.large
    with pytest.raises(AttributeError, match="nothing"):
        _ = state.nothing


def test_a_factory_of_two_classes(make_pool):
    """The state has the class only if it is that of the instance that Tools has created."""
    kinds = [Large, Other]
    pool = make_pool((), lambda: kinds.pop(0)())
    begin(pool, 0, None, {})
    state = end(pool, 0).state
    assert type(state) is session.EnvironmentState
    assert vars(state) == {"small": b"1" * 10, "large": b"1" * 1000}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"max_workers": 0}, "max_workers must be positive, got 0"),
        ({"max_images": -1}, "max_images must be >= 0, got -1"),
    ],
)
def test_options(make_pool, options, message):
    with pytest.raises(ValueError, match=message):
        make_pool([act], **options)
