"""Contracts: rules that a part of a trainer must keep, and running them against an adapter."""

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmkernels.conformance.adapter import METHODS, Adapter, NeedsCUDA, NotApplicable
from vlmkernels.conformance.guard import AdapterError, Guarded
from vlmkernels.conformance.state import standard_state

# The status of a case.
PASS, FAIL, ERROR = "pass", "fail", "error"  # error: the adapter raised one, or returned what its interface does not allow
DOCUMENTED, NOT_APPLICABLE, NEEDS_CUDA = "documented", "not applicable", "needs CUDA"


class Violation(Exception):
    """A contract raises this if a result breaks its rule. The message has the result, the right value and the tolerance."""


class Case(NamedTuple):
    """One input of a contract."""

    id: str  # unique within the contract
    arguments: dict[str, Any]  # of the check, besides the adapter
    method: str = ""  # the method of the adapter, for a contract without one
    error: str = ""  # why there are no cases


@dataclass(frozen=True)
class Contract:
    """A rule with its cases. ``check(adapter, **case.arguments)`` returns, or raises ``Violation``."""

    name: str  # "group/rule"
    method: str  # the method of the adapter without which the rule is not applicable; "": that of each case
    rule: str  # one sentence
    source: str  # where the rule comes from: a paper, or the documentation of a library
    tolerance: str  # how the tolerance follows from the dtype
    cases: Callable[[Adapter], Iterable[Case]]  # the smallest first
    check: Callable[..., None]
    reproduce: Callable[..., str]  # (**case.arguments) -> the lines of a script that print got and expected


CONTRACTS: dict[str, Contract] = {}

# The first lines of every reproduction.
HEADER = """\
import torch
from vlmkernels.conformance import *
adapter = {load}
"""


def contract(
    name: str,
    method: str,
    *,
    source: str,
    tolerance: str,
    cases: Callable[[Adapter], Iterable[Case]],
    reproduce: Callable[..., str],
    rule: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as the check of a contract. ``rule``: by default the first line of its docstring."""
    assert method in ("", *METHODS), method
    assert name not in CONTRACTS, name

    def register(check: Callable[..., None]) -> Callable[..., None]:
        stated = rule or (check.__doc__ or "").strip().splitlines()[0]
        CONTRACTS[name] = Contract(name, method, stated, source, tolerance, cases, check, reproduce)
        return check

    return register


class Result(NamedTuple):
    """The outcome of a case."""

    adapter: str
    contract: str
    case: str
    status: str
    message: str = ""  # the violation, the error, or the reason
    reproduction: str = ""  # a script, for a violation or an error
    seconds: float = 0.0


def close(name: str, got: torch.Tensor | float, expected: torch.Tensor | float, tolerance: torch.Tensor | float) -> None:
    """Raise ``Violation`` unless |got - expected| <= tolerance everywhere. NaN is close to nothing."""
    got, expected, tolerance = (torch.as_tensor(x).detach().double().cpu() for x in (got, expected, tolerance))
    if got.shape != expected.shape:
        raise Violation(f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    error = (got - expected).abs()
    wrong = ~(error <= tolerance)
    if not wrong.any():
        return
    excess = torch.where(wrong, (error / tolerance.clamp(min=1e-300)).nan_to_num(nan=torch.inf), -1)
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    where = f"[{', '.join(map(str, index))}]" if index else ""
    allowed = tolerance.expand_as(error)[index].item()
    raise Violation(
        f"{name}{where} is {got[index].item():.7g}, expected {expected[index].item():.7g} (tolerance {allowed:.1e};"
        f" {int(wrong.sum())} of {wrong.numel()} values differ)"
    )


@standard_state()
def cases_of(adapter: Adapter, each: Contract) -> list[Case | None]:
    """Return the cases of a contract for this adapter; [None] if it has none."""
    if each.method and not adapter.has(each.method):
        return [None]
    try:
        return [*each.cases(adapter)] or [None]
    except Exception as error:  # an attribute of the adapter has a value that it must not have
        return [Case("declarations", {}, error=f"the attributes of the adapter are wrong: {describe(error)}")]


def describe(error: BaseException) -> str:
    """Return the type and the message of an error, and the end of the path where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno})"


@standard_state()
def run_case(adapter: Adapter, each: Contract, case: Case | None) -> Result:
    """Run one case of a contract. An error of the adapter is a result, so that the run goes on."""
    start = time.perf_counter()
    name = case.id if case else ""

    def result(status: str, message: str = "") -> Result:
        script = ""
        if case and case.arguments and status in (FAIL, ERROR, DOCUMENTED):
            script = HEADER.format(load=adapter.expression) + each.reproduce(**case.arguments)
        return Result(adapter.name, each.name, name, status, message, script, time.perf_counter() - start)

    method = each.method or (case.method if case else "")
    if method and not adapter.has(method):
        return result(NOT_APPLICABLE, f"the adapter has no method {method}")
    if case is None:
        return result(NOT_APPLICABLE, "the adapter declares nothing that this contract checks")
    if case.error:
        return result(ERROR, case.error)
    if method in adapter.needs_cuda and not torch.cuda.is_available():
        return result(NEEDS_CUDA, adapter.needs_cuda[method])
    try:
        each.check(Guarded(adapter), **case.arguments)
    except NotApplicable as reason:
        return result(NOT_APPLICABLE, str(reason))
    except NeedsCUDA as reason:
        return result(NEEDS_CUDA, str(reason))
    except Violation as violation:
        for documented in adapter.documented:
            if documented.covers(each.name, name):
                return result(DOCUMENTED, f"{violation}. {documented.reason} ({documented.source})")
        return result(FAIL, str(violation))
    except AdapterError as error:
        return result(ERROR, str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, and the exceptions of pytest.skip, pytest.fail and pytest-timeout
        return result(ERROR, describe(error))
    return result(PASS)
