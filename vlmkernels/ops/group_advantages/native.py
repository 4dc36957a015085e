"""group_advantages with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import Launcher, address, unless_fp32


class Native(Launcher):
    def unsupported(self, rewards: torch.Tensor) -> str | None:
        return unless_fp32(rewards)

    def fwd(self, inputs, outputs):
        rewards, weights = (t if t is None else t.contiguous() for t in (inputs.rewards, inputs.weights))
        params = self.module.GroupAdvantages(
            num=len(rewards),
            functions=rewards.shape[1],
            num_groups=inputs.num_groups,
            offsets=address(inputs.offsets),
            rewards=address(rewards),
            weights=address(weights),
            scale=inputs.scale,
            baseline=inputs.baseline,
            normalize_first=inputs.normalize_first,
            eps=inputs.eps,
            advantages=address(outputs.advantages),
            total=address(outputs.rewards),
            mean=address(outputs.mean),
            std=address(outputs.std),
            degenerate=address(outputs.degenerate),
        )
        self.launch("group_advantages", params, rewards.device)
