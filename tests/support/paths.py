"""Where the repository is, and the environment in which a test starts another Python program."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which ``vlmkernels`` and ``support`` can be imported, and ``variables``."""
    paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **variables}
