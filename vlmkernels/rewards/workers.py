"""Workers that call a function with a time limit: a thread, for any function, and a process, for a function that pickles.

A thread cannot be stopped. After a timeout the caller continues without it, unless the call holds the interpreter's lock, as
``9 ** 9 ** 9`` or a loop in a C extension does: then no other thread runs. A process can be killed at any time.
"""

import faulthandler
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

MEMORY = 8 << 30  # bytes that a process may allocate
START_S = 120.0  # to start a process, which imports torch
GRACE_S = 5.0  # after which a call that should have been stopped is reported or killed by the system


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Return what a function returns or the exception that it raises. The items of an iterator are returned as a list."""
    try:
        result = function(**arguments)
        return list(result) if isinstance(result, Iterator) else result
    except Exception as error:
        return error


class ThreadWorker:
    """A thread that calls a function, so that the caller can stop waiting for it.

    Attributes:
        abandoned: whether a call has timed out. The thread is a daemon, so it does not keep the process alive.
    """

    def __init__(self, function: Callable[..., Any]):
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.abandoned = False
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[..., Any]) -> None:
        while (arguments := self._tasks.get()) is not None:
            start = time.monotonic()
            result = attempt(function, arguments)
            self._results.put((result, time.monotonic() - start))

    def call(self, arguments: dict[str, Any], timeout: float) -> Any:
        """Return the result of the function, the exception that it raised, or a TimeoutError after ``timeout`` seconds."""
        self._tasks.put(arguments)
        start = time.monotonic()
        with _stacks_of_a_blocked_call(timeout + GRACE_S):
            try:
                result, seconds = self._results.get(timeout=timeout)
            except queue.Empty:
                self.abandoned = True
                self.stop()
                result, seconds = TimeoutError(f"no result within {timeout} s"), time.monotonic() - start
        if seconds < timeout + 1:
            return result
        return TimeoutError(
            f"no result within {timeout} s; the call held the interpreter's lock, which a timeout cannot interrupt, for "
            f"{seconds:.0f} s"
        )

    def stop(self) -> None:
        """Let the thread exit after its current call."""
        self._tasks.put(None)


@contextmanager
def _stacks_of_a_blocked_call(seconds: float) -> Iterator[None]:
    """Write the stacks of all threads to stderr if the context has not ended after some seconds.

    ``faulthandler`` does this from a thread of its own, which needs no lock of the interpreter.
    """
    try:
        faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)
    except (RuntimeError, ValueError, AttributeError, OSError):  # there is no stderr, or it is not a file
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


_serving = False


def is_worker() -> bool:
    """Whether this is the process of a ``ProcessWorker``."""
    return _serving


class ProcessWorker:
    """A function in a Python process of its own, which is killed if a call times out and started again by the next call.

    The process starts with an import of torch and a call with empty lists, so that the function imports what it needs. This
    takes a few seconds, which do not count as part of a call. The process uses one thread and no GPU, and does not run the
    user's script again. Threads can share a worker; their calls wait for each other. A forked process starts its own.

    Args:
        function: the function, which must be picklable.
        names: the arguments that are passed on, which must be picklable.
    """

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...]):
        self._function, self._names = function, names
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._owner = 0
        self._end: Callable[[], Any] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._function, self._names)

    def call(self, arguments: dict[str, Any], timeout: float) -> Any:
        """Return the result of the function, the exception that it raised, or a TimeoutError after ``timeout`` seconds."""
        chosen = {name: arguments[name] for name in self._names if name in arguments}
        with self._lock:
            try:
                return self._call(chosen, timeout)
            except BaseException:  # such as KeyboardInterrupt: the next reply would be that of this call
                self.stop()
                raise

    def _call(self, chosen: dict[str, Any], timeout: float) -> Any:
        try:
            if self._process is None or self._owner != os.getpid():
                self._start()
                self._exchange((self._function, self._names), START_S)
            return self._exchange((chosen, timeout + GRACE_S), timeout)
        except TimeoutError as error:
            self.stop()
            return error
        except (TypeError, AttributeError, pickle.PickleError) as error:
            return TypeError(f"{', '.join(chosen)} must be picklable with a timeout: {error}")
        except (EOFError, BrokenPipeError):
            code = None if self._process is None else self._process.wait()
            self.stop()
            return RuntimeError(f"the process of the reward ended with exit code {code}")

    def _start(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from vlmkernels.rewards.workers import serve; serve()"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._owner, self._replies = os.getpid(), queue.SimpleQueue()
        self._end = weakref.finalize(self, _kill, self._process)
        threading.Thread(target=_read, args=(self._process, self._replies), daemon=True).start()

    def _exchange(self, message: Any, timeout: float) -> Any:
        """Send a message and return the reply. Raises TimeoutError, EOFError or BrokenPipeError."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))
        self._process.stdin.flush()
        try:
            reply = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no result within {timeout} s") from None
        if reply is None:
            raise EOFError
        return pickle.loads(reply)

    def stop(self) -> None:
        """Kill the process."""
        self._end()
        self._process = None


def _read(process: "subprocess.Popen[bytes]", replies: "queue.SimpleQueue[Any]") -> None:
    """Put the replies of a process into a queue, in a thread, as there is no read with a time limit on all systems.

    A reply is pickled bytes within pickled bytes, so that an object that cannot be restored raises in the caller. At the end
    of the process, None is put.
    """
    assert process.stdout is not None
    try:
        while True:
            replies.put(pickle.load(process.stdout))
    except Exception:  # the process has ended, perhaps within a reply
        replies.put(None)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # a message that was not sent
            process.stdin.close()


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not all systems have such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _limit_time(seconds: float) -> None:
    """Let the system end this process after some seconds of CPU time, where it can; 0 removes the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve() -> None:
    """Serve a ``ProcessWorker``: read a function, then the arguments of calls, from stdin, and write results to stdout."""
    global _serving
    _serving = True
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not mix with the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    _limit_memory()

    def reply(value: Any) -> None:
        try:
            data = pickle.dumps(value)
        except Exception as error:
            data = pickle.dumps(RuntimeError(f"{type(value).__name__} cannot be sent to another process: {error}"))
        replies.write(pickle.dumps(data))
        replies.flush()

    try:
        function, names = pickle.load(sys.stdin.buffer)
        attempt(function, {name: [] for name in names})
        reply(None)
        while True:
            arguments, limit = pickle.load(sys.stdin.buffer)
            _limit_time(limit)  # if the parent was killed, nobody else ends this call
            result = attempt(function, arguments)
            _limit_time(0)
            reply(result)
    except (EOFError, BrokenPipeError):  # the parent has ended
        pass
