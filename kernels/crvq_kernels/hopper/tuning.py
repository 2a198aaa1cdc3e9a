"""Whether the wgmma kernel runs, and its block sizes, chosen by shape."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class WgmmaBlocks:
    """What one program of the matrix kernel for many tokens does.

    Attributes:
        rows: output rows, 16 or 32 a warp.
        tokens: rows of `x`, a power of two.
        warps: warps, four to a wgmma.
        quads: fours of virtual groups a step: 1, 2, 4 or 8.
        stages: steps of `x` that are in shared memory or on their way to it.
        splits: programs that share the steps of a tile; with more than 1, a second kernel adds them up.
        int8: whether int8 codebooks are gathered as they are; else the kernel before has made them fp16.
    """

    rows: int
    tokens: int
    warps: int
    quads: int
    stages: int
    splits: int
    int8: bool = True


# Numbers of tokens for which the wgmma kernel runs where it can, in place of "gemm" and "dequantize + matmul": none
# before a GPU has measured it.
WGMMA_TOKENS = range(0)
# By the most tokens: rows, tokens, warps, quads, stages, programs a processor that splits aim at, int8. The launcher
# takes the first; a benchmark times all.
_WGMMA_BLOCKS = {
    32: (
        *((64, 32, 4, 2, 4, 4, True), (64, 32, 4, 2, 4, 8, True), (64, 32, 4, 4, 3, 4, True)),
        *((128, 32, 4, 2, 4, 4, True), (128, 32, 4, 2, 4, 2, True), (64, 32, 4, 2, 4, 4, False)),
        *((128, 32, 4, 2, 4, 4, False),),
    ),
    64: (
        *((64, 64, 4, 2, 4, 4, True), (64, 64, 4, 2, 4, 6, True), (64, 64, 4, 4, 3, 4, True)),
        *((128, 64, 4, 2, 4, 3, True), (128, 64, 4, 2, 4, 1, True), (256, 64, 8, 2, 4, 1, True)),
        *((64, 64, 4, 2, 4, 4, False), (128, 64, 4, 2, 4, 3, False)),
    ),
    128: (
        *((128, 128, 8, 2, 3, 2, True), (128, 128, 8, 2, 3, 1, True), (128, 128, 4, 2, 3, 2, True)),
        *((64, 128, 4, 2, 3, 4, True), (64, 128, 4, 2, 3, 2, True), (256, 128, 8, 2, 3, 1, True)),
        *((128, 128, 8, 2, 3, 2, False), (256, 128, 8, 2, 3, 1, False)),
    ),
    2**31: (
        *((128, 128, 8, 2, 3, 2, True), (128, 128, 8, 2, 3, 1, True), (128, 128, 4, 2, 3, 2, True)),
        *((128, 256, 8, 2, 3, 1, True), (256, 128, 8, 2, 3, 1, True), (64, 256, 4, 2, 3, 2, True)),
        *((128, 128, 8, 2, 3, 2, False), (128, 256, 8, 2, 3, 1, False), (256, 128, 8, 2, 3, 1, False)),
    ),
}
_WGMMA_LEAST_STEPS = 4  # of a program that shares a tile


@functools.cache
def wgmma_blocks(
    num_tokens: int, out_features: int, num_codes: int, num_processors: int, int8: bool
) -> tuple[WgmmaBlocks, ...]:
    """Returns what can be launched for that many tokens and virtual groups, the best first.

    Tiles are split so that all programs are at work at once; `int8` is whether the codebooks are.
    """
    found = []
    for *sizes, programs, as_int8 in next(_WGMMA_BLOCKS[most] for most in _WGMMA_BLOCKS if num_tokens <= most):
        rows, tokens, _, quads, _ = sizes
        tiles = -(-out_features // rows) * -(-num_tokens // tokens)
        most_splits = max(1, -(-num_codes // (4 * quads)) // _WGMMA_LEAST_STEPS)
        splits = min(most_splits, max(1, programs * num_processors // tiles))
        found.append(WgmmaBlocks(*sizes, splits, as_int8 and int8))
    return tuple(dict.fromkeys(found))
