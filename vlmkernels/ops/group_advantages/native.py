"""group_advantages through the compiled module, for the backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import Launcher, address

# The order of the enums in csrc/common/group_advantages.h.
SCALES = ("none", "group", "batch")
BASELINES = ("none", "mean", "leave_one_out", "pass_at_k")


class Native(Launcher):
    def unsupported(self, rewards: torch.Tensor) -> str | None:
        return None if rewards.dtype == torch.float32 else f"takes float32, got {str(rewards.dtype).removeprefix('torch.')}"

    def fwd(self, rewards, weights, starts, group_size, rules, eps, *outputs):
        scale, baseline, aggregation = rules
        rewards, weights = (t if t is None else t.contiguous() for t in (rewards, weights))
        advantages, total, mean, std, degenerate = map(address, outputs)
        params = self.module.GroupAdvantages(
            num=len(rewards),
            functions=rewards.shape[1],
            num_groups=len(rewards) // group_size if starts is None else len(starts) - 1,
            starts=address(starts),
            rewards=address(rewards),
            weights=address(weights),
            scale=SCALES.index(scale),
            baseline=BASELINES.index(baseline),
            normalize_first=aggregation == "normalize_then_sum",
            eps=eps,
            advantages=advantages,
            total=total,
            mean=mean,
            std=std,
            degenerate=degenerate,
        )
        self.launch("group_advantages", params, rewards.device)
