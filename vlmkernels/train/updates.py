"""Warnings when the weights cannot represent the updates of the optimizer, as bf16 weights with a learning rate of 1e-6.

Adam moves a weight by about the learning rate. A weight w in bf16 has 8 significant bits: an update below half the distance
to the next number, |w| / 512 to |w| / 256, is rounded away, and nothing accumulates. Most weights of a model are near 0.02,
so that most need a learning rate of about 6e-5.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

STEPS = 10  # optimizer steps whose mean share decides about the warning
MAX_WEIGHTS = 2**16  # of a process that are compared, in at most
MAX_TENSORS = 32  # parameters: every tensor costs several small kernels per step
MOVES_BY_LEARNING_RATE = ("adam", "lion", "paged", "fused")  # beginnings of class names of optimizers
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
    """Measures how many of the weights with a gradient, in a sample, each optimizer step changes, and warns if they are few.

    A warning at the start of training says that most 16-bit weights are too coarse for the learning rate of an Adam or Lion
    optimizer; one after ``STEPS`` steps, warm-up not counted, that less than half of the weights changed per step. Under
    DeepSpeed there is no check: its optimizers hold fp32 copies of the weights.

    Args:
        add_metrics: logs the share of a step as ``frac_weights_changed``; NaN for a step without gradients or learning rate.
    """

    def __init__(self, accelerator: Accelerator, add_metrics: Callable[[dict[str, float | torch.Tensor]], None]) -> None:
        self.add_metrics = add_metrics
        self.is_on = accelerator.distributed_type != DistributedType.DEEPSPEED
        self._tracked: list[torch.nn.Parameter] = []
        self._parameters: list[torch.nn.Parameter] = []  # the tracked ones with a gradient in this step
        self._before = self._has_gradient = torch.empty(0)  # their sampled weights, and whether the gradient is not 0
        self._shares: list[torch.Tensor] | None = []  # of the steps so far; None after the warning was due
        self._stride, self._dtypes = 1, set[torch.dtype]()  # of the tracked weights; of all trained weights

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self._shares, self._dtypes = [], {p.dtype for p in trained}
        self._tracked = _spread(trained)
        # An odd stride does not stay in one column of the matrices.
        self._stride = math.ceil(sum(p.numel() for p in self._tracked) / MAX_WEIGHTS) | 1
        halves = [p for p in self._tracked if p.dtype in (torch.bfloat16, torch.float16)]
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()  # accelerate wraps it
        if not (self.is_on and halves and args.process_index == 0 and name.startswith(MOVES_BY_LEARNING_RATE)):
            return
        learning_rate = max(map(_peak, optimizer.param_groups))
        fixed = torch.cat([(rounding_step(self._sample(p.detach())) > learning_rate).to(args.device) for p in halves])
        if (share := fixed.float().mean().item()) > 0.5:
            logger.warning(
                "learning_rate %g is too small for weights in %s: %.0f %% of them cannot change by such an update. %s",
                learning_rate, _names({p.dtype for p in halves}), 100 * share, ADVICE,
            )  # fmt: skip

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._parameters = []
        if self.is_on and any(group["lr"] > 0 for group in optimizer.param_groups):  # warm-up starts with 0
            self._parameters = [p for p in self._tracked if p.grad is not None]
        if self._parameters:
            self._before = self._samples(self._parameters, args.device)
            self._has_gradient = self._samples([p.grad for p in self._parameters], args.device) != 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if not self.is_on:
            return
        share = torch.full((), math.nan, device=args.device)
        if self._parameters and not getattr(optimizer, "step_was_skipped", False):  # by a gradient scaler
            changed = (self._samples(self._parameters, args.device) != self._before) & self._has_gradient
            share = changed.sum() / self._has_gradient.sum()  # NaN without gradients, if no group had different rewards
        self.add_metrics({METRIC: share})
        if self._shares is None:
            return
        if any(group["lr"] >= _peak(group) / 2 for group in optimizer.param_groups):  # warm-up is not judged
            self._shares.append(share)
        if len(self._shares) == STEPS or state.global_step + 1 >= state.max_steps:
            self._judge(args, optimizer)

    def _judge(self, args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
        """Warn once if the mean share is low."""
        mean = torch.stack(self._shares).nanmean().item() if self._shares else math.nan
        self._shares = None
        if mean < 0.5 and args.process_index == 0:
            logger.warning(
                "An optimizer step changes only %.2g %% of the weights with a gradient: weights in %s cannot represent the "
                "updates of learning_rate %g. %s", 100 * mean, _names(self._dtypes), max(map(_peak, optimizer.param_groups)),
                "Use a larger learning_rate" if self._dtypes <= {torch.float32, torch.float64} else ADVICE,
            )  # fmt: skip

    def _samples(self, tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        return torch.cat([self._sample(tensor.detach()).to(device) for tensor in tensors])

    def _sample(self, values: torch.Tensor) -> torch.Tensor:
        """Return every ``_stride``-th value of this process's shard."""
        local = values.to_local() if hasattr(values, "to_local") else values
        return local.reshape(-1)[:: self._stride]


def _spread(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return at most ``MAX_TENSORS`` of the parameters: those that hold weights at equal distances in the whole model."""
    ends = list(accumulate(p.numel() for p in parameters))
    total = ends[-1] if ends else 0
    places = (bisect_right(ends, (2 * k + 1) * total // (2 * MAX_TENSORS)) for k in range(MAX_TENSORS if total else 0))
    return [parameters[place] for place in dict.fromkeys(places)]


def _peak(group: dict) -> float:
    """Return the learning rate of a parameter group after warm-up."""
    return group.get("initial_lr", group["lr"])


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
