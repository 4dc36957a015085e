"""What a worker does: it calls tools, and resets an environment, at the requests of the trainer.

The trainer sends one request at a time. For each call, the worker sends ``Started`` and ``Done``.
"""

import asyncio
import inspect
import pickle
import random
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch

from vlmkernels.data.images import ImageLimits
from vlmkernels.tools.functions import Tool, Tools
from vlmkernels.tools.results import Part, content_parts, is_media

MAX_ATTRIBUTE = 2**26  # bytes of one attribute of an environment that is sent to the trainer
LENGTH = struct.Struct("<Q")  # before each pickled message

Call = tuple[int, str, dict[str, Any]]  # index, name, arguments


@dataclass(frozen=True)
class Started:
    """These calls begin, and their time limit with them."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """A call has ended. With an error, the value is the message for the model."""

    index: int
    value: Any
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Turn:
    """Run the sync calls in their order, then the async ones concurrently. The value of a call is the content of its message.

    Without a seed, the sequence of random numbers continues.
    """

    calls: Sequence[Call]
    seed: str | None


@dataclass(frozen=True)
class Reset:
    """Reset an environment, after constructing it the first time. The value is its observation: None, a text or parts.

    ``seed`` is that of the reset, and ``seed_of_calls`` that of the calls after it.
    """

    environment: str | None
    row: dict[str, Any]
    seed: str | None
    seed_of_calls: str | None


@dataclass(frozen=True)
class End:
    """The value is (``Attributes`` of the environment, the float of its ``get_reward`` or None)."""


Request = Turn | Reset | End


@dataclass(frozen=True)
class Attributes:
    """The attributes of an environment.

    Args:
        of_known_class: whether its class is that of the instance that ``Tools`` has created.
        pickled: the attributes that can be sent.
        unsent: why the others cannot be sent.
    """

    of_known_class: bool
    pickled: dict[str, bytes]
    unsent: dict[str, str]


def send(connection: socket.socket, message: Request | Started | Done) -> None:
    """Send a message over a socket."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)


class Session:
    """The tools of a worker and, once it was reset, its environment.

    Args:
        limits: limits of the images in results.
        max_images: maximum number of images in a result.
        connection: the socket to the trainer.
    """

    def __init__(self, tools: Tools, limits: ImageLimits, max_images: int, connection: socket.socket):
        self._tools, self._limits, self._max_images, self._connection = tools, limits, max_images, connection
        self._name: str | None = None
        self._environment: Any = None
        self._loop = asyncio.new_event_loop()

    def serve(self) -> None:
        """Serve requests until the trainer closes the socket."""
        set_seed(None)
        functions: dict[type, Callable[[Any], None]] = {Turn: self._turn, Reset: self._reset, End: self._end}
        with self._connection.makefile("rb") as requests:
            while head := requests.read(LENGTH.size):
                request = pickle.loads(requests.read(LENGTH.unpack(head)[0]))
                functions[type(request)](request)

    def _turn(self, request: Turn) -> None:
        if request.seed is not None:
            set_seed(request.seed)
        methods = self._tools.methods(self._name) if self._environment is not None else {}
        tools = self._tools.functions | {name: getattr(self._environment, attribute) for name, attribute in methods.items()}
        concurrent = [call for call in request.calls if _is_async(tools[call[1]])]
        for index, name, arguments in request.calls:
            if not _is_async(tools[name]):
                self._start(index)
                with self._reporting(index) as report:
                    report(self._content(self._awaited(tools[name](**arguments))))

        async def run(index: int, name: str, arguments: dict[str, Any]) -> None:
            with self._reporting(index) as report:
                report(self._content(await tools[name](**arguments)))

        async def run_all() -> None:
            await asyncio.gather(*(run(*call) for call in concurrent))

        if concurrent:
            self._start(*(index for index, *_ in concurrent))
            self._loop.run_until_complete(run_all())

    def _reset(self, request: Reset) -> None:
        self._start(0)
        with self._reporting(0, with_traceback=True) as report:
            if self._environment is None:
                set_seed(request.seed)
                self._environment = self._tools.environments[request.environment]()
                self._name = request.environment
                self._start(0)
            set_seed(request.seed)
            report(self._observation(self._awaited(self._environment.reset(**request.row))))
            set_seed(request.seed_of_calls)

    def _end(self, _: End) -> None:
        self._start(0)
        with self._reporting(0, with_traceback=True) as report:
            attributes = _attributes(self._environment, self._tools.environment_class(self._name))
            reward = self._awaited(self._environment.get_reward()) if self._tools.owns_reward(self._name) else None
            report((attributes, None if reward is None else float(reward)))

    def _awaited(self, result: Any) -> Any:
        async def result_of() -> Any:
            return await result

        return self._loop.run_until_complete(result_of()) if inspect.isawaitable(result) else result

    def _content(self, result: Any) -> list[Part]:
        return content_parts(result, self._limits, self._max_images)

    def _observation(self, result: Any) -> str | list[Part] | None:
        if result is None or is_media(result):
            return None if result is None else self._content(result)
        if not isinstance(result, str):
            raise TypeError(f"reset must return None, a string or a list of content blocks, got {result!r:.80}")
        return str(self._content(result)[0]["text"])

    def _start(self, *indices: int) -> None:
        send(self._connection, Started(indices))

    @contextmanager
    def _reporting(self, index: int, with_traceback: bool = False) -> Iterator[Callable[[Any], None]]:
        """Send the value that the context reports, or the error that it raises, also a SystemExit."""
        start, done = time.monotonic(), Done(index, None, None, 0.0)

        def report(value: Any) -> None:
            nonlocal done
            done = Done(index, value, None, time.monotonic() - start)

        try:
            yield report
        except BaseException as error:
            message = _message(error)
            details = traceback.format_exc() if with_traceback else f"{type(error).__name__}: {message}"
            done = Done(index, message, details, time.monotonic() - start)
        send(self._connection, done)


def set_seed(seed: str | None) -> None:
    """Seed ``random``, numpy and torch. Without a seed, they differ in each worker, although all are copies of one process."""
    generator = random.Random(seed)
    random.seed(generator.getrandbits(64))
    np.random.seed(generator.getrandbits(32))  # noqa: NPY002 - tools can use the global generator
    torch.default_generator.manual_seed(generator.getrandbits(63))


def _is_async(tool: Tool) -> bool:
    return inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(getattr(tool, "__call__", None))  # noqa: B004


def _message(error: BaseException) -> str:
    try:
        message = str(error) or type(error).__name__
    except Exception:
        message = type(error).__name__
    if "re-initialize CUDA" in message:  # torch recommends a start method, which tools cannot choose
        message = "CUDA cannot be used in tools, as they run in forked processes; use a server for a model on a GPU"
    return message.encode(errors="backslashreplace").decode()


def _attributes(environment: Any, known: type) -> Attributes:
    """Pickle each attribute of an environment by itself, so that one that does not pickle costs only itself."""
    members = {name for kind in type(environment).__mro__ for name, value in vars(kind).items() if _is_slot(value)}
    values = {name: getattr(environment, name) for name in members if hasattr(environment, name)}
    pickled, unsent = {}, {}
    for name, value in (values | getattr(environment, "__dict__", {})).items():
        try:
            data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            unsent[name] = f"{type(error).__name__}: {error}"
            continue
        if len(data) <= MAX_ATTRIBUTE:
            pickled[name] = data
        else:
            unsent[name] = f"it has {len(data)} bytes, more than {MAX_ATTRIBUTE}"
    return Attributes(type(environment) is known, pickled, unsent)


def _is_slot(value: Any) -> bool:
    return isinstance(value, MemberDescriptorType)


class EnvironmentState:
    """The attributes of an environment whose factory returns instances of several classes."""


def restored(attributes: Attributes, known: type) -> Any:
    """Return an object with the attributes and the class of an environment, without calling the constructor.

    An attribute that cannot be sent is absent. Reading it raises an AttributeError with the reason.
    """
    values, unsent = {}, dict(attributes.unsent)
    for name, data in attributes.pickled.items():
        try:
            values[name] = pickle.loads(data)
        except Exception as error:
            unsent[name] = f"{type(error).__name__}: {error}"
    kind = known if attributes.of_known_class else EnvironmentState
    state: Any = object.__new__(_without(kind, unsent) if unsent else kind)
    for name, value in values.items():
        if _is_slot(getattr(kind, name, None)):
            object.__setattr__(state, name, value)
        else:
            state.__dict__[name] = value
    return state


def _without(kind: type, unsent: dict[str, str]) -> type:
    """Return a subclass whose instances give the reasons why attributes are absent."""

    def getattr_(self: Any, name: str) -> Any:
        if name in unsent:
            raise AttributeError(f"{kind.__name__}.{name} stayed in the process of the environment: {unsent[name]}")
        if inherited := getattr(kind, "__getattr__", None):
            return inherited(self, name)
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (kind,), {**names, "__getattr__": getattr_})
