"""The right values of contracts on models: those of the model run on each sample alone, without padding, in fp64."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.models import encode, tiny


def double(model: Any) -> Any:
    """Return a copy of a model that computes in fp64, also in norms, which transformers computes in fp32.

    Rotary angles stay those of fp32: they are part of the model.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: torch.nn.functional.rms_norm(
                x, x.shape[-1:], norm.weight, norm.variance_epsilon
            )
    return model


@torch.no_grad()
def train(model: Any) -> Any:
    """Change all weights of a model in place, as an optimizer does, and return it."""
    for parameter in model.parameters():
        parameter.mul_(1.25)
    return model


@cache
def exact(kind: str) -> tuple[Any, Any]:
    """Return ``tiny(kind)`` in fp64 and its processor, for right values: nothing may change them."""
    model, processor = tiny(kind)
    return double(model), processor


def logits_alone(model: Any, processor: Any, sample: Sample) -> torch.Tensor:
    """Return the logits (C + 1, V) from which the tokens of a completion, and the one after it, are predicted."""
    inputs = encode(processor, [sample], completions=True, device=model.device)
    inputs |= {name: value.to(model.dtype) for name, value in inputs.items() if value.is_floating_point()}
    return model(**inputs, use_cache=False).logits[0, -len(sample.completion_ids) - 1 :]


def logps_alone(model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
    """Return the log-probabilities (C,) of the completion of each sample."""
    return [chosen_logps(logits_alone(model, processor, each), each, temperature) for each in samples]


def chosen_logps(logits: torch.Tensor, sample: Sample, temperature: float) -> torch.Tensor:
    """Return the log-probabilities (C,) of a completion from the result of ``logits_alone``."""
    ids = list(sample.completion_ids)
    return torch.log_softmax(logits[:-1] / temperature, -1)[range(len(ids)), ids]


@torch.no_grad()
def last_logps(model: Any, chunk: Mapping[str, Any], inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the log-probabilities (B, V) of the token after each sample of a micro-batch, padded on the left.

    ``inputs`` are those of the whole batch, whose names are the arguments of the model.
    """
    given = {name: chunk[name] for name in inputs if chunk.get(name) is not None}
    return model(**given, use_cache=False).logits[:, -1].log_softmax(-1)


def gradients(model: Any, logps: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients by the parameters of the sum of the log-probabilities, weighted by 1, 2, 3, ..."""
    model.zero_grad()
    weights = torch.arange(1, sum(map(len, logps)) + 1)
    total = (torch.cat([*logps]).double().cpu() * weights).sum()
    if total.requires_grad:
        total.backward()
    return {name: x.grad.double().cpu() for name, x in model.named_parameters() if x.grad is not None}


def positions_alone(model: Any, processor: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Return the position ids (3, S) of each sample with its completion; the axes are equal for models without M-RoPE."""
    out = []
    for sample in samples:
        inputs = encode(processor, [sample], completions=True, device=model.device)
        if hasattr(model.model, "get_rope_index") and sample.images:
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            out.append(model.model.get_rope_index(**{name: inputs[name] for name in names})[0][:, 0])
        else:
            out.append(torch.arange(inputs["input_ids"].shape[1]).expand(3, -1))
    return out


@torch.no_grad()
def greedy_alone(model: Any, processor: Any, samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Return the most probable token, again and again, for each prompt: up to an end token, or ``max_tokens``."""
    out = []
    for sample in samples:
        ids: list[int] = []
        while len(ids) < max_tokens and model.generation_config.eos_token_id not in ids:
            ids.append(int(logits_alone(model, processor, replace(sample, completion_ids=tuple(ids)))[-1].argmax()))
        out.append(ids)
    return out
