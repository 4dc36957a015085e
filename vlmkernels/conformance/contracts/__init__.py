"""The contracts, one file per part of a trainer. Importing this package registers them in the order of the report."""

from vlmkernels.conformance.contracts import advantages, logps

__all__ = ["advantages", "logps"]
