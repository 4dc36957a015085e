"""Log-probabilities of completions under a model, its logits never held."""

from contextlib import contextmanager

import torch

from vlmkernels.ops.linear_logps import linear_logps


@contextmanager
def _forward_of(module: torch.nn.Module, forward):
    """Inside, ``module`` runs ``forward`` in place of its own."""
    previous = vars(module).get("forward")  # another wrapper's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous


def logit_arguments(model: torch.nn.Module, head: torch.nn.Module) -> dict[str, float]:
    """What the model does to its logits after its head, as arguments of ``linear_logps``.

    Configurations name a cap (Gemma), a factor (Cohere) or a divisor (Granite) that not every class with such a configuration
    applies: two numbers are sent through to see.
    """
    config = model.config.get_text_config()
    candidates = [{}]
    if cap := getattr(config, "final_logit_softcapping", None):
        candidates.append({"softcap": cap})
    if scale := getattr(config, "logit_scale", None):
        candidates.append({"logit_scale": scale})
    if divisor := getattr(config, "logits_scaling", None):
        candidates.append({"logit_scale": 1 / divisor})

    probe = torch.tensor([1.0, 20.0], device=head.weight.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
    with _forward_of(head, lambda hidden: probe.to(hidden.dtype).expand(1, 1, 2)), torch.no_grad():
        seen = model(input_ids=token, attention_mask=token + 1, use_cache=False).logits.float().flatten()
    for candidate in candidates:
        expected = probe * candidate.get("logit_scale", 1.0)
        if cap := candidate.get("softcap"):
            expected = cap * torch.tanh(expected / cap)
        if torch.allclose(seen, expected, rtol=0.01):
            return candidate
    raise NotImplementedError(f"{type(model).__name__} must pass on, scale or cap its logits, got {seen.tolist()} for [1, 20]")


def completion_logps(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    width: int,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, C), 0 at padding, of the last C = ``width`` tokens of the inputs; with their entropy if asked.

    They are taken where the model would compute logits, in its head: so every parameter is used inside the model's own
    forward pass, and what wraps it (autocast, DDP, LoRA) works as ever.

    Args:
        model: wrapped or not. Gradients go to it.
        inputs: prompts followed by right-padded completions.
        head: the model's language-model head.
        arguments: see ``logit_arguments``.
    """
    results = []

    def logps_for_logits(hidden: torch.Tensor) -> torch.Tensor:
        logps = linear_logps(
            hidden[:, :-1],
            head.weight.to(hidden.dtype),
            inputs["input_ids"][:, -width:],
            bias=None if head.bias is None else head.bias.to(hidden.dtype),
            mask=inputs["attention_mask"][:, -width:].bool(),
            temperature=temperature,
            return_entropy=return_entropy,
            **arguments,
        )
        results.append(logps)
        return (logps[0] if return_entropy else logps).unsqueeze(-1)

    with _forward_of(head, logps_for_logits):
        model(**inputs, use_cache=False, logits_to_keep=width + 1)
    (logps,) = results
    return logps
