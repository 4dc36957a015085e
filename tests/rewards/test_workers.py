"""Calls with a time limit, in threads and in processes."""

import copy
import re
import time

from support.remote import act

from vlmkernels.rewards import workers
from vlmkernels.rewards.workers import ProcessWorker, ThreadWorker


def test_a_process():
    """It returns results and errors, survives prints, and starts again after it was killed or has ended."""
    worker = ProcessWorker(act, ("action", "value"))

    def call(action, value=None, timeout=60.0):
        return worker.call({"action": action, "value": value, "images": object()}, timeout)

    assert call("print", [1.0, None]) == [1.0, None]
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
