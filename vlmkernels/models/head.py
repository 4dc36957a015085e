"""Log-probabilities of completions under a model, and their loss: taken in its head, its logits never held."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import is_peft_model

from vlmkernels.models.group import ScoringBatch
from vlmkernels.ops.checks import require
from vlmkernels.ops.linear_grpo_loss import LinearGRPOLossOutput, linear_grpo_loss
from vlmkernels.ops.linear_logps import linear_logps


@contextmanager
def method_replaced(module: torch.nn.Module, name: str, function: Callable):
    """Inside, ``module`` runs ``function`` in place of its method ``name``."""
    previous = vars(module).get(name)  # another wrapper's
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if previous is not None:
            setattr(module, name, previous)


def logit_arguments(model: torch.nn.Module, head: torch.nn.Module) -> dict[str, float]:
    """What the model does to its logits after its head, as arguments of ``linear_logps``.

    Configurations name a cap (Gemma), a factor (Cohere) or a divisor (Granite) that not every class with such a configuration
    applies: two numbers are sent through to see, in evaluation mode.
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
    training = model.training
    model.eval()
    try:
        with method_replaced(head, "forward", lambda hidden: probe.to(hidden.dtype).expand(1, 1, 2)), torch.no_grad():
            seen = model(input_ids=token, attention_mask=token + 1, use_cache=False).logits.float().flatten()
    finally:
        model.train(training)
    for candidate in candidates:
        expected = probe * candidate.get("logit_scale", 1.0)
        if cap := candidate.get("softcap"):
            expected = cap * torch.tanh(expected / cap)
        if torch.allclose(seen, expected, rtol=0.01):
            return candidate
    raise NotImplementedError(f"{type(model).__name__} must pass on, scale or cap its logits, got {seen.tolist()} for [1, 20]")


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The language-model head, whose weight the log-probabilities are taken with. LoRA may adapt it."""
    head = model.get_output_embeddings()
    if is_peft_model(model):
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import TrainableTokensWrapper

        rule = "not have trainable_token_indices of the language-model head, or of an embedding tied to it"
        require(not isinstance(head, TrainableTokensWrapper), "peft_config", rule, type(head).__name__)
        if isinstance(head, BaseTunerLayer):
            plain = isinstance(head, Linear) and not any(head.use_dora.values()) and not any(head.lora_bias.values())
            rule = "adapt the language-model head (target_modules holds it) by plain LoRA alone, without DoRA or a bias"
            require(plain, "peft_config", rule, type(head).__name__)
            dropout = [p for layer in head.lora_dropout.values() if (p := getattr(layer, "p", 0.0)) > 0]
            require(not dropout, "peft_config", "have lora_dropout = 0 on the language-model head", dropout)
    return head


def head_weight(head: torch.nn.Module) -> torch.Tensor:
    """Its weight (V, H), with what LoRA adds to it, differentiable by both."""
    if not hasattr(head, "lora_A"):
        return head.weight
    weight = head.base_layer.weight
    for name in () if head.disable_adapters or head.merged else head.active_adapters:
        weight = weight + head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
    return weight


def in_head(model, batch: ScoringBatch, head: torch.nn.Module, function: Callable) -> tuple:
    """What ``function(hidden (.., .., H), weight, targets (N,), rows=..., bias=...)`` makes of the batch's hidden states, and
    the model's output, whose logits mean nothing.

    It is called where the model would compute logits, in its head: so every parameter is used inside the model's own forward
    pass, and what wraps it (autocast, DDP, LoRA) works as ever.
    """
    results = []

    def in_place_of_logits(hidden: torch.Tensor) -> torch.Tensor:
        results.append(function(hidden, head_weight(head), batch.targets, rows=batch.rows, bias=head.bias))
        first = results[0] if isinstance(results[0], torch.Tensor) else results[0][0]
        return first.reshape(1, -1, 1)

    with method_replaced(head, "forward", in_place_of_logits):
        output = model(**batch.inputs, use_cache=False)
    return results[0], output


def objective_of(counts: torch.Tensor, **objective) -> Callable[..., LinearGRPOLossOutput]:
    """``linear_grpo_loss`` of the tokens of a batch that count, as a function for ``in_head``.

    Args:
        counts: (B, C) bool, the tokens of the batch's completions that count: all N of it, (B, C) row by row.
        objective: further arguments of ``linear_grpo_loss``; what is (B, C) is cut to the tokens that count.
    """
    cu_seqlens = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0)).int()
    cut = {name: x[counts] if isinstance(x, torch.Tensor) and x.shape == counts.shape else x for name, x in objective.items()}
    return partial(linear_grpo_loss, cu_seqlens=cu_seqlens, **cut)


def completion_logps(
    model: torch.nn.Module,
    batch: ScoringBatch,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N,) of the batch's completion tokens; with ``return_entropy`` the entropies too.

    Args:
        model: wrapped or not. Gradients go to it.
        head: the model's language-model head.
        arguments: see ``logit_arguments``.
    """
    function = partial(linear_logps, temperature=temperature, return_entropy=return_entropy, **arguments)
    return in_head(model, batch, head, function)[0]


def completion_loss(
    model: torch.nn.Module,
    batch: ScoringBatch,
    counts: torch.Tensor,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    **objective,
) -> LinearGRPOLossOutput:
    """The loss of a batch, and what comes with it.

    Args:
        model, batch, head, arguments: see ``completion_logps``.
        counts, objective: see ``objective_of``.
    """
    function = objective_of(counts, temperature=temperature, **arguments, **objective)
    result, output = in_head(model, batch, head, function)
    # DeepSpeed prepares for the backward pass of a module where it comes through the module's output.
    return result._replace(loss=result.loss + 0.0 * output.logits.sum())
