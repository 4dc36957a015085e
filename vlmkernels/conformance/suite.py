"""All contracts, and running them without pytest."""

import fnmatch

from vlmkernels.conformance import contracts  # noqa: F401  registers them
from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.contract import CONTRACTS, Contract, Result, cases_of, run_case


def all_contracts() -> list[Contract]:
    """Return all contracts in the order of the report."""
    return [*CONTRACTS.values()]


def run(adapter: Adapter, pattern: str = "*") -> list[Result]:
    """Run the contracts whose names match ``pattern`` (as in a shell)."""
    chosen = [each for each in all_contracts() if fnmatch.fnmatchcase(each.name, pattern)]
    return [run_case(adapter, each, case) for each in chosen for case in cases_of(adapter, each)]
