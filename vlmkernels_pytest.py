"""The pytest options of ``vlmkernels.conformance``.

pytest imports this module in every environment with vlmkernels. It imports torch and the suite only if an option needs them.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of GRPO trainers (vlmkernels)")
    group.addoption(
        "--conformance",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="check this adapter, a Python file or the name of an adapter of vlmkernels, instead of the tests of the project."
        " May be given several times.",
    )
    group.addoption(
        "--conformance-output",
        default="conformance-output",
        metavar="FOLDER",
        help="write conformance.json and conformance.html to this folder (default: conformance-output)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("conformance"):
        from vlmkernels.conformance.plugin import Conformance

        config.pluginmanager.register(Conformance(config), "vlmkernels-conformance")
