"""pytest plugin for a test run on a GPU that may be cut short, loaded by `-p support.gpu_session` (bench/gpu_check.py).

Every outcome is appended to the file of `--outcomes` as soon as it is known. A test waits for the device before it counts as
passed, so that an asynchronous error is reported by the test that caused it. After such an error every later call into CUDA
fails in the same process: the pytest-xdist worker exits and is replaced.
"""

import json
import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FILE", help="append every test's outcome to FILE, one JSON object per line")


def device_error() -> str | None:
    """The error that has made the CUDA context of this process unusable, if any."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except torch.cuda.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


class Session:
    def __init__(self, config) -> None:
        self.is_worker = hasattr(config, "workerinput")
        self.path = config.getoption("--outcomes")
        self.broken = self.expected = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item):
        try:
            result = yield
        except BaseException:
            self.broken = device_error() is not None
            raise
        if error := device_error():
            self.broken = True
            pytest.fail(f"the device reported an error after the test: {error}", pytrace=False)
        return result

    @pytest.hookimpl(trylast=True)  # after pytest-xdist has sent the report
    def pytest_runtest_logreport(self, report):
        if not self.is_worker:
            self.write(report)
        elif self.broken and report.when == "teardown":
            os._exit(1)

    def pytest_collection_finish(self, session):
        if not self.is_worker:
            self.expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        if not self.expected:  # every worker has the same tests
            self.expect(ids)

    def expect(self, tests) -> None:
        """Record the tests before they run. A run that is cut short leaves these outcomes."""
        rows = [{"test": test, "outcome": "not run"} for test in tests]
        self.expected = bool(rows)
        self.append(*rows)

    def pytest_collectreport(self, report):
        if not self.is_worker and report.failed:
            self.append({"test": report.nodeid, "outcome": "failed", "message": message_of(report)})

    def write(self, report) -> None:
        """Record the outcome of the call, and of set-up and teardown if they did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
        if report.when != "call":
            row["when"] = report.when
        if report.outcome != "passed":
            row["message"] = message_of(report)
        self.append(row)

    def append(self, *rows: dict) -> None:
        if self.path:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def message_of(report) -> str:
    """The message of the exception, or the reason for a skip."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):
        return longrepr[2]
    crash = getattr(longrepr, "reprcrash", None)
    return str(longrepr if crash is None else crash.message)[:600]


def pytest_configure(config):
    config.pluginmanager.register(Session(config), "gpu-session")
