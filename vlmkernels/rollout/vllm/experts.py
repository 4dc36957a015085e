"""The experts that vLLM's routers chose, in the layout of ``Rollout.routed_experts``."""

import numpy as np
import torch
from transformers import PreTrainedModel

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.router_replay import ROUTERS, RoutedExperts


def moe_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the decoder's layers that have experts, among all its layers.

    Raises:
        ValueError: there are none.
    """
    layers = base_model(model).get_decoder().layers
    found = [k for k, layer in enumerate(layers) if any(type(module).__name__ in ROUTERS for module in layer.modules())]
    if not found:
        raise ValueError(f"router_replay must be False with a model without experts, got True with {type(model).__name__}")
    return found


def routed_experts(
    prompts: ModelInputs, group: list[int], mask: torch.Tensor, experts: list[np.ndarray], layers: list[int]
) -> RoutedExperts:
    """Return the experts of all tokens but the last of each completion.

    Args:
        prompts: P prompts.
        group: (B,), the prompt of each completion.
        mask: (B, C) bool on the CPU, the tokens of each completion.
        experts: of each completion, (T, L, K) integers for the tokens of its prompt and its own tokens, except the last.
        layers: the indices of the M layers with experts, among the L layers.
    """
    prompt_mask = prompts.inputs["attention_mask"].bool().cpu()
    shape = (len(layers), experts[0].shape[2])
    of_prompts = torch.full((*prompt_mask.shape, *shape), -1, dtype=torch.int16)
    of_completions = torch.full((*mask.shape, *shape), -1, dtype=torch.int16)
    lengths = prompt_mask.sum(1).tolist()
    for k, (prompt, values) in enumerate(zip(group, experts, strict=True)):
        rows = torch.from_numpy(values[:, layers].astype(np.int16))
        of_prompts[prompt, prompt_mask[prompt]] = rows[: lengths[prompt]]
        own = rows[lengths[prompt] :]
        of_completions[k, : len(own)] = own
    return RoutedExperts(of_prompts, of_completions).to(prompts.inputs["input_ids"].device)
