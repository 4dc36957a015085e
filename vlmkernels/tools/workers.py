"""Processes in which tools and environments run.

    trainer --fork--> template --fork--> worker, worker, ...
       |____ socket ______|                |        |
       |_________________ sockets _________|________|

The template is forked once and does nothing but fork workers and kill them. So tools and environments can be closures, lambdas
or local classes, as only arguments and results are pickled; a worker starts as fast as a fork of a process of one thread, and
knows nothing of what the trainer did since. Workers use one CPU thread and no GPU: CUDA cannot be used after a fork. They are
not a sandbox: they protect the trainer from what a tool does to its own process, not from what it does to files.

If the trainer ends, even by SIGKILL, the template kills all workers with their child processes, and ends.
"""

import ctypes
import gc
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch

from vlmkernels.tools.session import LENGTH, Done, Request, Started, send

MEMORY = 8 << 30  # bytes that a worker may allocate
START_S = 60.0  # until a new worker reads a request, or the template an order
POLL_S = 1.0  # between two checks of the template whether the trainer and the workers are alive

_ORDER = struct.Struct("<cQ")  # to the template: what to do, number of the worker
_STATUS = struct.Struct("<Qi")  # from the template: number of the worker, its exit code
_FORK, _KILL = b"f", b"k"

Serve = Callable[[socket.socket], None]


class Worker:
    """The trainer's end of a worker.

    Attributes:
        number: its number for the template.
        socket: a socket that is readable if the worker has sent something or has ended.
    """

    def __init__(self, number: int, connection: socket.socket):
        self.number, self.socket = number, connection
        self._received = bytearray()

    def send(self, request: Request) -> None:
        """Send a request to a worker that has none. Raises OSError if the worker has ended."""
        send(self.socket, request)

    @property
    def is_sending(self) -> bool:
        """Whether a part of an event has arrived."""
        return bool(self._received)

    def receive(self) -> list[Started | Done]:
        """Return the events that have arrived, once the socket is readable. Raises EOFError if the worker has ended."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        events: list[Started | Done] = []
        while len(self._received) >= (start := LENGTH.size):
            end = start + LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            events.append(pickle.loads(self._received[start:end]))
            del self._received[:end]
        return events


class Template:
    """The process that forks workers. It is a copy of this process as it is now.

    Args:
        serve: what a worker does with its socket.

    Attributes:
        owner: the number of this process.
        close: ends all processes, unless it is called in a process that was forked from this one.

    Raises:
        NotImplementedError: the system has no ``os.fork``.
    """

    def __init__(self, serve: Serve):
        if not hasattr(os, "fork"):
            raise NotImplementedError("tools need a system with os.fork, such as Linux")
        self._control, control = socket.socketpair()
        self._count = 0
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError, OSError):  # there is no stream, or it is closed
                stream.flush()
        self.owner = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python >= 3.12, if the process has other threads
            pid = os.fork()
        if not pid:
            self._control.close()
            _run_and_exit(_fork_workers, control, self.owner, serve)
        control.close()
        self._control.settimeout(START_S)
        self.close = weakref.finalize(self, _close, self._control, pid, self.owner)

    def start(self) -> Worker:
        """Return a new worker, without waiting for it."""
        self._count += 1
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [_ORDER.pack(_FORK, self._count)], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise RuntimeError(f"the process that starts the workers of tools has ended ({error})") from error
        ours.settimeout(START_S)
        return Worker(self._count, ours)

    def stop(self, worker: Worker) -> int:
        """Kill a worker and its child processes. Returns its exit code, which is negative for a signal."""
        worker.socket.close()
        with suppress(OSError):  # the template has ended, and its workers with it
            self._control.sendall(_ORDER.pack(_KILL, worker.number))
            while status := self._control.recv(_STATUS.size, socket.MSG_WAITALL):
                number, code = _STATUS.unpack(status)
                if number == worker.number:  # not that of a call that KeyboardInterrupt has ended
                    return int(code)
        return -signal.SIGKILL


def _close(control: socket.socket, pid: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    with suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)  # other processes can hold copies of the socket, which close() would leave open
    control.close()
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


# ---- in the template ----


def _run_and_exit(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a forked process, which must never return to the code of its parent."""
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _fork_workers(control: socket.socket, trainer: int, serve: Serve) -> None:
    _detach()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    template, pids = os.getpid(), dict[int, int]()
    control.settimeout(POLL_S)
    while os.getppid() == trainer:
        try:
            order, descriptors, *_ = socket.recv_fds(control, _ORDER.size, 1)
        except TimeoutError:
            _end_children_of_dead_workers(pids.values())
            continue
        if not order:
            break
        kind, number = _ORDER.unpack(order)
        if kind == _KILL:
            control.sendall(_STATUS.pack(number, _kill(pids.pop(number)) if number in pids else 1))
            continue
        os.set_inheritable(descriptors[0], False)
        with socket.socket(fileno=descriptors[0]) as connection:
            try:
                pid = os.fork()
            except OSError as error:
                print(f"a worker of tools could not be forked: {error}", file=sys.stderr)
                continue
            if not pid:
                control.close()
                _run_and_exit(_become_worker, template, libc, serve, connection)
        _own_group(pid)
        pids[number] = pid
    for pid in pids.values():
        _kill(pid)


def _detach() -> None:
    """Free this process from the terminal, the signals and the threads of the trainer."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer; child processes would inherit SIG_IGN
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    gc.freeze()  # objects of the trainer must not be finalized here


def _kill(pid: int) -> int:
    """Kill a child process and its process group, and return its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_children_of_dead_workers(pids: Iterable[int]) -> None:
    """Kill what dead workers have started, which can hold copies of their sockets: the trainer would wait for ever."""
    for pid in pids:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _own_group(pid: int) -> None:
    with suppress(OSError):  # the process has done it itself, or has ended
        os.setpgid(pid, pid)


# ---- in a worker ----


def _become_worker(template: int, libc: Any, serve: Serve, connection: socket.socket) -> None:
    _own_group(0)
    if libc is not None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the template
        if os.getppid() != template:
            return
    _limit_memory()
    serve(connection)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not all systems have such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        limit, hard = _data_bytes() + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _data_bytes() -> int:
    """Return how much memory this process has from the trainer that counts for RLIMIT_DATA."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
