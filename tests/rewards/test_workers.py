"""Calls with a time limit, in threads and in processes."""

import copy
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.remote import act

from vlmkernels.rewards import workers
from vlmkernels.rewards.workers import ProcessWorker, ThreadWorker

PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_process():
    """It returns results and errors, survives prints, and starts again after it was killed or has ended."""
    worker = ProcessWorker(act, ("action", "value"))

    def call(action, value=None, timeout=60.0):
        return worker.call({"action": action, "value": value, "images": object()}, timeout)

    assert call("print", [1.0, None]) == [1.0, None]
    assert call("formula") == [[1], True]
    assert call("iterator", (1, 2)) == [1, 2]
    assert repr(call("raise", 3)) == "KeyError(3)"
    assert "cannot be sent to another process" in str(call("unsendable"))
    error = call("return", lambda: 1)
    assert isinstance(error, TypeError)
    assert str(error).startswith("action, value must be picklable with a timeout: ")

    first = worker._process
    start = time.monotonic()
    error = call("tower", 9, timeout=0.5)
    assert isinstance(error, TimeoutError)
    assert str(error) == "no result within 0.5 s"
    assert time.monotonic() - start < 10
    assert first.returncode == -9
    assert worker._process is None
    other = copy.deepcopy(worker)
    assert str(other.call({"action": "end", "value": 3}, 60)) == "the process of the reward ended with exit code 3"


def test_threads_and_forks_share_a_worker():
    """Replies reach the thread that made the call, and a forked process starts a process of its own."""
    worker = ProcessWorker(act, ("action", "value"))
    with ThreadPoolExecutor(4) as pool:
        calls = pool.map(lambda value: worker.call({"action": "return", "value": value}, 60), range(20))
        assert list(calls) == list(range(20))
    process = worker._process
    child = os.fork()
    if not child:
        right = worker.call({"action": "return", "value": 5}, 60) == 5 and worker._process is not process
        worker.stop()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.call({"action": "return", "value": 6}, 60) == 6
    assert worker._process is process


def test_a_killed_parent_leaves_no_busy_process():
    code = (
        "from support.remote import act; from vlmkernels.rewards import workers; workers.GRACE_S = 0.5\n"
        "worker = workers.ProcessWorker(act, ('action', 'value'))\n"
        "worker.call({'action': 'return'}, 60); print(worker._process.pid, flush=True)\n"
        "worker.call({'action': 'tower', 'value': 9}, 1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | PATHS)
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while _is_alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _is_alive(pid)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_thread():
    worker = ThreadWorker(act)
    assert worker.call({"action": "return", "value": 1}, 60) == 1
    assert repr(worker.call({"action": "raise", "value": 1}, 60)) == "KeyError(1)"
    worker.stop()
    worker = ThreadWorker(lambda: time.sleep(2))
    start = time.monotonic()
    assert str(worker.call({}, 0.1)) == "no result within 0.1 s"
    assert worker.abandoned
    assert time.monotonic() - start < 1.5


def test_a_call_that_holds_the_interpreter_is_named(capfd, monkeypatch):
    """A thread cannot interrupt it. While it lasts, the stacks go to stderr; afterwards the error says why it took so long."""
    monkeypatch.setattr(workers, "GRACE_S", 0.1)
    start = time.monotonic()
    error = ThreadWorker(lambda: 7 ** int(4e6)).call({}, 0.05)
    assert time.monotonic() - start > 1
    expected = r"no result within 0.05 s; the call held the interpreter's lock, which a timeout cannot interrupt, for \d+ s"
    assert isinstance(error, TimeoutError)
    assert re.fullmatch(expected, str(error))
    written = capfd.readouterr().err
    assert "Timeout (0:00:00" in written
    assert re.search(r'File ".*test_workers.py", line \d+ in <lambda>', written)
