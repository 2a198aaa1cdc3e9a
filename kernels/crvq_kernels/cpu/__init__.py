"""The compiled CPU kernel: one library without dependencies, built from C when the package is installed.

    numbers.h                      the three float types
    layer.h, layer.c               what a call asks for, and how its codes lie in memory
    instruction_set.h              what an instruction set fills in
    float_tables.h, dense_rows.h   plain C that each of them compiles with its own instructions
    code_search.h                  the same for the search for codes when a model is quantized
    int8_rows.h                    the same for the product with rows of int8 numbers
    scalar.c, avx2.c, vbmi.c       the instruction sets
    avx512bw.c, neon.c             two more, which only CRVQ_CPU chooses: their speed has not been measured
    avx512.h, avx2.h, scalar.h     what one of them takes from another
    instruction_set.c              the list of them, and which is the best here
    pool.h, pool.c                 threads
    call.h, call.c                 the functions that Python calls: which thread does what, in which memory
    code_search.c, int8_rows.c     the search and the product, shared out over threads
    address.py                     the one check that every address passes on its way to C
    binding.py                     finds the library, chooses its instruction set, calls it through ctypes
    code_search.py, rows.py        call the search and the product
    processor.py                   what else this processor has

Only `ops`, `crvq_kernels.code_search`, `crvq_kernels.rows` and `crvq_kernels` itself use this, beside tests,
benchmarks and `crvq doctor`. `binding` imports `packing` and nothing else of `crvq_kernels`, `address` and `processor`
nothing. A new instruction set is a file of C, its number in `instruction_set.h`, a line in `instruction_set.c`, and
its name in `binding.INSTRUCTIONS`.
"""

from .binding import INSTRUCTIONS, Layer, library, uses_tables, why_not_better
from .processor import multiplies_bfloat16

__all__ = ["INSTRUCTIONS", "Layer", "library", "multiplies_bfloat16", "uses_tables", "why_not_better"]
