"""Replacements for functions of other libraries that run this package's kernels: one module per library."""
