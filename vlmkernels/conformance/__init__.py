"""A conformance suite for GRPO trainers of text and vision-language models: ``pytest --conformance my_adapter.py``."""

from vlmkernels.conformance.adapter import Adapter, Documented, NeedsCUDA, NotApplicable, Sampled
from vlmkernels.conformance.alone import double, gradients, greedy_alone, logps_alone, positions_alone
from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample, pad
from vlmkernels.conformance.contract import Result, run
from vlmkernels.conformance.loading import load
from vlmkernels.conformance.models import encode, scripted, tiny
from vlmkernels.conformance.pixels import pixel_gradients
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
    "binary_logits",
    "double",
    "encode",
    "gradients",
    "greedy_alone",
    "grid",
    "load",
    "logps_alone",
    "pad",
    "pixel_gradients",
    "positions_alone",
    "run",
    "scripted",
    "tiny",
    "upstream",
]
