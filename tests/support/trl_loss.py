"""TRL's own ``GRPOTrainer._compute_loss`` on given log-probabilities, for differential tests and benchmarks."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import GRPOConfig, GRPOTrainer


class OneProcess:
    """The methods of accelerate's Accelerator that ``_compute_loss`` calls, for one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


# The options that affect the loss, with the defaults of trl.GRPOConfig.
FIELDS = [
    "loss_type", "importance_sampling_level", "beta", "use_bias_correction_kl", "epsilon", "epsilon_high", "delta",
    "max_completion_length", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
    "vespo_lambda_neg", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max", "off_policy_mask_threshold",
    "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "router_aux_loss_coef",
]  # fmt: skip
DEFAULTS = {name: GRPOConfig.__dataclass_fields__[name].default for name in FIELDS}


def trl_args(**options) -> SimpleNamespace:
    """The loss options of a ``trl.GRPOConfig``, without the device check and the milliseconds of its constructor."""
    assert options.keys() <= DEFAULTS.keys()
    fields = SimpleNamespace(**DEFAULTS | options)
    fields.__dataclass_fields__ = DEFAULTS
    return fields


def rollout_ratio(args, old_logps, rollout_logps, mask):
    """The importance ratio that TRL computes after sampling, (B, T) or (B, 1)."""
    log_ratio = torch.where(mask, (old_logps - rollout_logps).nan_to_num(nan=0.0), 0)
    level, bound = args.vllm_importance_sampling_mode.split("_")
    ratio = (log_ratio.sum(1, keepdim=True) if level == "sequence" else log_ratio).exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if bound == "truncate":
        return ratio.clamp(low, high)
    low, high = (0.0 if low is None else low), (torch.inf if high is None else high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0)


def trl_loss(args, logps, advantages, loss_mask, *, old_logps, ref_logps, rollout_logps, entropy, num_items):
    """(loss, metrics) of TRL 1.16 in evaluation mode, without gradient accumulation."""
    masks = {"prompt_mask": loss_mask[:, :0], "completion_mask": loss_mask.to(logps.dtype)}
    inputs = {
        "prompt_ids": loss_mask[:, :0].long(),
        "completion_ids": loss_mask.long(),
        **masks,
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
        "num_items_in_batch": num_items,
    }
    if args.use_vllm:
        inputs["sampling_per_token_logps"] = rollout_logps
        if args.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = rollout_ratio(args, old_logps, rollout_logps, loss_mask)
    trainer = SimpleNamespace(
        args=args,
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        model=SimpleNamespace(training=False),
        _entropy_bonus_enabled=args.entropy_coef != 0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    shared = {name: value for name, value in vars(args).items() if not hasattr(trainer, name)}
    trainer.__dict__.update(shared)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}
