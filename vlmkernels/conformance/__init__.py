"""A conformance suite for GRPO trainers of text and vision-language models: ``pytest --conformance my_adapter.py``."""

from vlmkernels.conformance.adapter import Adapter, Documented, NeedsCUDA, NotApplicable, Sampled
from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample, pad
from vlmkernels.conformance.contract import Result, run
from vlmkernels.conformance.loading import load
from vlmkernels.conformance.models import encode, tiny
from vlmkernels.conformance.objective import (
    add_padding,
    close_holes,
    expected_advantages,
    expected_loss,
    finite_differences,
    first_step,
    loss_and_gradient,
    micro_batches,
    repeat_tokens,
    select_rows,
    set_masked,
)
from vlmkernels.conformance.synthetic import binary_logits, grid, upstream
from vlmkernels.ops.grpo_loss import GRPOLossConfig

__all__ = [
    "Adapter",
    "AdvantageBatch",
    "Documented",
    "GRPOLossConfig",
    "LossBatch",
    "NeedsCUDA",
    "NotApplicable",
    "Result",
    "Sample",
    "Sampled",
    "add_padding",
    "binary_logits",
    "close_holes",
    "encode",
    "expected_advantages",
    "expected_loss",
    "finite_differences",
    "first_step",
    "grid",
    "load",
    "loss_and_gradient",
    "micro_batches",
    "pad",
    "repeat_tokens",
    "run",
    "select_rows",
    "set_masked",
    "tiny",
    "upstream",
]
