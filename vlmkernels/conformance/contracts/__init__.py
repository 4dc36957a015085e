"""The contracts, one file per part of a trainer. Importing this package registers them in the order of the report."""

from vlmkernels.conformance.contracts import adapter, advantages, logps, loss, model, model_inputs, sampling

__all__ = ["adapter", "advantages", "logps", "loss", "model", "model_inputs", "sampling"]
