"""Time and memory, of kernels, models and the package itself."""
