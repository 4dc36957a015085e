"""Removing forward hooks by their functions, which PyTorch removes by handles only."""

from collections.abc import Callable, Collection
from typing import Any

import torch


def remove_hooks(model: torch.nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Remove the forward hooks and forward pre-hooks of ``model`` and its modules that are among ``functions``."""
    for module in model.modules():
        hooks = module._forward_pre_hooks, module._forward_hooks
        options = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
        for key in [key for kind in hooks for key, hook in kind.items() if hook in functions]:
            for stored in (*hooks, *options):
                stored.pop(key, None)
