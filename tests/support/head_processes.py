"""The program that a test of linear_logps launches with several processes: the head over processes equals the head of one."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlmkernels import GRPOLossConfig, VocabParallel, linear_grpo_loss, linear_logps
from vlmkernels.integrations.verl import linear_cross_entropy

torch.set_num_threads(1)
SIZES = (17, 5, 9)  # vocabulary sizes of the shards of up to three processes


def inputs(seed: int, vocab: int):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((4, 6, 8), (vocab, 8), (vocab,)))
    targets = torch.randint(vocab, (4, 6), generator=rng)
    return hidden, weight, bias, targets, torch.randn(4, generator=rng)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def vocabulary_parallel(rank: int, processes: int) -> None:
    sizes = SIZES[:processes]
    hidden, weight, bias, targets, advantages = inputs(0, sum(sizes))
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    whole = [x.requires_grad_() for x in (hidden, weight, bias)]
    parts = [
        hidden.detach().clone().requires_grad_(),
        weight.detach()[own].requires_grad_(),
        bias.detach()[own].requires_grad_(),
    ]
    parallel = VocabParallel.from_shard(parts[1])
    assert parallel[1:] == (start, sum(sizes))
    rows = torch.tensor([5, 0, 5, 23])
    for options in ({}, {"temperature": 0.7, "softcap": 3.0}, {"mask": targets % 3 > 0}, {"rows": rows}):
        wanted = targets.flatten()[:4] if "rows" in options else targets
        results = []
        for (h, w, b), group in ((whole, None), (parts, parallel)):
            logp, entropy = linear_logps(h, w, wanted, bias=b, return_entropy=True, vocab_parallel=group, **options)
            results.append([logp, entropy, *gradients((logp * logp.detach()).sum() + entropy.sum(), h, w, b)])
        expected, actual = results
        expected[3], expected[4] = expected[3][own], expected[4][own]
        torch.testing.assert_close(actual, expected)
    # All tokens of a shard have probability 0; then a batch without tokens.
    padded, own_bias = torch.where(torch.arange(sum(sizes)) < sizes[0], bias.detach(), -torch.inf), parts[2].detach()
    possible = targets % sizes[0]
    expected = linear_logps(hidden, weight, possible, bias=padded)
    actual = linear_logps(parts[0], parts[1], possible, bias=padded[own], vocab_parallel=parallel)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual.sum(), parts[0]), gradients(expected.sum(), hidden))
    assert linear_logps(parts[0][:0], parts[1], targets[:0], bias=own_bias, vocab_parallel=parallel).shape == (0, 6)
    for config in (GRPOLossConfig("dapo", entropy_coef=0.1), GRPOLossConfig("luspo")):
        of_whole, of_parts = (
            linear_grpo_loss(h, w, targets, advantages, bias=b, config=config, vocab_parallel=group)
            for (h, w, b), group in ((whole, None), (parts, parallel))
        )
        torch.testing.assert_close(of_parts, of_whole)
        torch.testing.assert_close(gradients(of_parts.loss, *parts)[0], gradients(of_whole.loss, *whole)[0])


def verl(rank: int, processes: int) -> None:
    """verl's function over processes: each has the full result, and their gradients of the hidden states add up."""
    hidden, weight, _, targets, _ = inputs(0, 12 * processes)
    own = slice(12 * rank, 12 * rank + 12)
    results = []
    for w, group in ((weight, None), (weight[own].clone(), dist.group.WORLD)):
        h, w = hidden.clone().requires_grad_(), w.requires_grad_()
        logp, entropy = linear_cross_entropy(h, w, targets, 0.7, "none", group)
        results.append([logp, entropy, *gradients((logp * logp.detach()).sum() + entropy.sum(), h, w)])
    expected, actual = results
    expected[3] = expected[3][own]
    dist.all_reduce(actual[2])
    torch.testing.assert_close(actual, expected)


def fsdp(rank: int, processes: int) -> None:
    """A sharded weight, by itself and in the forward pass of its sharded module: gradients are means over processes."""
    mesh = init_device_mesh("cpu", (processes,))
    head = torch.nn.Linear(8, 31)
    with torch.no_grad():
        head.weight.copy_(inputs(1, 31)[1])
        head.bias.copy_(inputs(1, 31)[2])
    expected = torch.zeros_like(head.weight)
    for other in range(processes):
        hidden, _, _, targets, advantages = inputs(other, 31)
        expected += gradients(linear_grpo_loss(hidden, head.weight, targets, advantages, bias=head.bias).loss, head.weight)[0]
    fully_shard(head, mesh=mesh)
    hidden, _, _, targets, advantages = inputs(rank, 31)
    linear_grpo_loss(hidden, head.weight, targets, advantages, bias=head.bias).loss.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected / processes)
    head.zero_grad()
    head.forward = lambda x: linear_grpo_loss(x, head.weight, targets, advantages, bias=head.bias).loss
    head(hidden).backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected / processes)


def unsupported_placements(rank: int, processes: int) -> None:
    from torch.distributed.tensor import DTensor, Partial

    hidden, weight, _, targets, _ = inputs(0, 31)
    weight = DTensor.from_local(weight, init_device_mesh("cpu", (processes,)), [Partial()])
    try:
        linear_logps(hidden, weight, targets)
    except NotImplementedError as error:
        assert "weight must be sharded or replicated over a mesh of one dimension, got placements" in str(error)  # noqa: PT017
    else:
        raise AssertionError("partial placements raised no error")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for check in (vocabulary_parallel, verl, fsdp, unsupported_placements):
        check(dist.get_rank(), dist.get_world_size())
    dist.barrier()
    print("equal to one process", flush=True)
    os._exit(0)  # a gloo thread that needs the interpreter while it shuts down would abort the process
