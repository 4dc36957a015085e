"""Replacements for the GRPO functions of liger-kernel 0.8, with the same arguments, defaults and results.

To patch a program that calls Liger, before or after it imports Liger::

    from vlmkernels.integrations.liger import patch_liger
    patch_liger()  # or, for one block: with patch_liger(): ...

Apart from speed and memory, they differ from Liger as follows:

- Completions of any length, logits of any stride and an advantage per token (B, L) are supported. No kernel is compiled again
  for another length, temperature or epsilon. Masked positions are not read.
- ``loss_type="luspo"`` sums over the mask. Liger also sums over the padding and divides by the padded length. Without padding
  the results are equal.
- All results are finite: log-ratios are clamped to [-20, 20].
- ``importance_sampling_level="sequence"`` works with cispo and sapo too. Other unsupported combinations raise an error that
  names them.
- The entropy of ``LigerFusedLinearScaledCrossEntropyFunction`` is fp32; Liger rounds it to the dtype of the hidden states.
"""

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from vlmkernels.integrations.liger.objective import Objective
from vlmkernels.integrations.patch import Library, Patch
from vlmkernels.ops.arguments import as_indices, as_mask
from vlmkernels.ops.checks import require_device, require_indices
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.ops.linear_grpo_loss import linear_grpo_loss
from vlmkernels.ops.linear_logps import linear_logps

__all__ = [
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "fused_selective_log_softmax",
    "patch_liger",
    "triton_grpo_loss",
]

_CONFIG_FIELDS = {field.name for field in fields(GRPOLossConfig)}


def _logps(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    mask: torch.Tensor | None,
    inplace: bool = False,
) -> torch.Tensor:
    """Return the log-probabilities (B, L) of targets (B, L) under logits (B, L + 1, V), whose last position is not read."""
    count, length = len(logits), logits.shape[1] - 1
    rows = torch.arange(count * (length + 1), device=logits.device).view(count, length + 1)[:, :length]
    return gather_logps(logits, targets, temperature=temperature, mask=mask, rows=rows, inplace_backward=inplace)


@torch.no_grad()
def fused_selective_log_softmax(
    logits: torch.Tensor, input_ids: torch.Tensor, temperature: float = 0.9, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the log-probabilities of tokens, without a gradient.

    Replaces ``liger_kernel.transformers.grpo_loss.fused_selective_log_softmax``.

    Args:
        logits: (B, L + 1, V) of any stride. Position t predicts token t; the last position is not read.
        input_ids: (B, >= L) int64. The last L are the tokens.
        temperature: divides the logits.
        mask: (B, >= L) or None. Where the last L are 0, nothing is read and the result is 0.

    Returns:
        (B, L) fp32.
    """
    length = logits.shape[1] - 1
    targets = input_ids[:, input_ids.shape[1] - length :]
    return _logps(logits, targets, temperature, None if mask is None else mask[:, mask.shape[1] - length :])


def triton_grpo_loss(
    logits: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: torch.Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: torch.Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[torch.Tensor, list[torch.Tensor]] | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute the GRPO objective from logits.

    Replaces ``liger_kernel.transformers.grpo_loss.triton_grpo_loss``. Arguments not listed: see ``vlmkernels.GRPOLossConfig``.

    Args:
        logits: (B, L + 1, V) of any stride. Position t predicts token t of the completion; the last position is not read.
        old_logp, ref_logp: (B, L) or None. ``ref_logp`` is required with beta != 0.
        completion_ids: (B, L) int64.
        advantages: (B,), or (B, L) per token.
        completion_mask: (B, L), 0 on the tokens that do not count. Default: all count.
        inplace: the backward pass writes the gradient over the logits.
        max_completion_length: the divisor of dr_grpo. Default: L.
        reduce: return the scalar loss instead of a loss per token.
        vllm_is_ratio: (B,), (B, 1) or (B, L), >= 0: multiplies the policy term; for vespo, the sequence weight.
        num_items_in_batch: the number of tokens in all micro-batches of all processes. dapo, cispo and vespo divide by this
            number per process. Default: the tokens of this call on all processes.

    Returns:
        With ``reduce``, ``(loss, metrics)``: the scalar loss, and a list of the mean KL term (with beta != 0) and the share of
        tokens that are clipped. Otherwise ``(loss, kl, is_clipped)``, each (B, L) and 0 outside the mask. ``kl`` is None with
        beta = 0. The losses of tokens are differentiable.

    Raises:
        ValueError, TypeError: an argument has a wrong shape or value, or delta is set for a loss without a cap.
    """
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        beta=beta,
        use_bias_correction_kl=use_bias_correction_kl,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        max_completion_length=logits.shape[1] - 1 if max_completion_length is None else max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    if delta is not None and config.loss.surrogate != "ppo_clip":
        raise ValueError(f"delta must be None with loss_type = {loss_type!r}, got {delta}")
    if beta and ref_logp is None:
        raise ValueError(f"ref_logp must be given with beta = {beta}, got None")
    mask = as_mask("completion_mask", completion_mask, logits.device)
    objective = Objective(
        config,
        advantages=advantages,
        mask=torch.ones_like(completion_ids) if mask is None else mask,
        old_logps=old_logp,
        ref_logps=ref_logp,
        policy_weight=vllm_is_ratio,
        num_items=num_items_in_batch,
    )
    logps = _logps(logits, completion_ids, temperature, mask, inplace and logits.requires_grad)
    if not reduce:
        return tuple(objective.token_losses(logps))
    loss, metrics = grpo_loss(logps, **objective.arguments(logps))
    return loss, objective.metrics(logps, metrics.get("kl"))


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Compute the GRPO objective from hidden states.

    Replaces ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``. ``compiled`` and ``chunk_size`` have no effect: nothing is
    compiled, and ``linear_grpo_loss`` chooses the chunks of tokens. Other arguments: see ``vlmkernels.GRPOLossConfig``.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        vars(self).update(settings)  # attributes with Liger's names, which programs change between steps
        _ = self.config  # raises for wrong settings here rather than in the first step

    @property
    def config(self) -> GRPOLossConfig:
        """The objective, from the current values of the attributes."""
        return GRPOLossConfig(**{name: value for name, value in vars(self).items() if name in _CONFIG_FIELDS})

    def forward(
        self,
        _input: torch.Tensor,
        lin_weight: torch.Tensor,
        selected_token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        advantages: torch.Tensor,
        bias: torch.Tensor | None = None,
        ref_per_token_logps: torch.Tensor | None = None,
        old_per_token_logps: torch.Tensor | None = None,
        ref_input: torch.Tensor | None = None,
        ref_weight: torch.Tensor | None = None,
        ref_bias: torch.Tensor | None = None,
        vllm_is_ratio: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Compute the loss and Liger's metrics.

        Args:
            _input: (B, T, H) hidden states, each of which predicts a token.
            lin_weight: (V, H), the weight of the head.
            selected_token_ids: (B, T) int64, the tokens.
            attention_mask: (B, T), 0 on the tokens that do not count.
            advantages: (B,), or (B, T) per token.
            bias: (V,) or None, the bias of the head.
            ref_per_token_logps, old_per_token_logps: (B, T) or None.
            ref_input, ref_weight, ref_bias: hidden states and head of the reference model, used if ``ref_per_token_logps`` is
                None. If both are given, a warning says so.
            vllm_is_ratio, num_items_in_batch: see ``triton_grpo_loss``.

        Returns:
            ``(loss, metrics)``: the scalar loss, and a tuple of the mean KL term (with beta != 0) and the share of tokens that
            are clipped. Without ``use_ref_model`` the KL term is 0. Gradients go to _input, lin_weight and bias.

        Raises:
            ValueError: ``use_ref_model`` without log-probabilities or hidden states of the reference.
        """
        config, mask = self.config, as_mask("attention_mask", attention_mask, _input.device)
        linear = {"temperature": self.temperature, "mask": mask}
        ref_logps = ref_per_token_logps if self.use_ref_model else None
        if not self.use_ref_model:
            config = config.replace(beta=0.0)
        elif ref_logps is None:
            if ref_input is None:
                raise ValueError("ref_per_token_logps or ref_input must be given with use_ref_model, got None")
            with torch.no_grad():
                ref_logps = linear_logps(ref_input, ref_weight, selected_token_ids, bias=ref_bias, **linear)
        elif ref_input is not None:
            warnings.warn("ref_input is not used, because ref_per_token_logps is given too", stacklevel=2)
        objective = Objective(
            config,
            advantages=advantages,
            mask=mask,
            old_logps=old_per_token_logps,
            ref_logps=ref_logps,
            policy_weight=vllm_is_ratio,
            num_items=num_items_in_batch,
        )
        head = (_input, lin_weight, selected_token_ids)
        if config.loss_type == "vespo":  # its policy weight needs the log-probabilities
            logps = linear_logps(*head, bias=bias, **linear)
            loss, metrics = grpo_loss(logps, **objective.arguments(logps))
        else:
            result = linear_grpo_loss(*head, bias=bias, temperature=self.temperature, **objective.arguments())
            loss, metrics, logps, _ = result
        kl = metrics.get("kl")
        if kl is None and self.beta:  # without use_ref_model
            kl = loss.new_zeros(())
        return loss, tuple(objective.metrics(logps, kl))


def _selected_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    selected: torch.Tensor,
    temperature: float,
    logps: torch.Tensor,
) -> torch.Tensor:
    """Return the log-probabilities (M, K) of the tokens ``selected`` (K,), given those of the targets, ``logps`` (M,)."""
    selected = as_indices("selected_token_ids", selected, device=hidden.device)
    require_device("selected_token_ids", selected, hidden.device, "_input")
    if selected.dim() != 1:
        raise ValueError(f"selected_token_ids must be (K,), got {tuple(selected.shape)}")
    require_indices("selected_token_ids", selected, len(weight), "the rows of weight")
    ids = torch.cat([selected, target])
    exists = (ids >= 0) & (ids < len(weight))  # a GPU reads row 0 for the others, and their results are NaN
    rows = torch.nn.functional.embedding(ids.where(exists, 0), weight).float()
    chosen, own = rows.split([len(selected), len(target)])
    hidden = hidden.float()
    # log p(token) = logit(token) - logit(target) + log p(target)
    logits = hidden @ chosen.T - (hidden * own).sum(1, keepdim=True)
    result = logits / temperature + logps.unsqueeze(1)
    return result.masked_fill(~exists[: len(selected)], torch.nan)


class LigerFusedLinearScaledCrossEntropyFunction:
    """Compute the cross-entropy of each token from hidden states.

    Replaces ``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction``.
    """

    @staticmethod
    def apply(
        _input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the cross-entropy, and if requested the entropy and further log-probabilities.

        Args:
            _input: (M, H) hidden states.
            weight: (V, H), the weight of the head.
            target: (M,) integers. The results of rows whose target is ``ignore_index`` are 0.
            temperature: divides the logits.
            ignore_index: the target of rows that are not computed.
            m_tiles_per_cluster: has no effect; sets up Liger's kernel for Hopper GPUs.
            return_entropy: also return the entropy.
            selected_token_ids: (K,) integers or None: also return the log-probabilities of these tokens, for every row.

        Returns:
            The negative log-likelihood (M,); or a tuple with also the entropy (M,) and the log-probabilities (M, K), if
            requested. All are fp32 and differentiable.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or device, or (on the CPU) a token is out of range. On a
                GPU this check would wait for the device: the results of such a token are NaN instead.
        """
        target = as_indices("target", target, device=_input.device)
        mask = target != ignore_index
        require_indices("target", target, len(weight), f"the rows of weight, or ignore_index = {ignore_index}", mask)
        logps, entropy = linear_logps(_input, weight, target, temperature=temperature, mask=mask, return_entropy=True)
        results = [-logps, entropy] if return_entropy else [-logps]
        if selected_token_ids is not None:
            selected = _selected_logps(_input, weight, target.masked_fill(~mask, 0), selected_token_ids, temperature, logps)
            results.append(selected.masked_fill(~mask.unsqueeze(1), 0))
        return results[0] if len(results) == 1 else tuple(results)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "liger_kernel.transformers.grpo_loss:triton_grpo_loss": triton_grpo_loss,
    "liger_kernel.transformers.grpo_loss:fused_selective_log_softmax": fused_selective_log_softmax,
    "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss": LigerFusedLinearGRPOLoss,
    "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction": LigerFusedLinearScaledCrossEntropyFunction,
}


def patch_liger() -> Patch:
    """Replace the functions of ``__all__`` in Liger, and in every module that imported them from Liger.

    Returns:
        The patch. It lasts until its ``undo()`` or the end of a ``with`` block.

    Raises:
        ModuleNotFoundError: Liger is not installed.
        NotImplementedError: the installed version is not supported.
        RuntimeError: Liger is patched already.
    """
    library = Library("patch_liger", "liger-kernel", ("0.8.",))
    library.check_version()
    return Patch("patch_liger", functions=library.find_functions(_REPLACEMENTS))
