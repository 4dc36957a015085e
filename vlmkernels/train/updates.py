"""Warnings when the weights cannot represent the updates of the optimizer, as bf16 weights with a learning rate of 1e-6.

Adam moves a weight by about the learning rate. A weight w in bf16 has 8 significant bits: an update below half the distance
to the next number, |w| / 512 to |w| / 256, is rounded away, and nothing accumulates. Most weights of a model are near 0.02,
so that most need a learning rate of about 6e-5.
"""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

STEPS = 10  # optimizer steps whose mean share decides about the warning
MAX_WEIGHTS = 2**20  # of a process that are compared
METRIC = "frac_weights_changed"
ADVICE = (
    "Load the model in float32 (model_init_kwargs={'dtype': 'float32'}, the default) and compute in bf16 (bf16=True), or train "
    "LoRA adapters, which are in float32"
)


def rounding_step(weights: torch.Tensor) -> torch.Tensor:
    """Return, for each weight, the smallest update that surely changes it: half the distance to the next number above."""
    magnitude = weights.abs()
    return (torch.nextafter(magnitude, torch.full_like(magnitude, math.inf)).float() - magnitude.float()) / 2


class UpdateCheck(TrainerCallback):
    """Measures how many of the weights with a gradient each optimizer step changes, and warns if they are few.

    A warning at the start of training says that most 16-bit weights are too coarse for the learning rate of an Adam or Lion
    optimizer; one after ``STEPS`` steps that less than half of the weights changed per step. Under DeepSpeed there is no check:
    its optimizers hold fp32 copies of the weights.

    Args:
        add_metrics: logs the share of a step as ``frac_weights_changed``; NaN for a step without gradients or learning rate.
    """

    def __init__(self, accelerator: Accelerator, add_metrics: Callable[[dict[str, float | torch.Tensor]], None]) -> None:
        self.add_metrics = add_metrics
        self.is_on = accelerator.distributed_type != DistributedType.DEEPSPEED
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # weights, and whether their gradient is not 0
        self._shares: list[torch.Tensor] | None = []  # of the steps so far; None after the warning was due
        self._stride = 1

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        total = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._stride, self._shares = max(1, math.ceil(total / MAX_WEIGHTS)), []
        halves = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        if not (self.is_on and halves and str(args.optim.value).startswith(("adamw", "lion", "paged_adamw", "paged_lion"))):
            return
        fixed = torch.cat([rounding_step(self._sample(p.detach())) > args.learning_rate for p in halves])
        if (share := fixed.float().mean().item()) > 0.5:
            logger.warning(
                "learning_rate %g is too small for weights in %s: %.0f %% of them cannot change by such an update. %s",
                args.learning_rate, _names({p.dtype for p in halves}), 100 * share, ADVICE,
            )  # fmt: skip

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._before = {}
        if self.is_on and any(group["lr"] > 0 for group in optimizer.param_groups):  # warm-up starts with 0
            for name, p in model.named_parameters():
                if p.requires_grad and p.grad is not None:
                    self._before[name] = self._sample(p.detach()).clone(), self._sample(p.grad) != 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.is_on:
            return
        counts = torch.zeros(2, device=args.device)  # changed weights, weights with a gradient
        parameters = dict(model.named_parameters())
        for name, (before, has_gradient) in self._before.items():
            changed = (self._sample(parameters[name].detach()) != before) & has_gradient
            counts += torch.stack([changed.sum(), has_gradient.sum()]).to(counts)
        share = counts[0] / counts[1]  # NaN if there is no gradient, because no group had different rewards
        self.add_metrics({METRIC: share})
        if self._shares is None:
            return
        self._shares.append(share)
        if len(self._shares) == STEPS or state.global_step + 1 >= state.max_steps:
            mean, self._shares = torch.stack(self._shares).nanmean().item(), None
            if mean < 0.5 and args.process_index == 0:
                dtypes = _names({p.dtype for p in parameters.values() if p.requires_grad})
                logger.warning(
                    "An optimizer step changes only %.2g %% of the weights with a gradient: weights in %s cannot represent the "
                    "updates of learning_rate %g. %s", 100 * mean, dtypes, args.learning_rate, ADVICE,
                )  # fmt: skip

    def _sample(self, values: torch.Tensor) -> torch.Tensor:
        """Return every ``_stride``-th value of this process's shard."""
        local = values.to_local() if hasattr(values, "to_local") else values
        return local.reshape(-1)[:: self._stride]


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
