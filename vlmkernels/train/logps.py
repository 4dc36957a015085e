"""Log-probabilities of completions under a model, its logits never held."""

from contextlib import contextmanager

import torch

from vlmkernels.ops.linear_logps import linear_logps


@contextmanager
def _head_passes_through(head: torch.nn.Module):
    """Inside, the language-model head returns its input, and the list yielded collects it.

    So the model's own forward runs, whatever wraps it (autocast, DDP, LoRA), without the product with the vocabulary.
    """
    previous, seen = head.__dict__.get("forward"), []

    def forward(hidden):
        seen.append(hidden)
        return hidden

    head.forward = forward
    try:
        yield seen
    finally:
        if previous is None:
            del head.forward
        else:
            head.forward = previous


def _logit_arguments(text_config) -> dict[str, float]:
    """What the model does to its logits: Gemma's cap, Cohere's factor, Granite's divisor."""
    return {
        "softcap": getattr(text_config, "final_logit_softcapping", None),
        "logit_scale": getattr(text_config, "logit_scale", None) or 1 / getattr(text_config, "logits_scaling", 1),
    }


def completion_logps(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    width: int,
    *,
    head: torch.nn.Module,
    text_config,
    temperature: float,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, C), 0 at padding, of the last C = ``width`` tokens of the inputs; with their entropy if asked.

    ``head`` is the model's language-model head, ``text_config`` the configuration of its text part. Gradients go to the model.
    """
    with _head_passes_through(head) as seen:
        model(**inputs, use_cache=False, logits_to_keep=width + 1)
    (hidden,) = seen
    return linear_logps(
        hidden[:, :-1],
        head.weight.to(hidden.dtype),
        inputs["input_ids"][:, -width:],
        bias=None if head.bias is None else head.bias.to(hidden.dtype),
        mask=inputs["attention_mask"][:, -width:].bool(),
        temperature=temperature,
        return_entropy=return_entropy,
        **_logit_arguments(text_config),
    )
