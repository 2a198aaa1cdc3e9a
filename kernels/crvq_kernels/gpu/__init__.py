"""The GPU kernels, which read tiled codes, and their launchers: in Triton, and one in CUDA C++.

    tuning.py       which kernel runs, and its block sizes
    decode.py       reading codes and codebook rows inside a kernel
    gemv.py         1 and 2 tokens: a table lookup per code
    gemm.py         a few to many tokens: codes to matrix instructions
    dequant.py      the dense weight
    reorder.py      the channels of many tokens in the order of that weight
    rows.py         a head of int8 rows, which has no codes
    code_search.py  choosing codes, when a model is quantized
    mma_gather.*    1 to 16 tokens on int8 codebooks, in CUDA C++
    nvrtc.py        compiling and launching CUDA C++

A file imports `packing` and files above it, nothing else of `crvq_kernels`. Only `hopper`, `code_search`, `ops` and
`rows` call these, at the first CUDA tensor, beside tests and benchmarks: most import Triton, so this file imports none
of them. A launcher checks nothing, since they have.
"""
