"""Which Triton kernel runs, and its block sizes, chosen by shape.

The numbers keep a tile within the registers of its threads on every architecture the tests compile for, and are the
fastest of those that were timed on an H100 (benchmarks/LOG.md). There is one pipeline stage on purpose: with more,
Triton turns the codebook gather into asynchronous copies that bypass the L1 cache, where the codebooks live.
"""

import functools
from dataclasses import dataclass

import torch

NUM_STAGES = 1


@dataclass(frozen=True)
class GemmBlocks:
    """What one program of the matrix kernel does.

    Attributes:
        tokens: rows of `x`, a multiple of 8 (the narrow side of a matrix instruction).
        rows: output rows, 32 or 64.
        warps: groups of 32 threads, each with its own share of the virtual groups.
        num_warps: warps as the GPU counts them.
    """

    tokens: int
    rows: int
    warps: int
    num_warps: int


@dataclass(frozen=True)
class StageBlocks:
    """What one program of the kernel that reorders `x` does: `channels` of one token."""

    channels: int
    num_warps: int


@dataclass(frozen=True)
class DequantizeBlocks:
    """What one program of the dequantization kernel does.

    Attributes:
        groups: base groups, a power of two.
        thread_rows: output rows of one thread, which owns one group: 4, 8 or 16.
        num_warps: warps per program.
    """

    groups: int
    thread_rows: int
    num_warps: int


@dataclass(frozen=True)
class GemvBlocks:
    """What one program of the lookup-table kernel does.

    Attributes:
        rows: output rows.
        splits: programs that share the slices of the same rows; with more than 1, a second kernel adds them up.
        slices_per_program: slices of `packing.TILE_GROUPS` virtual groups.
        num_warps: warps per program.
    """

    rows: int
    splits: int
    slices_per_program: int
    num_warps: int


@dataclass(frozen=True)
class MmaGatherBlocks:
    """What one program of the CUDA kernel for few tokens does.

    Attributes:
        rows: output rows: 16, 32, 64 or 128.
        warps: warps, each with its own share of the virtual groups.
        ahead: steps of 4 virtual groups whose codes a warp has on their way.
        programs: how many a processor runs at a time, if its shared memory is enough.
        fused: whether every program cuts `x` into digits itself; else a small kernel has done it before.
        dependent: programmatic dependent launch: whether it may start while the kernel ahead still runs; needs an
            NVIDIA GPU of compute capability 9.0 and kernels ahead that are not its weights' writers.
    """

    rows: int
    warps: int
    ahead: int
    programs: int
    fused: bool
    dependent: bool = False


# Rows of a program to its warps. A table costs the same however many rows use it, so more rows are better as long as
# there are enough programs.
_GEMV_WARPS = {
    128: 8,  # small layers; with 4 warps the table alone takes 64 registers of a thread
    256: 8,
    512: 16,  # large layers
}
# The rows to choose from, by factors: those that compile without spills for every group size. With fp32 factors the
# table is made without matrix instructions.
_GEMV_ROWS = {
    "fp16": (128, 256, 512),
    "bf16": (128, 256, 512),
    "bf16x2": (128, 256, 512),
    "tf32": (128, 256),
    "fp32": (256,),
}
# Cycles in which the shared memory of a processor is busy, by the number of accesses: 32 lanes, one bank each.
_TABLE_CYCLES = 800  # of a token and slice: 512 to store it, 128 to read the codebook, the rest for barriers
_START_CYCLES = 1500  # of a program: two dependent loads from DRAM and the first codebook
_SECOND_KERNEL_CYCLES = 2000  # about one microsecond
_MAX_SPLITS = 32


@functools.cache
def gemv_blocks(
    num_tokens: int, out_features: int, num_slices: int, num_processors: int, factors: str = "fp16"
) -> GemvBlocks:
    """Returns how the lookup-table kernel is launched; `factors` as in `gemv.dot_factors`.

    Chosen is what keeps the busiest processor of the GPU busy for the shortest time, by the numbers above: a lookup is
    one access per 32 codes, and the sum over the lanes two per row and token. On an H100 programs take 2 to 3 times as
    long as that, but of all choices none was faster by more than 1 % (8 layers and dtypes, benchmarks/LOG.md).
    """
    best = None
    for rows in _GEMV_ROWS[factors]:
        row_blocks = -(-out_features // rows)
        for wanted_splits in range(1, min(num_slices, _MAX_SPLITS) + 1):
            slices = -(-num_slices // wanted_splits)
            splits = -(-num_slices // slices)
            programs = -(-row_blocks * splits * num_tokens // num_processors)  # of the busiest processor
            program = _START_CYCLES + slices * (_TABLE_CYCLES + rows) + 2 * rows
            cycles = programs * program + (_SECOND_KERNEL_CYCLES if splits > 1 else 0)
            if best is None or cycles < best[0]:
                best = cycles, GemvBlocks(rows, splits, slices, _GEMV_WARPS[rows])
    return best[1]


# Thresholds of `kernel_for`, as measured on an H100: see "Which kernel" in kernels/README.md.
_GEMV_MAX_TOKENS = 2  # each has a table of its own
_GEMV_FEW_CHANNELS = 2048  # up to here the start of a program and the second kernel are most of the time
_GEMV_MAX_CODEBOOK = 256  # entries of a table that fits shared memory beside a second program
_GEMM_MAX_TOKENS = (
    128  # codes are decoded once per 64; writing the dense weight costs as much as decoding 2 to 4 times
)


def kernel_for(num_tokens: int, out_features: int, in_features: int, codebook_size: int) -> str:
    """Returns what multiplies `num_tokens` rows of `x`: "gemv", "gemm" or "dequantize + matmul"."""
    # A table has to serve more rows than it has entries.
    pays = in_features > _GEMV_FEW_CHANNELS and codebook_size <= min(_GEMV_MAX_CODEBOOK, out_features)
    if num_tokens <= _GEMV_MAX_TOKENS and pays:
        return "gemv"
    return "gemm" if num_tokens <= _GEMM_MAX_TOKENS else "dequantize + matmul"


MMA_GATHER_TOKENS = 16  # the most that the CUDA kernel is written for
# Compute capabilities of the GPUs that have measured a kernel: of the H100.
MEASURED = {(9, 0)}
# Up to how many tokens it was at least 1.2 times as fast as Triton's kernels, by the number of codebooks.
_MMA_GATHER_PAYS = {2: 16, 4: 8}
_MMA_GATHER_WIDE, _MMA_GATHER_NARROW = 16384, 2048  # input features
_MMA_GATHER_TALL = 8192  # output features
# By the most tokens: rows, warps, steps ahead, programs, whether fused. The launcher takes the first that fits in
# shared memory; a benchmark times all.
_MMA_GATHER_BLOCKS = {
    2: (
        *((32, 16, 9, 1, True), (32, 16, 5, 2, True), (32, 8, 9, 2, True), (16, 16, 5, 2, True)),
        *((16, 8, 9, 2, True), (64, 16, 5, 1, True), (64, 8, 5, 2, True), (128, 8, 3, 1, True)),
        *((32, 16, 5, 2, False), (32, 16, 9, 1, False)),
    ),
    4: (
        *((32, 16, 9, 1, False), (32, 16, 5, 2, False), (32, 16, 9, 1, True), (32, 16, 5, 2, True)),
        *((32, 8, 9, 2, False), (32, 8, 5, 2, True), (16, 16, 5, 2, False), (64, 16, 5, 1, False)),
        (64, 8, 5, 2, False),
    ),
    8: (
        *((32, 16, 5, 1, False), (32, 16, 5, 1, True), (32, 16, 3, 2, True), (32, 16, 2, 2, False)),
        *((32, 8, 5, 2, False), (32, 8, 5, 2, True), (64, 8, 3, 2, False), (64, 16, 3, 1, False)),
    ),
    16: (
        *((32, 16, 3, 1, False), (32, 16, 3, 1, True), (32, 16, 2, 1, False), (32, 8, 3, 2, False)),
        *((32, 8, 3, 1, True), (64, 8, 1, 2, False), (64, 16, 1, 1, False), (16, 8, 3, 2, False)),
    ),
}
# What is fastest, if not the above, for wide layers, where cutting x costs a program much, for narrow and tall ones.
_MMA_GATHER_FOR_WIDE = {
    2: (64, 16, 5, 1, True),
    4: (64, 16, 5, 1, False),
    8: (64, 16, 3, 1, False),
    16: (64, 16, 1, 1, False),
}
_MMA_GATHER_FOR_NARROW = {2: (32, 8, 9, 2, True), 4: (32, 16, 5, 2, False), 16: (32, 16, 2, 1, False)}
_MMA_GATHER_FOR_TALL = {4: (32, 16, 5, 2, False)}


def mma_gather_pays(capability: tuple[int, int], num_tokens: int, in_features: int, num_codebooks: int) -> bool:
    """Returns whether a GPU has measured that the CUDA kernel is the faster one, for float16 tokens.

    One token of a wide layer is as fast, or nearly, by Triton's tables.
    """
    many = num_tokens > 1 or in_features <= _MMA_GATHER_WIDE
    return capability in MEASURED and many and num_tokens <= _MMA_GATHER_PAYS.get(num_codebooks, 0)


@functools.cache
def mma_gather_blocks(
    num_tokens: int, out_features: int = 4096, in_features: int = 4096
) -> tuple[MmaGatherBlocks, ...]:
    """Returns what can be launched, the best first; all have the same result.

    Programmatic dependent launch was measured for layers that are not wide, and was faster in nearly all of them.
    """
    most = next(tokens for tokens in _MMA_GATHER_BLOCKS if num_tokens <= tokens)
    special = {}
    if in_features > _MMA_GATHER_WIDE:
        special = _MMA_GATHER_FOR_WIDE
    elif in_features < _MMA_GATHER_NARROW:
        special = _MMA_GATHER_FOR_NARROW
    elif out_features > _MMA_GATHER_TALL:
        special = _MMA_GATHER_FOR_TALL
    dependent = in_features <= _MMA_GATHER_WIDE
    first = (special[most],) if most in special else ()
    return tuple(MmaGatherBlocks(*numbers, dependent) for numbers in dict.fromkeys(first + _MMA_GATHER_BLOCKS[most]))


# Programs of 64 rows that keep an H100, of 132 processors, busy.
_GEMM_MANY_PROGRAMS = 192
# Output rows up to which programs of a few tokens are so few that each needs 16 warps.
_GEMM_WIDE_ROWS = 8192
# Output rows up to which more programs, of half as many tokens, are better than fewer.
_GEMM_FEW_ROWS = 2048


def gemm_blocks(num_tokens: int, out_features: int, in_group_size: int, exact: bool, hip: bool) -> GemmBlocks:
    """Returns the tile of the matrix kernel; `exact` for factors in fp32, `hip` for AMD GPUs.

    Splitting the virtual groups between the warps of a program, instead of between programs, fills the GPU without a
    second kernel: 32 rows make 128 programs out of the 4096 rows of a small layer. 64 rows use what was read of `x`
    twice as often, where there are enough of them.
    """
    if exact:  # multiply-adds of single numbers; with 8 warps nothing spills for any group size
        return GemmBlocks(tokens=16, rows=32, warps=4, num_warps=8)
    if hip:  # the smallest matrix instruction is 16 wide, and two of our 32 threads make a warp
        return GemmBlocks(tokens=16 if num_tokens <= 16 else 32, rows=32, warps=8, num_warps=4)

    def many(tokens: int) -> bool:
        return -(-out_features // 64) * -(-num_tokens // tokens) >= _GEMM_MANY_PROGRAMS

    tokens = next((size for size in (8, 16, 32) if num_tokens <= size), 64)
    if tokens <= 16:
        warps = 16 if out_features <= _GEMM_WIDE_ROWS else 8
        return GemmBlocks(tokens, 64 if many(tokens) else 32, warps, num_warps=warps)
    if tokens == 64 and in_group_size < 16 and many(64):  # 128 sums and the codewords of a thread
        return GemmBlocks(64, 64, 4, num_warps=4)
    if many(32):
        return GemmBlocks(32, 64, 4, num_warps=4)
    return GemmBlocks(32 if out_features <= _GEMM_FEW_ROWS else tokens, 32, 8, num_warps=8)


def stage_blocks(scaled: bool) -> StageBlocks:
    """Returns the tile of the kernel that writes `x` in the order of the virtual groups.

    With `scaled`, every program reads its whole token for the largest magnitude, so there are fewer of them.
    """
    return StageBlocks(channels=4096, num_warps=8) if scaled else StageBlocks(channels=1024, num_warps=4)


def dequantize_blocks(in_group_size: int) -> DequantizeBlocks:
    """Returns the tile of the dequantization kernel: 64 values per thread, summed in registers."""
    return DequantizeBlocks(groups=128, thread_rows=64 // in_group_size, num_warps=4)


# Shared memory for one token that every GPU has; a larger one is gathered by PyTorch.
REORDER_MAX_BYTES = 65536


def reorder_warps(channels: int) -> int:
    """Returns the warps of the kernel that puts a token's channels in order: 16 to 64 channels a thread."""
    return 4 if channels <= 4096 else 8 if channels <= 8192 else 16


@dataclass(frozen=True)
class RowsBlocks:
    """What one program of the kernel for int8 rows does: a tile of output rows and tokens, `channels` at a time.

    It gathers nothing, so that its loads can be pipelined in `num_stages`.
    """

    tokens: int
    rows: int
    channels: int
    num_warps: int
    num_stages: int


# Tokens up to which the int8 rows are read straight: faster throughout, for float16 tokens; beyond not measured.
ROWS_MAX_TOKENS = 1024


def rows_blocks(num_tokens: int, element_size: int) -> RowsBlocks:
    """Returns the tile of the kernel for int8 rows; `element_size` is that of a channel of `x`, in bytes."""
    if num_tokens > 64:
        return RowsBlocks(tokens=128, rows=128, channels=128 // element_size, num_warps=8, num_stages=3)
    tokens = next(size for size in (16, 32, 64) if num_tokens <= size)
    return RowsBlocks(tokens, rows=64, channels=256 // element_size, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class SearchBlocks:
    """What one program of the search for codes does: a tile of rows and codewords at a time."""

    rows: int
    codewords: int
    num_warps: int


SEARCH_BLOCKS = SearchBlocks(rows=16, codewords=256, num_warps=4)  # by arithmetic: 32 scores a thread


@functools.cache
def num_processors(device: torch.device) -> int:
    """Returns the multiprocessors of a GPU; on a CPU, where kernels are interpreted, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
