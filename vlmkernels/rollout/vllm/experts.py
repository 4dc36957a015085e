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
        ValueError: there are none, or a layer has several routers.
    """
    plain = base_model(model)
    counts = [sum(type(module).__name__ in ROUTERS for module in layer.modules()) for layer in plain.get_decoder().layers]
    name = type(plain).__name__
    if not any(counts):
        raise ValueError(f"router_replay must be False with a model without experts, got True with {name}")
    if max(counts) > 1:
        # vLLM 0.32 stores the experts of both routers at the first tokens of a batch, so that one overwrites the other.
        raise ValueError(
            "router_replay must be False with use_vllm and a model with separate routers for images and text, got True with "
            f"{name}"
        )
    return [k for k, count in enumerate(counts) if count]


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
