"""What all processes of a run must do alike, or wait for one another forever."""

from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard


def most(accelerator: Accelerator, number: int) -> int:
    """The greatest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


@contextmanager
def gathered(model: torch.nn.Module, head: torch.nn.Module):
    """Inside, the parameters of a model under FSDP2 are whole, so that processes may call it unequally often, without
    gradients; any other model is as it is.

    Args:
        head: its language-model head, which FSDP2 keeps whole between forward and backward pass.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        fully_shard.state(model)._lazy_init()  # so that a part of the model may be called before the whole
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
        for module in (model, head):
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def prepared_reference(accelerator: Accelerator, reference: torch.nn.Module) -> torch.nn.Module:
    """The frozen reference, sharded where the policy is."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)
