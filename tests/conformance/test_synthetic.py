"""The small inputs that contracts and adapters share."""

import itertools

import pytest
import torch
import torch.distributed as dist

from vlmkernels.conformance.synthetic import binary_logits, grid, one_of, upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_with_given_log_probabilities(dtype):
    logps = torch.tensor([-1e-3, -0.25, -1.0, -6.0, -50.0, -1e4], dtype=dtype, requires_grad=True)
    out = binary_logits(logps).log_softmax(-1)[:, 0]
    (gradient,) = torch.autograd.grad(out.sum(), logps)
    eps = torch.finfo(dtype).eps
    assert ((out - logps).abs() <= 2 * eps * (1 + logps.abs())).all()
    assert ((gradient - 1).abs() <= 2 * eps / (1 - logps.exp())).all()


def test_logits_of_a_token_with_probability_0_or_unknown():
    logits = binary_logits(torch.tensor([-torch.inf, torch.nan]))
    assert logits[0].tolist() == [-torch.inf, 0.0]
    assert logits[1].isnan().all()


def test_grid_is_exact_in_16_bits_and_its_rows_differ():
    values = grid(40, 5)
    assert torch.equal(values, values.bfloat16().float())
    assert all(not torch.equal(first, second) for first, second in itertools.pairwise(values))
    assert grid(0, 3, 5).shape == (0, 3, 5)


def test_upstream_has_both_signs_and_the_dtype():
    values = upstream(torch.zeros(2, 4, dtype=torch.float64))
    assert values.dtype == torch.float64
    assert values.amin() < 0 < values.amax()
    assert (values.flatten().diff() != 0).all()


def test_one_process_of_several():
    with one_of(1):
        assert not dist.is_initialized()
    with one_of(4):
        assert dist.get_world_size() == 4
        assert dist.get_rank() == 0
    assert not dist.is_initialized()


def test_the_process_group_is_left_after_an_error():
    def fail():
        with one_of(2):
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert not dist.is_initialized()
