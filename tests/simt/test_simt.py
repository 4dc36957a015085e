"""The emulator: a correct kernel gives the correct result, and each wrong kernel is reported instead of hanging or passing."""

import ctypes
import math

import numpy as np
import pytest

from simt.build import SIMT, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

FLOATS = ctypes.POINTER(ctypes.c_float)


@pytest.fixture(scope="module")
def run():
    library = ctypes.CDLL(str(build("faulty", [SIMT / "faulty.cpp"])))
    library.run.restype = ctypes.c_char_p

    def call(name: str, threads: int, grid: int = 1) -> tuple[np.ndarray, str]:
        """Run a kernel on 0, 1, 2, ... and return its output and the error message."""
        numbers = np.arange(1 << 14, dtype=np.float32)
        numbers = numbers[-numbers.ctypes.data // 4 % 4 :]  # aligned to 16 bytes
        numbers[:] = np.arange(len(numbers))
        out = np.zeros(64, dtype=np.float32)
        error = library.run(name.encode(), grid, threads, numbers.ctypes.data_as(FLOATS), out.ctypes.data_as(FLOATS))
        return out, error.decode()

    return call


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_sum(run, threads):
    out, error = run("block_sum", threads, grid=3)
    assert error == ""
    np.testing.assert_array_equal(out[:3], np.arange(3 * threads).reshape(3, threads).sum(1))


def test_votes_and_atomics(run):
    out, error = run("vote", 32)
    assert error == ""
    np.testing.assert_array_equal(out[:32], np.arange(32) % 3 == 0)
    assert out[32] == 1  # any is true, all is false
    assert out[33] == 32


def test_shared_memory_starts_as_nan(run):
    out, error = run("missing_barrier", 64)
    assert error == ""
    assert math.isnan(out[0])


@pytest.mark.parametrize(
    ("kernel", "threads", "words"),
    [
        ("early_return", 64, ["__syncthreads", "has returned"]),
        ("two_barriers", 64, ["__syncthreads", "while another thread waits at __syncthreads"]),
        ("barrier_against_shuffle", 64, ["deadlock", "__shfl_xor_sync", "__syncthreads"]),
        ("divergent_shuffle", 32, ["deadlock", "__shfl_xor_sync", "thread 16 has returned"]),
        ("shuffle_beyond_block", 16, ["__shfl_xor_sync", "lane 16", "beyond the block"]),
        ("shuffle_beyond_mask", 32, ["__shfl_sync", "lane 20", "not in its mask"]),
        ("misaligned_load", 32, ["16 bytes is not aligned"]),
        ("block_sum", 1025, ["1 to 1024 threads"]),
    ],
)
def test_mistakes_are_reported(run, kernel, threads, words):
    _, error = run(kernel, threads)
    assert error.startswith(kernel)
    for word in words:
        assert word in error
    out, error = run("block_sum", 64)  # the next launch works
    assert error == ""
    assert out[0] == sum(range(64))
