"""Two processes, one of which is not as the other or fails: both stop, with the reason."""

import bad_input
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes without a GPU")


@pytest.mark.parametrize("name", bad_input.CASES)
def test_both_processes_stop_with_the_reason(launched, name):
    _, first, second = bad_input.CASES[name]
    errors = launched[2][name]
    assert errors[0].startswith(first), errors
    assert errors[1].startswith(second), errors
