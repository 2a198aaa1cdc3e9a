"""Reading tiled codes inside a Triton kernel; shared by the kernels that gather codebook rows.

All tensors here are written as threads would hold them: one entry per thread along the axis `T`, a few registers along
the other. A thread owns one virtual group of one tile and up to 16 of its output rows, which lie side by side.
"""

import triton
import triton.language as tl

from ..packing import INT8_UNITS

_UNIT = tl.constexpr(1 / INT8_UNITS)


@triton.jit
def decoded(entries):
    """Returns codebook entries as numbers: int8 ones as fp16, which is exact, others as they are."""
    return entries.to(tl.float16) * _UNIT if entries.dtype == tl.int8 else entries


@triton.jit
def load_code_words(tiles_ptr, high_start, cells, first_rows, mask, ROWS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """Reads what `unpack_codes` makes codes of.

    Args:
        tiles_ptr: uint8, the tiled layout of `packing`, aligned to 16 bytes.
        high_start: bytes before the high plane.
        cells: `[T]`, int32, number of the 16 codes: `tile * TILE_GROUPS + group % TILE_GROUPS`.
        first_rows: `[T]`, int32, the first row in its tile, a multiple of `ROWS`.
        mask: `[T]`; words outside read as 0.
        ROWS: rows per thread, 4, 8 or 16.
        HIGH_BITS: bits per code in the high plane.

    Returns:
        `[T, ROWS / 4]`, int32, four low bytes each; and `[T]`, the high bits of all 16 rows, unspecified without any.
    """
    low_ptr = tiles_ptr.to(tl.pointer_type(tl.int32))
    words = (cells * 4 + first_rows // 4)[:, None] + tl.arange(0, ROWS // 4)[None, :]
    low = tl.load(low_ptr + words, mask=mask[:, None], other=0)
    high = cells
    if HIGH_BITS == 1:
        high = tl.load((tiles_ptr + high_start).to(tl.pointer_type(tl.uint16)) + cells, mask=mask, other=0)
    elif HIGH_BITS == 2:
        high = tl.load((tiles_ptr + high_start).to(tl.pointer_type(tl.uint32)) + cells, mask=mask, other=0)
    elif HIGH_BITS == 4:
        high = tl.load((tiles_ptr + high_start).to(tl.pointer_type(tl.uint64)) + cells, mask=mask, other=0)
    return low, high


@triton.jit
def unpack_codes(low, high, first_rows, THREADS: tl.constexpr, ROWS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """Returns the codes of words from `load_code_words`: `[ROWS, T]`, int32."""
    codes = (low[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 255
    codes = tl.reshape(codes, (THREADS, ROWS))
    if HIGH_BITS > 0:
        shifts = (first_rows[:, None] + tl.arange(0, ROWS)[None, :]) * HIGH_BITS
        bits = (high[:, None] >> shifts.to(high.dtype)).to(tl.int32) & ((1 << HIGH_BITS) - 1)
        codes |= bits << 8
    return tl.trans(codes)


@triton.jit
def load_pieces(codebooks_ptr, vectors, THREADS: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr):
    """Gathers codebook rows in pieces of at most 16 bytes of fp16, each read by one thread.

    Args:
        codebooks_ptr: `[num_codebooks, codebook_size, GROUP]`, contiguous.
        vectors: `[ROWS, T]`, int32, which row of the flattened codebooks.

    Returns:
        `[GROUP / PIECE * ROWS * T, PIECE]`, see `decoded`; the piece is the slowest part of axis 0.
    """
    first = vectors[None, :, :] * GROUP + (tl.arange(0, GROUP // PIECE) * PIECE)[:, None, None]
    first = tl.multiple_of(tl.reshape(first, (GROUP // PIECE * vectors.shape[0] * THREADS,)), PIECE)
    return decoded(tl.load(codebooks_ptr + first[:, None] + tl.arange(0, PIECE)[None, :]))
