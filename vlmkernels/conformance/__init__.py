"""A conformance suite for GRPO trainers of text and vision-language models: ``pytest --conformance my_adapter.py``."""

from vlmkernels.conformance.adapter import Adapter, Documented, NeedsCUDA, NotApplicable, Sampled
from vlmkernels.conformance.alone import double, gradients, greedy_alone, last_logps, logps_alone, positions_alone, train
from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample, pad
from vlmkernels.conformance.contract import Result
from vlmkernels.conformance.loading import load
from vlmkernels.conformance.models import encode, scripted, tiny
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
from vlmkernels.conformance.pixels import pixel_gradients
from vlmkernels.conformance.suite import run
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
    "double",
    "encode",
    "expected_advantages",
    "expected_loss",
    "finite_differences",
    "first_step",
    "gradients",
    "greedy_alone",
    "grid",
    "last_logps",
    "load",
    "logps_alone",
    "loss_and_gradient",
    "micro_batches",
    "pad",
    "pixel_gradients",
    "positions_alone",
    "repeat_tokens",
    "run",
    "scripted",
    "select_rows",
    "set_masked",
    "tiny",
    "train",
    "upstream",
]
