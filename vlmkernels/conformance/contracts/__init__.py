"""The contracts, one file per part of a trainer. Importing this package registers them in the order of the report."""

from vlmkernels.conformance.contracts import advantages, model, model_inputs, sampling

__all__ = ["advantages", "model", "model_inputs", "sampling"]
