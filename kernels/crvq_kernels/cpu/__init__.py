"""The compiled CPU kernel: one library without dependencies, built from C when the package is installed.

    cpu_kernel.c   the C code
    binding.py     finds the library, chooses its instruction set, calls it through ctypes

Only `ops` and `crvq_kernels` itself use this, beside tests, benchmarks and `crvq doctor`. `binding` imports `packing`
and nothing else of `crvq_kernels`.
"""

from .binding import INSTRUCTIONS, Layer, library, uses_tables, why_not_better

__all__ = ["INSTRUCTIONS", "Layer", "library", "uses_tables", "why_not_better"]
