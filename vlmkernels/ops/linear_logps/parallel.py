"""Heads whose weight is spread over processes: vocabulary-parallel, and DTensor."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from vlmkernels.ops.checks import require


class VocabParallel(NamedTuple):
    """What a process holds of the vocabulary. Shards may differ in size; together they are [0, size) without overlap.

    Source: https://arxiv.org/abs/1909.08053, section 3.
    """

    group: dist.ProcessGroup
    start: int  # the token of the first row of this process's weight
    size: int  # of the whole vocabulary

    @classmethod
    def of(cls, weight: torch.Tensor, group: dist.ProcessGroup | None = None) -> "VocabParallel":
        """Shards in the order of the ranks; asks all processes for the sizes of theirs, once. Default: the whole world."""
        group = dist.group.WORLD if group is None else group
        sizes = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, len(weight), group=group)
        return cls(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))


def gathered(group, logp, entropy, stats, inverse: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp and entropy over the whole vocabulary from those of its parts, and stats that make a part's softmax the whole's.

    One collective, of four floats per token. With log Z the logarithm of a part's sum of e^z: z of the target is logp + log Z,
    and the mean of z under the part's softmax is log Z - entropy.
    """
    num = logp.numel()
    mine = torch.cat([logp.reshape(num, 1), entropy.reshape(num, 1), stats.reshape(num, 2)], 1)
    parts = mine.new_empty(dist.get_world_size(group) * num, 4)
    dist.all_gather_into_tensor(parts, mine, group=group)
    part_logp, part_entropy, maximum, log_sum = parts.view(dist.get_world_size(group), num, 4).double().unbind(-1)
    # A part may hold no token that is possible, such as the padding of the vocabulary: its logits are all -inf.
    empty = maximum <= torch.finfo(torch.float32).min
    log_z_of_part = torch.where(empty, -torch.inf, maximum * inverse + log_sum)
    log_z = log_z_of_part.logsumexp(0)
    target = torch.where(empty, -torch.inf, part_logp + log_z_of_part).amax(0)  # -inf in the parts that do not hold it
    mean = torch.where(empty, 0, (log_z_of_part - log_z).exp() * (log_z_of_part - part_entropy)).sum(0)
    own = mine[:, 2].double()
    own = torch.where(own <= torch.finfo(torch.float32).min, 0, own)
    stats = torch.stack([own, log_z - own * inverse], -1).view(*logp.shape, 2)
    return (target - log_z).to(logp.dtype).view_as(logp), (log_z - mean).to(logp.dtype).view_as(logp), stats.to(logp.dtype)


def whole(name: str, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A DTensor (FSDP2) gathered, its gradient to be averaged over the processes, as FSDP2 does; others as they are."""
    if parameter is None or type(parameter) in (torch.Tensor, torch.nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(parameter, DTensor):
        return parameter
    rule = "be sharded or replicated over a mesh of one dimension"
    sound = len(parameter.placements) == 1 and (parameter.placements[0].is_shard() or parameter.placements[0].is_replicate())
    require(sound, name, rule, f"placements {parameter.placements} on {parameter.device_mesh}", NotImplementedError)
    gathered = parameter.redistribute(placements=[Replicate()])
    return Mean.apply(gathered.to_local(grad_placements=[Partial()]), parameter.device_mesh.size())


class Mean(torch.autograd.Function):
    """The identity; the gradients of the processes, which are summed next, are divided by their number."""

    @staticmethod
    def forward(ctx, x, processes):
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.processes, None
