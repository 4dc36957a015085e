"""The process in which ``text.math_equal`` compares formulas, so that a formula without end can be ended on any thread."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

_WORKER = Path(__file__).with_name("formula_worker.py")


class Comparison(NamedTuple):
    """What math-verify says of two formulas.

    Attributes:
        reference_parsed: whether the reference could be parsed.
        parsed: whether the prediction could be parsed within the time limit.
        equal: whether they are equal.
    """

    reference_parsed: bool
    parsed: bool
    equal: bool


class FormulaProcess:
    """Run ``formula_worker.py``, and start it again after a formula has ended it, or in a forked process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def compare(self, reference: str, prediction: str) -> Comparison:
        """Compare two formulas in LaTeX."""
        with self.lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([reference, prediction]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # such as KeyboardInterrupt: the next answer would be that of another request
                self._stop(process)
                raise
            if not line:
                self._stop(process)
                return Comparison(True, False, False)
            result = json.loads(line)
            return Comparison(False, False, False) if result is None else Comparison(True, *result)

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.owner != os.getpid():
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([sys.executable, str(_WORKER)], stdin=pipe, stdout=pipe, text=True)
            self.owner = os.getpid()
        return self.process

    def _stop(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()
        self.process = None


PROCESS = FormulaProcess()
