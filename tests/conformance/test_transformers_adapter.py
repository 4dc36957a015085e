"""The adapter of transformers' own models passes the contracts that define right values."""

import pytest

from vlmkernels.conformance import load, run
from vlmkernels.conformance.contract import ERROR, FAIL, PASS


@pytest.mark.parametrize("pattern", ["adapter/*", "positions/value", "logps/value"])
def test_the_plain_way_passes(pattern):
    results = run(load("transformers"), pattern)
    assert not [each for each in results if each.status in (FAIL, ERROR)]
    assert sum(each.status == PASS for each in results) > 10


def test_sampling_image_tokens_is_documented():
    results = run(load("transformers"), "sample/image-token")
    assert {each.status for each in results} == {"documented"}
    assert "suppress_tokens" in results[0].message
