"""The adapters of TRL: they load, and cheap contracts have the statuses that docs/conformance/trl.md explains."""

from fnmatch import fnmatchcase

import pytest

pytest.importorskip("trl")

from vlmkernels.conformance.contract import cases_of, run_case
from vlmkernels.conformance.loading import load_all
from vlmkernels.conformance.suite import all_contracts

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTERS = {type(adapter).__name__: adapter for adapter in load_all("trl")}
EQUAL_REWARDS = {"advantages/equal_rewards_rounded:group-*": "fail"}
BNPO = {"loss/accumulation:bnpo-*": "documented", "loss/processes:bnpo-*": "documented"}
SOME_LOSSES = (
    *("loss/value:dapo-token", "loss/value:dapo-token-k3*", "loss/gradient:dapo-token", "loss/empty:grpo-*"),
    *("loss/accumulation:*-token-2", "loss/processes:*-token-2"),
)
SOME_ADVANTAGES = ("advantages/value:*", "advantages/unscored:*", "advantages/equal_rewards_rounded:*")
SOME_LOGITS = ("logits/value:*", "logits/extreme:*", "logits/precision:*", "logits/result_dtype:*", "logits/empty:*")
ALL_LOSSES = ("loss/[!l]*",)  # all but those of long completions
# The contracts that run, as contract:case, and the status of the cases that do not pass.
EXPECTED = {
    "TRL": (
        (*SOME_LOSSES, *SOME_ADVANTAGES, *SOME_LOGITS),
        {
            **BNPO,
            **EQUAL_REWARDS,
            "logits/extreme:banned-bfloat16": "fail",
            "logits/precision:bfloat16-*": "fail",
            "logits/result_dtype:bfloat16-*": "fail",
        },
    ),
    "TRLPatched": (("loss/value:dapo-token", "loss/value:dapo-token-k3*", "loss/accumulation:dapo-*"), {}),
    "TRLRLOO": (("advantages/*",), {}),
    "TRLGMPO": (
        ALL_LOSSES,
        {
            "loss/value:*": "documented",
            "loss/gradient:*": "documented",
            "loss/extreme_ratios:*-clipped": "documented",
            "loss/empty:*-one_*": "documented",
            "loss/empty:*-all_masked*": "fail",
        },
    ),
    "TRLAsyncGRPO": (
        (*ALL_LOSSES, "advantages/*"),
        {"loss/accumulation:*": "fail", "loss/empty:*-all_masked*": "error"},
    ),
    "TRLSDPO": (
        (*SOME_LOSSES, "advantages/*"),
        {
            **BNPO,
            **EQUAL_REWARDS,
            "loss/accumulation:dapo-*": "fail",
            "loss/processes:dapo-*": "fail",
            "advantages/group_of_one:group-*": "fail",
            "advantages/unscored:*": "fail",
            "advantages/value:none-*": "fail",
            "advantages/several_rewards:*": "fail",
        },
    ),
}


def statuses(adapter, patterns) -> dict[str, str]:
    """Return contract:case -> status of the cases that match a pattern and are applicable."""
    found = {}
    for contract in all_contracts():
        for case in cases_of(adapter, contract):
            name = f"{contract.name}:{case.id if case else ''}"
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                found[name] = run_case(adapter, contract, case).status
    return {name: status for name, status in found.items() if status != "not applicable"}


def test_all_adapters_are_listed():
    assert ADAPTERS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_cheap_contracts_have_the_expected_statuses(name):
    patterns, expected = EXPECTED[name]
    found = statuses(ADAPTERS[name], patterns)
    assert "pass" in found.values()
    others = {case: status for case, status in found.items() if status != "pass"}
    explained = {case: status for case, status in others.items() if expected_status(case, expected) == status}
    assert others == explained
    assert {pattern for pattern in expected if any(fnmatchcase(case, pattern) for case in others)} == expected.keys()


def expected_status(case: str, expected: dict[str, str]) -> str | None:
    return next((status for pattern, status in expected.items() if fnmatchcase(case, pattern)), None)
