"""Heads whose weight is sharded over processes: vocabulary-parallel, and DTensor."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class VocabParallel(NamedTuple):
    """The part of the vocabulary that a process holds. The parts cover [0, size) without overlap; they may differ in size.

    Source: https://arxiv.org/abs/1909.08053, section 3.
    """

    group: dist.ProcessGroup
    start: int  # the token id of the first row of this process's weight
    size: int  # the size of the whole vocabulary

    @classmethod
    def from_shard(cls, weight: torch.Tensor, group: dist.ProcessGroup | None = None) -> "VocabParallel":
        """Return the part of this process if the parts are in the order of the ranks. Gathers their sizes from all processes.

        Args:
            weight: (V of this process, H).
            group: the processes that hold the parts. Default: all processes.
        """
        group = dist.group.WORLD if group is None else group
        assert group is not None
        sizes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, len(weight), group=group)
        return cls(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))


def gathered(
    group: dist.ProcessGroup, logp: torch.Tensor, entropy: torch.Tensor, stats: torch.Tensor, inverse: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logp, entropy and stats over the whole vocabulary from those of this process's part.

    It runs one all-gather of four floats per token. Let Z be the sum of e^z over a part. Then z of the target is logp + log Z,
    and the mean of z under the softmax of the part is log Z - entropy.
    """
    num = logp.numel()
    mine = torch.cat([logp.reshape(num, 1), entropy.reshape(num, 1), stats.reshape(num, 2)], 1)
    parts = mine.new_empty(dist.get_world_size(group) * num, 4)
    dist.all_gather_into_tensor(parts, mine, group=group)
    part_logp, part_entropy, maximum, log_sum = parts.view(dist.get_world_size(group), num, 4).double().unbind(-1)
    # All logits of a part are -inf if it holds no possible token, for example only padding of the vocabulary.
    empty = maximum <= torch.finfo(torch.float32).min
    log_z_of_part = torch.where(empty, -torch.inf, maximum * inverse + log_sum)
    log_z = log_z_of_part.logsumexp(0)
    target = torch.where(empty, -torch.inf, part_logp + log_z_of_part).amax(0)  # -inf in the parts that do not hold it
    mean = torch.where(empty, 0, (log_z_of_part - log_z).exp() * (log_z_of_part - part_entropy)).sum(0)
    own = mine[:, 2].double()
    own = torch.where(own <= torch.finfo(torch.float32).min, 0, own)
    stats = torch.stack([own, log_z - own * inverse], -1).view(*logp.shape, 2)
    return (target - log_z).to(logp.dtype).view_as(logp), (log_z - mean).to(logp.dtype).view_as(logp), stats.to(logp.dtype)


def gather_dtensor(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor; its gradient is averaged over the processes, as in FSDP2. Other tensors are returned unchanged."""
    if type(parameter) in (torch.Tensor, torch.nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(parameter, DTensor):
        return parameter
    placements = parameter.placements
    if len(placements) != 1 or not (placements[0].is_shard() or placements[0].is_replicate()):
        raise NotImplementedError(
            f"{name} must be sharded or replicated over a mesh of one dimension,"
            f" got placements {placements} on {parameter.device_mesh}"
        )
    replicated = parameter.redistribute(placements=[Replicate()])
    out: torch.Tensor = Mean.apply(replicated.to_local(grad_placements=[Partial()]), parameter.device_mesh.size())
    return out


class Mean(torch.autograd.Function):
    """Return the input; divide its gradient by the number of processes, over which ``to_local`` sums it next."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, processes: int) -> torch.Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient / ctx.processes, None
