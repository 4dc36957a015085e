import pytest
import runs


@pytest.fixture(scope="session")
def server():
    """Where processes are forked from."""
    return runs.server()
