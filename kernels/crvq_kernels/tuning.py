"""Block sizes of the Triton kernels, chosen by shape.

The numbers keep a tile within the registers of 128 threads on every architecture the tests compile for. They have not
been timed on a GPU. There is one pipeline stage on purpose: with more, Triton turns the codebook gather into
asynchronous copies that bypass the L1 cache, where the codebooks live.
"""

from dataclasses import dataclass

NUM_STAGES = 1


@dataclass(frozen=True)
class Blocks:
    """Tile of one program.

    Attributes:
        tokens: rows of `x`; 1, or at least 16 (the smallest side of a matrix instruction).
        rows: output rows.
        groups: virtual groups per step of the inner loop.
        num_warps: warps per program.
    """

    tokens: int
    rows: int
    groups: int
    num_warps: int


def gemv_blocks(num_tokens: int, in_group_size: int) -> Blocks:
    """Returns the tile of the decode kernel for `num_tokens` rows of `x`."""
    if num_tokens == 1:
        return Blocks(tokens=1, rows=8, groups=512 // in_group_size, num_warps=4)
    return Blocks(tokens=16, rows=32, groups=128 // in_group_size, num_warps=4)


def dequantize_blocks(in_group_size: int) -> Blocks:
    """Returns the tile of the dequantization kernel, which has no token axis."""
    return Blocks(tokens=1, rows=16, groups=256 // in_group_size, num_warps=4)
