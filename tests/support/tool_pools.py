"""Tools that do what tools should not do, and helpers for pools."""

import ctypes
import faulthandler
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image

from vlmkernels.tools.calls import ToolCall
from vlmkernels.tools.pool import Seeds


def begin(pool, key, environment, row, seed=None):
    """Begin one trajectory, perhaps with one seed for its reset and its calls, and return its observation."""
    seeds = Seeds(seed, seed) if isinstance(seed, int) else seed
    return pool.begin([(key, environment, row, seeds)])[0]


def end(pool, key):
    """End one trajectory."""
    return pool.end([key])[0]


def run(pool, *calls, key=0):
    """The results of one turn; a call is (name, arguments) or a MalformedCall."""
    pool.submit(key, [call if isinstance(call, str) else ToolCall(call[0], call[1]) for call in calls])
    ((finished, results),) = pool.finished(wait=True)
    assert finished == key
    assert all(result.seconds >= 0 for result in results)
    return results


def texts(results):
    return ["".join(part["text"] for part in result.parts) for result in results]


def eventually(condition, seconds=20.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: A number.
        b: A number.
    """
    return a + b


def act(what: str, value: float = 0.0):
    """Do something.

    Args:
        what: What to do.
        value: A number.
    """
    return ACTIONS[what](value)


def allocate(value):
    return len(bytes(int(value) << 30))


def draw(value):
    return [random.random(), float(np.random.random()), float(torch.rand(()))]  # noqa: NPY002


def end_with_a_child(value):
    """End while a child process holds a copy of the socket."""
    if not os.fork():
        time.sleep(1000)
    os._exit(int(value))


def terminate_a_child():
    with subprocess.Popen(["sleep", "1000"]) as child:
        child.terminate()
        return child.wait()


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


def raise_unprintable(value):
    raise Unprintable


ACTIONS = {
    "sleep": lambda value: time.sleep(value) or "slept",
    "raise": lambda value: {}[value],
    "unprintable": raise_unprintable,
    "exit": lambda value: os._exit(int(value)),
    "sys.exit": lambda value: sys.exit("enough"),
    "segfault": lambda value: (faulthandler.disable(), ctypes.string_at(0)),
    "kill": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "child": end_with_a_child,
    "allocate": allocate,
    "pid": lambda value: os.getpid(),
    "random": draw,
    "image": lambda value: Image.new("RGB", (int(value), int(value)), (1, 2, 3)),
    "images": lambda value: [Image.new("RGB", (2, 2))] * int(value),
    "threads": lambda value: (torch.get_num_threads(), float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())),
    "cuda": lambda value: torch.cuda.is_available(),
    "input": lambda value: input(),
    "print": lambda value: print("printed"),
    "template": lambda value: os.getppid(),
    "terminate": lambda value: terminate_a_child(),
    "group": lambda value: os.getpgid(0) == os.getpid(),
    "text": lambda value: "x" * int(value),
}


def pids_of(pool, *keys):
    for key in keys:
        pool.submit(key, [ToolCall("act", {"what": "pid"}), ToolCall("act", {"what": "sleep", "value": 0.2})])
    found = {}
    while len(found) < len(keys):
        found |= {key: int(texts(results)[0]) for key, results in pool.finished(wait=True)}
    return list(found.values())
