"""Log-probabilities and the loss of completions, computed in place of the language-model head, without storing logits.

docs/head.md, "How the loss gets into the model's forward pass", explains how this works.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, overload

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from vlmkernels.models.attention import check_tree_attention
from vlmkernels.models.loading import inference
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.ops.linear_grpo_loss import LinearGRPOLossOutput, linear_grpo_loss
from vlmkernels.ops.linear_logps import linear_logps

# A further term of the loss, computed in place of the head: returns its value and its metrics. See ``call_in_head``.
Term = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


@contextmanager
def replaced_method(module: torch.nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Replace the method ``name`` of ``module`` by ``function``; restore it on exit."""
    previous = vars(module).get(name)  # an earlier replacement; None for the method of the class
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if previous is not None:
            setattr(module, name, previous)


def logit_arguments(model: torch.nn.Module, head: torch.nn.Module) -> dict[str, float]:
    """Return how the model changes its logits after the head, as arguments of ``linear_logps``.

    A configuration can hold a soft cap (Gemma), a factor (Cohere) or a divisor (Granite), but not every model class applies it.
    So this runs the model in evaluation mode on one token, with two known numbers in place of the logits.

    Args:
        model: the model, wrapped by DDP, FSDP2 or DeepSpeed or not.
        head: its language-model head, from ``output_head``.

    Returns:
        ``{"softcap": ...}``, ``{"logit_scale": ...}``, or an empty dict if the model does not change its logits.

    Raises:
        NotImplementedError: the model does something else to its logits.
    """
    config = model.config.get_text_config()
    candidates: list[dict[str, float]] = [{}]
    if cap := getattr(config, "final_logit_softcapping", None):
        candidates.append({"softcap": cap})
    if scale := getattr(config, "logit_scale", None):
        candidates.append({"logit_scale": scale})
    if divisor := getattr(config, "logits_scaling", None):
        candidates.append({"logit_scale": 1 / divisor})

    probe = torch.tensor([1.0, 20.0], device=head.weight.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)

    def probe_logits(hidden: torch.Tensor) -> torch.Tensor:
        return probe.to(hidden.dtype).expand(1, 1, 2)

    with replaced_method(head, "forward", probe_logits), inference(model):
        found = model(input_ids=token, attention_mask=token + 1, use_cache=False).logits.float().flatten()
    for candidate in candidates:
        expected = probe * candidate.get("logit_scale", 1.0)
        if cap := candidate.get("softcap"):
            expected = cap * torch.tanh(expected / cap)
        if torch.allclose(found, expected, rtol=0.01):
            return candidate
    raise NotImplementedError(f"{type(model).__name__} must pass on, scale or cap its logits, got {found.tolist()} for [1, 20]")


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """Return the language-model head of ``model``, with its LoRA adapters if it has any.

    Raises:
        ValueError: the adapters of the head are not plain LoRA without dropout.
    """
    head = model.get_output_embeddings()
    if not is_peft_model(model):
        return head
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            "peft_config must leave trainable_token_indices unset for the language-model head and an embedding tied to it, "
            f"got {type(head).__name__}"
        )
    if isinstance(head, BaseTunerLayer):
        if not isinstance(head, Linear) or any(head.use_dora.values()) or any(head.lora_bias.values()):
            raise ValueError(
                "peft_config must adapt the language-model head with plain LoRA, without DoRA and without a bias, "
                f"got {type(head).__name__}"
            )
        dropout = [p for layer in head.lora_dropout.values() if (p := getattr(layer, "p", 0.0)) > 0]
        if dropout:
            raise ValueError(f"peft_config must have lora_dropout = 0 on the language-model head, got {dropout}")
    return head


def head_weight(head: torch.nn.Module) -> torch.Tensor:
    """Return the weight (V, H) of the head with its active LoRA adapters. Gradients go to the weight and the adapters."""
    if not hasattr(head, "lora_A"):
        return head.weight
    weight = head.base_layer.weight
    if head.disable_adapters or head.merged:
        return weight
    for name in head.active_adapters:
        weight = weight + head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
    return weight


def call_in_head(
    model: torch.nn.Module, batch: ScoringBatch, head: torch.nn.Module, function: Callable[..., Any]
) -> tuple[Any, Any]:
    """Run ``model`` on a batch, and call ``function`` in place of the head.

    Args:
        model: the model, wrapped by DDP, FSDP2 or DeepSpeed or not.
        batch: the inputs, and the tokens to score.
        head: its language-model head.
        function: called once as ``function(hidden (..., H), weight (V, H), targets (N,), rows=(N,), bias=(V,) or None)``.
            Returns a tensor or a tuple that starts with one.

    Returns:
        The result of ``function``, and the output of the model. The logits in that output have no meaning.

    Raises:
        NotImplementedError: the model does not call its head exactly once, for example because it multiplies by the weight.
    """
    results: list[Any] = []
    if "tree_layout" in batch.inputs:
        check_tree_attention(next(module for module in model.modules() if isinstance(module, PreTrainedModel)))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        results.append(function(hidden, head_weight(head), batch.targets, rows=batch.rows, bias=head.bias))
        first = results[0] if isinstance(results[0], torch.Tensor) else results[0][0]
        return first.reshape(1, -1, 1)

    with replaced_method(head, "forward", forward):
        output = model(**batch.inputs, use_cache=False)
    if len(results) != 1:
        raise NotImplementedError(
            f"model must call its head once in a forward pass, got {len(results)} calls of {type(head).__name__} in "
            f"{type(model).__name__}"
        )
    return results[0], output


def packed_grpo_loss(
    loss_mask: torch.Tensor,
    *,
    advantages: torch.Tensor,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    rollout_logps: torch.Tensor | None = None,
    **options: Any,
) -> Callable[..., LinearGRPOLossOutput]:
    """Return a function for ``call_in_head`` that computes ``linear_grpo_loss``.

    Args:
        loss_mask: (B, C) bool, the completion tokens that count in the loss. They must be the tokens that the batch scores.
        advantages: (B,), or (B, C) per token.
        old_logps, ref_logps, rollout_logps: (B, C) or None. Values outside of ``loss_mask`` are not read.
        options: further arguments of ``linear_grpo_loss`` that are not per token.
    """

    @cache
    def places() -> torch.Tensor:  # waits for the device, so only once, and only if a value is selected
        return loss_mask.flatten().nonzero()[:, 0]

    def select(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.flatten()[places()]

    return partial(
        linear_grpo_loss,
        cu_seqlens=torch.nn.functional.pad(loss_mask.sum(1).cumsum(0), (1, 0)).int(),
        advantages=select(advantages) if advantages.dim() == 2 else advantages,
        old_logps=select(old_logps),
        ref_logps=select(ref_logps),
        rollout_logps=select(rollout_logps),
        **options,
    )


def top_entropy_threshold(accelerator: Accelerator, top_quantile: float, entropy: torch.Tensor) -> torch.Tensor:
    """Return the entropy above which the ``top_quantile`` share of the tokens of all ranks lies.

    ``partial(top_entropy_threshold, accelerator, top_quantile)`` can be the ``entropy_threshold`` of ``linear_grpo_loss``.

    Args:
        accelerator: gathers the entropies of all ranks, so every rank must call this function.
        top_quantile: ``GRPOLossConfig.top_entropy_quantile``.
        entropy: (N,), the entropies of this rank's tokens.
    """
    entropy = accelerator.gather(accelerator.pad_across_processes(entropy, pad_index=math.nan))
    entropy = entropy if len(entropy) else entropy.new_zeros(1)
    return entropy.nanquantile(1 - top_quantile)


@overload
def completion_logps(
    model: torch.nn.Module,
    batch: ScoringBatch,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    return_entropy: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def completion_logps(
    model: torch.nn.Module,
    batch: ScoringBatch,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def completion_logps(
    model: torch.nn.Module,
    batch: ScoringBatch,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the log-probabilities of a batch's completion tokens. Gradients go to the parameters of the model.

    Args:
        model: the model, wrapped by DDP, FSDP2 or DeepSpeed or not.
        batch: from ``pack_groups`` or ``pad_completions``.
        head: the language-model head, from ``output_head``.
        arguments: from ``logit_arguments``.
        temperature: divides the logits.
        return_entropy: also return the entropies.

    Returns:
        The log-probabilities (N,), fp32. With ``return_entropy``, ``(logps, entropy)``, each (N,).
    """
    function = partial(linear_logps, temperature=temperature, return_entropy=return_entropy, **arguments)
    return call_in_head(model, batch, head, function)[0]


def with_masked_images(
    loss: Callable[..., LinearGRPOLossOutput],
    loss_mask: torch.Tensor,
    masked: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    **arguments: Any,
) -> LinearGRPOLossOutput:
    """Compute a loss with the log-probabilities of its tokens after masked images, for ``call_in_head``.

    Args:
        loss: from ``packed_grpo_loss``.
        loss_mask: (B, C) bool, the tokens of the loss.
        masked: (B,) bool, the completions whose tokens are scored again: their rows follow those of all tokens of the loss.
        arguments: ``temperature``, and those of ``logit_arguments``.
    """
    is_masked = masked.unsqueeze(1).expand_as(loss_mask)[loss_mask]
    count = len(is_masked)
    found = linear_logps(hidden, weight, targets[count:], rows=rows[count:], bias=bias, **arguments)
    logps = found.new_full((count,), math.nan).masked_scatter(is_masked, found)
    return loss(hidden, weight, targets[:count], rows=rows[:count], bias=bias, masked_logps=logps, **arguments)


def completion_loss(
    model: torch.nn.Module,
    batch: ScoringBatch,
    loss_mask: torch.Tensor,
    *,
    head: torch.nn.Module,
    arguments: dict[str, float],
    temperature: float,
    masked: torch.Tensor | None = None,
    term: Term | None = None,
    **objective: Any,
) -> LinearGRPOLossOutput:
    """Compute the GRPO loss of a batch, with its metrics, log-probabilities and entropies.

    Args:
        model, batch, head, arguments, temperature: see ``completion_logps``.
        term: a function of ``call_in_head`` that returns ``(loss, metrics)``, which are added to those of the GRPO loss.
        loss_mask, objective: see ``packed_grpo_loss``.
        masked: (B,) bool, the completions whose tokens ``batch``, from ``pack_branches`` or ``pad_branches``, scores again with
            masked images. None: it scores all tokens once.
    """
    function = packed_grpo_loss(loss_mask, **objective)
    if masked is not None:
        function = partial(with_masked_images, function, loss_mask, masked)
    function = partial(function, temperature=temperature, **arguments)
    if term is not None:
        function = _with_term(function, term)
    result, output = call_in_head(model, batch, head, function)
    return result._replace(loss=_of_output(result.loss, output))


def term_alone(
    model: torch.nn.Module, batch: ScoringBatch, term: Term, *, head: torch.nn.Module
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute a term of the loss, and its metrics, without the GRPO loss.

    Args:
        model, batch, head: see ``completion_logps``.
        term: see ``completion_loss``.
    """
    (loss, metrics), output = call_in_head(model, batch, head, term)
    return _of_output(loss, output), metrics


def _with_term(function: Callable[..., LinearGRPOLossOutput], term: Term) -> Callable[..., LinearGRPOLossOutput]:
    def both(*tensors: torch.Tensor, **options: Any) -> LinearGRPOLossOutput:
        result = function(*tensors, **options)
        loss, metrics = term(*tensors, **options)
        return result._replace(loss=result.loss + loss, metrics=result.metrics | metrics)

    return both


def _of_output(loss: torch.Tensor, output: Any) -> torch.Tensor:
    """Let the loss depend on the output of a module: DeepSpeed prepares the backward pass of the module only then."""
    return loss + 0.0 * output.logits.sum()
