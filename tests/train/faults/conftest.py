import os
import tempfile
from pathlib import Path

import pytest
from support.faults import runs


@pytest.fixture(scope="session")
def server():
    """The multiprocessing context whose server forks the processes."""
    return runs.server()


@pytest.fixture
def tmp_path():
    """A folder in memory if possible: checkpoints are flushed to the disk, which is slow."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)
