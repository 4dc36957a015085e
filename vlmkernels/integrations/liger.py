"""What liger-kernel 0.8 has for GRPO, on this package's kernels: the same arguments, defaults and results.

One line, before or after Liger is imported, for a program that calls Liger::

    from vlmkernels.integrations.liger import patch_liger
    patch_liger()  # or, until the end of a block: with patch_liger(): ...

Beside speed and memory there are these differences, all on purpose:

- Any length, any stride of the logits, an advantage per token (B, L), nothing compiled for a length, temperature or epsilon;
  positions that the mask leaves out are not multiplied or read.
- ``loss_type="luspo"`` sums over the mask: Liger's sums over the padding too, and divides by the padded length. Without
  padding the two agree.
- Everything is finite: log-ratios count as at most 20 either way.
- ``importance_sampling_level="sequence"`` goes with cispo and sapo too; what does not go together is named in the error.
- The entropy of ``LigerFusedLinearScaledCrossEntropyFunction`` is fp32, not rounded to the dtype of the hidden states.
"""

from dataclasses import fields

import torch
import torch.distributed as dist

from vlmkernels.integrations.patch import Patch
from vlmkernels.ops.checks import require
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.ops.grpo_loss import GRPOLossConfig, grpo_loss
from vlmkernels.ops.grpo_loss.config import MAX_LOG_RATIO, VESPO_MIN_LOG_WEIGHT
from vlmkernels.ops.grpo_loss.reference import KL, SURROGATES, bounded
from vlmkernels.ops.linear_grpo_loss import linear_grpo_loss
from vlmkernels.ops.linear_logps import linear_logps

__all__ = [
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "fused_selective_log_softmax",
    "patch_liger",
    "triton_grpo_loss",
]


_OBJECTIVE = {field.name for field in fields(GRPOLossConfig)}


def _num_items(mask: torch.Tensor, num_items: torch.Tensor | float | None) -> torch.Tensor | float | None:
    """What dapo, cispo and vespo divide by: the tokens of all processes, those given or those here, per process."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is None:
        if processes == 1:
            return None
        num_items = mask.sum().float()
        dist.all_reduce(num_items)
    if isinstance(num_items, torch.Tensor):
        return (num_items.to(mask.device, torch.float32) / processes).clamp(min=1)
    return max(num_items / processes, 1.0)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class _Objective:
    """A configuration, and what Liger takes beside the log-probabilities, made ready for ``grpo_loss``.

    advantages (B,) or (B, T); mask (B, T); old, ref (B, T) or None; correction: Liger's ``vllm_is_ratio``, the weight of the
    policy term, (B,), (B, 1) or (B, T) or None.
    """

    def __init__(self, config, advantages, mask, old, ref, correction, num_items) -> None:
        self.config, self.mask, self.old, self.ref = config, mask != 0, old, ref
        self.advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        self.num_items = _num_items(self.mask, num_items)
        self.correction = None
        if correction is not None:
            shapes = ((len(mask),), (len(mask), 1), tuple(mask.shape))
            rule = f"be (B,), (B, 1) or (B, L), one of {shapes}"
            require(tuple(correction.shape) in shapes, "vllm_is_ratio", rule, tuple(correction.shape))
            correction = correction.reshape(len(mask), -1)
            self.correction = correction if correction.shape[1] == 1 else torch.where(self.mask, correction, 1)

    def arguments(self, logps: torch.Tensor | None = None) -> dict:
        """Keywords of ``grpo_loss``; logps: (B, T), needed for the ``vespo`` of a correction."""
        advantages, rollout, config = self.advantages, None, self.config
        if self.correction is not None and config.loss_type == "vespo":
            # A factor of the sequence's weight, which is the product of its tokens' ratios to the sampler.
            rollout = (logps.detach() if self.old is None else self.old) - self.log_correction()
            config = config.replace(rollout_correction="token_truncate", rollout_clip_max=None)
        elif self.correction is not None:
            # Policy terms are homogeneous in the advantage: a weight >= 0 of one is a factor of the other.
            advantages = advantages * self.correction
        if advantages.shape[1] == 1:
            advantages = advantages.squeeze(1)
        return {
            "advantages": advantages,
            "old_logps": self.old,
            "ref_logps": self.ref,
            "mask": self.mask,
            "rollout_logps": rollout,
            "num_items": self.num_items,
            "config": config,
        }

    def log_correction(self) -> torch.Tensor:
        """(B, T) or (B, 1): the logarithm of the correction, that of a sequence in equal shares for its tokens."""
        log_weight = self.correction.log()
        return log_weight / self.mask.sum(1, keepdim=True).clamp(min=1) if log_weight.shape[1] == 1 else log_weight

    def ratio(self, logps: torch.Tensor) -> torch.Tensor:
        """Of the policy to the one before this step, (B, T); differentiable."""
        log_ratio = logps - (logps.detach() if self.old is None else self.old)
        log_ratio = torch.where(self.mask, log_ratio, 0)
        if self.config.level == "sequence":
            length = self.mask.sum(1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(logps)
        return bounded(log_ratio).exp()

    def clipped(self, ratio: torch.Tensor) -> torch.Tensor:
        """Where the bound on the ratio, and no cap of it, makes a token's term constant; (B, T), 0 or 1."""
        config, row = self.config, self.config.loss.surrogate
        if row not in ("ppo_clip", "cispo"):
            return torch.zeros_like(ratio)
        term = SURROGATES[row].term(ratio, ratio, None, self.advantages, config.replace(delta=None).scalars)
        return torch.where(self.mask, term.low + term.high, 0)

    def metrics(self, logps: torch.Tensor, kl: torch.Tensor | None) -> list[torch.Tensor]:
        """Liger's: the mean KL term where there is one, and the share of the tokens that are clipped."""
        clip_ratio = _mean(self.clipped(self.ratio(logps.detach())), self.mask)
        return [clip_ratio] if kl is None else [kl, clip_ratio]

    def tokens(self, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Of each token, (B, T): its loss, differentiable and of no weight; its KL term or None; whether it is clipped."""
        config, surrogate = self.config, SURROGATES[self.config.loss.surrogate]
        read = lambda x: torch.where(self.mask, x, 0)  # noqa: E731
        ratio, advantages = self.ratio(logps), read(self.advantages)
        log_weight = None
        if config.loss_type == "vespo":
            log_weight = ratio.detach().log()
            if self.correction is not None:
                log_weight = log_weight + self.log_correction().clamp(min=VESPO_MIN_LOG_WEIGHT)
            log_weight = read(log_weight).sum(1, keepdim=True).clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)
        at = ratio if surrogate.through_ratio else ratio.detach()
        loss = surrogate.term(logps, at, log_weight, advantages, config.scalars).loss
        if self.correction is not None and config.loss_type != "vespo":
            loss = loss * self.correction
        kl = None
        if config.beta:
            kl = KL[config.kl](bounded(read(self.ref) - logps))[0]
            kl = kl * ratio if config.use_bias_correction_kl else kl
            loss = loss + config.beta * kl
            kl = read(kl.detach())
        return read(loss), kl, self.clipped(ratio.detach())


def _logps(logits: torch.Tensor, targets: torch.Tensor, temperature: float, mask, inplace: bool = False) -> torch.Tensor:
    """(B, L) of logits (B, L + 1, V), whose last position predicts nothing here."""
    count, length = len(logits), logits.shape[1] - 1
    rows = torch.arange(count * (length + 1), device=logits.device).view(count, length + 1)[:, :length]
    if mask is not None:
        mask = mask != 0
    return gather_logps(logits, targets, temperature=temperature, mask=mask, rows=rows, inplace_backward=inplace)


@torch.no_grad()
def fused_selective_log_softmax(logits: torch.Tensor, input_ids: torch.Tensor, temperature: float = 0.9, mask=None):
    """Log-probabilities of tokens, without a gradient; ``liger_kernel.transformers.grpo_loss.fused_selective_log_softmax``.

    Args:
        logits: (B, L + 1, V) of any stride: position t predicts token t; the last one is not read.
        input_ids: (B, >= L) int64, whose last L are the tokens.
        temperature: divides the logits.
        mask: (B, >= L) or None: where its last L are 0, nothing is read and the result is 0.

    Returns:
        (B, L) fp32.
    """
    length = logits.shape[1] - 1
    recent = lambda x: x[:, x.shape[1] - length :]  # noqa: E731
    return _logps(logits, recent(input_ids), temperature, None if mask is None else recent(mask))


def triton_grpo_loss(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    importance_sampling_level="token",
    reduce=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vllm_is_ratio=None,
    delta=None,
    use_bias_correction_kl=False,
    num_items_in_batch=None,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
):
    """The GRPO objective from logits; ``liger_kernel.transformers.grpo_loss.triton_grpo_loss``.

    Args:
        logits: (B, L + 1, V) of any stride: position t predicts token t of the completion; the last one is not read. With
            ``inplace`` the backward pass writes the gradient over them.
        old_logp, ref_logp: (B, L) or None; ref_logp is needed with beta != 0.
        completion_ids: (B, L) int64.
        advantages: (B,), or (B, L) per token.
        completion_mask: (B, L), 0 on the tokens that do not count; default all count.
        max_completion_length: the divisor of dr_grpo; default L.
        vllm_is_ratio: (B,), (B, 1) or (B, L), >= 0: multiplies the policy term; for vespo, the weight of the sequence.
        num_items_in_batch: the tokens of all micro-batches on all processes, by which, over the number of processes, dapo,
            cispo and vespo divide; default those of this call.
        the rest: see ``vlmkernels.GRPOLossConfig``.

    Returns:
        With ``reduce`` ``(loss, metrics)``: the scalar loss and a list of the mean KL term, where beta != 0, and the share of
        tokens that are clipped. Otherwise ``(loss, kl, is_clipped)``, each (B, L) and 0 outside of the mask, kl None where
        beta is 0; any gradient may come back to the loss of each token.

    Raises:
        ValueError, TypeError: a wrong shape or setting; delta with a loss that has no cap.
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
    capped = config.loss.surrogate == "ppo_clip"
    require(delta is None or capped, "delta", f"be None with loss_type = {loss_type!r}", delta)
    require(not beta or ref_logp is not None, "ref_logp", f"be given with beta = {beta}", None)
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask
    objective = _Objective(config, advantages, mask, old_logp, ref_logp, vllm_is_ratio, num_items_in_batch)
    logps = _logps(logits, completion_ids, temperature, completion_mask, inplace and logits.requires_grad)
    if not reduce:
        return objective.tokens(logps)
    loss, metrics = grpo_loss(logps, **objective.arguments(logps))
    return loss, objective.metrics(logps, metrics.get("kl"))


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The GRPO objective from hidden states; ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``.

    ``compiled`` and ``chunk_size`` change nothing: there is nothing to compile, and a chunk is of tokens that count, as many as
    ``linear_logps`` holds logits for, not of sequences. The rest: see ``vlmkernels.GRPOLossConfig``.
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
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        vars(self).update(settings)  # under Liger's names, to be changed between steps
        _ = self.config  # refuses wrong settings now, not in the first step

    @property
    def config(self) -> GRPOLossConfig:
        return GRPOLossConfig(**{name: value for name, value in vars(self).items() if name in _OBJECTIVE})

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        """
        Args:
            _input: (B, T, H) hidden states, each of which predicts a token.
            lin_weight: (V, H), the head, with bias (V,) or None.
            selected_token_ids: (B, T) int64.
            attention_mask: (B, T), 0 on the tokens that do not count.
            advantages: (B,), or (B, T) per token.
            ref_per_token_logps, old_per_token_logps: (B, T) or None.
            ref_input, ref_weight, ref_bias: of the reference model, for ref_per_token_logps where they are not given.
            vllm_is_ratio, num_items_in_batch: see ``triton_grpo_loss``.

        Returns:
            ``(loss, metrics)``: the scalar loss and a tuple of the mean KL term, where beta != 0, and the share of the tokens
            that are clipped. Without ``use_ref_model`` the KL term is 0. Gradients go to _input, lin_weight and bias.
        """
        config, mask, ref = self.config, attention_mask != 0, None
        head = {"temperature": self.temperature, "mask": mask}
        if self.use_ref_model:
            given = ref_per_token_logps is not None or ref_input is not None
            require(given, "ref_per_token_logps or ref_input", "be given with use_ref_model", None)
            ref = ref_per_token_logps
            if ref is None:
                with torch.no_grad():
                    ref = linear_logps(ref_input, ref_weight, selected_token_ids, bias=ref_bias, **head)
        elif config.beta:
            config = config.replace(beta=0.0)
        objective = _Objective(config, advantages, mask, old_per_token_logps, ref, vllm_is_ratio, num_items_in_batch)
        if config.loss_type == "vespo":
            logps = linear_logps(_input, lin_weight, selected_token_ids, bias=bias, **head)
            loss, metrics = grpo_loss(logps, **objective.arguments(logps))
        else:
            arguments = objective.arguments()
            temperature = self.temperature
            loss, metrics, logps, _ = linear_grpo_loss(
                _input, lin_weight, selected_token_ids, bias=bias, temperature=temperature, **arguments
            )
        kl = metrics.get("kl", loss.new_zeros(()) if self.config.beta else None)
        return loss, tuple(objective.metrics(logps, kl))


class LigerFusedLinearScaledCrossEntropyFunction:
    """Cross-entropy per token from hidden states; ``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction``."""

    @staticmethod
    def apply(
        _input,
        weight,
        target,
        temperature=1.0,
        ignore_index=-100,
        m_tiles_per_cluster=1,
        return_entropy=False,
        selected_token_ids=None,
    ):
        """
        Args:
            _input: (M, H) hidden states.
            weight: (V, H), the head.
            target: (M,) int64; rows whose target is ``ignore_index`` are not computed: their results are 0.
            temperature: divides the logits.
            m_tiles_per_cluster: changes nothing; a setting of Liger's kernel for Hopper.
            selected_token_ids: (K,) int64 or None: also return the log-probabilities of these, for every row.

        Returns:
            The negative log-likelihood (M,), with ``return_entropy`` the entropy (M,), with ``selected_token_ids`` their
            log-probabilities (M, K): alone or as a tuple, all fp32 and differentiable.
        """
        mask = target != ignore_index
        logps, entropy = linear_logps(_input, weight, target, temperature=temperature, mask=mask, return_entropy=True)
        results = [-logps, entropy] if return_entropy else [-logps]
        if selected_token_ids is not None:
            # log p of a token is its logit less the target's, plus log p of the target.
            chosen = torch.cat([selected_token_ids, target.masked_fill(~mask, 0)])
            rows = torch.nn.functional.embedding(chosen, weight).float()
            selected, own = rows.split([len(selected_token_ids), len(target)])
            hidden = _input.float()
            logits = hidden @ selected.T - (hidden * own).sum(1, keepdim=True)
            results.append((logits / temperature + logps.unsqueeze(1)).masked_fill(~mask.unsqueeze(1), 0))
        return results[0] if len(results) == 1 else tuple(results)


_REPLACEMENTS = {
    "liger_kernel.transformers.grpo_loss:triton_grpo_loss": triton_grpo_loss,
    "liger_kernel.transformers.grpo_loss:fused_selective_log_softmax": fused_selective_log_softmax,
    "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss": LigerFusedLinearGRPOLoss,
    "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction": LigerFusedLinearScaledCrossEntropyFunction,
}


def patch_liger() -> Patch:
    """Let everyone who has these four from Liger have ours, until ``undo()`` of the result or the end of a ``with`` block.

    Raises: see ``vlmkernels.integrations.patch.Patch``.
    """
    return Patch("patch_liger", "liger-kernel", ("0.8.",), _REPLACEMENTS)
