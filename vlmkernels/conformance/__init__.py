"""A conformance suite for GRPO trainers of text and vision-language models: ``pytest --conformance my_adapter.py``."""

from vlmkernels.conformance.adapter import Adapter, Documented, NeedsCUDA, NotApplicable, Sampled
from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample, pad
from vlmkernels.conformance.contract import Result, run
from vlmkernels.conformance.loading import load
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
    "grid",
    "load",
    "pad",
    "run",
    "upstream",
]
