"""Other libraries' functions, on this package's kernels: one module per library, which imports that library on use."""
