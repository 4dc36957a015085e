import gc
import os
import tempfile
from pathlib import Path

import pytest
import runs


@pytest.fixture(scope="session")
def server():
    """Where processes are forked from."""
    return runs.server()


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Every ``train`` collects garbage, half a second through the modules imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tmp_path():
    """In memory where there is such a folder: checkpoints are flushed to the disk, which takes its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)
