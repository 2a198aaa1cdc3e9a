"""Dequantization kernel: the dense weight of a CRVQ layer, for many tokens, gradients and export."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import TILE_GROUPS, TILE_ROWS, high_bits, num_virtual_groups
from .decode import load_code_words, load_pieces, unpack_codes
from .tuning import NUM_STAGES, dequantize_blocks


@triton.jit
def dequantize_kernel(
    tiles_ptr,
    codebooks_ptr,
    scales_ptr,
    order_ptr,
    weight_ptr,
    N,
    high_start,
    num_row_tiles,
    codebook_size,
    num_codebooks,
    num_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    PERMUTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Writes `ROWS` rows of `BLOCK_G` base groups of `weight[N, K]`, summed over the codebooks in fp32.

    tiles: see `packing`; codebooks: `[num_codebooks, codebook_size, GROUP]`, scales: `[N]`, order: `[K]`; all
    contiguous. With `PERMUTED`, column `j` holds channel `order[j]` and stores are contiguous; without, column `j`
    holds channel `j` and stores are scattered.
    """
    PIECE: tl.constexpr = 8 if GROUP == 16 else GROUP
    PIECES: tl.constexpr = GROUP // PIECE
    COUNT: tl.constexpr = PIECES * ROWS * BLOCK_G

    start = tl.program_id(1) * BLOCK_G
    group = start + tl.arange(0, BLOCK_G)
    base_row = tl.program_id(0) * ROWS
    tile = base_row // 16
    first_row = tl.zeros([BLOCK_G], dtype=tl.int32) + base_row % 16
    group_mask = group < num_groups

    cells = (group // 32 * num_row_tiles + tile) * 32 + group % 32
    low, high = load_code_words(tiles_ptr, high_start, cells, first_row, group_mask, ROWS, HIGH_BITS)
    vectors = unpack_codes(low, high, first_row, BLOCK_G, ROWS, HIGH_BITS)
    weight = load_pieces(codebooks_ptr, vectors, BLOCK_G, GROUP, PIECE).to(tl.float32)  # [COUNT, PIECE]
    if start < num_critical_groups:
        critical = group < num_critical_groups
        for book in range(1, num_codebooks):
            extended = group + num_groups + (book - 1) * num_critical_groups
            cells = (extended // 32 * num_row_tiles + tile) * 32 + extended % 32
            low, high = load_code_words(tiles_ptr, high_start, cells, first_row, critical, ROWS, HIGH_BITS)
            vectors = unpack_codes(low, high, first_row, BLOCK_G, ROWS, HIGH_BITS) + book * codebook_size
            term = load_pieces(codebooks_ptr, vectors, BLOCK_G, GROUP, PIECE).to(tl.float32)
            added = tl.reshape(tl.broadcast_to(critical[None, :], (PIECES * ROWS, BLOCK_G)), (COUNT,))
            weight += tl.where(added[:, None], term, 0.0)

    # Row, group and first channel in its group of every piece.
    piece = tl.arange(0, COUNT)
    row = base_row + piece // BLOCK_G % ROWS
    group = start + piece % BLOCK_G
    channel = piece // (BLOCK_G * ROWS) * PIECE
    mask = (row < N) & (group < num_groups)
    weight *= tl.load(scales_ptr + row, mask=mask, other=0.0).to(tl.float32)[:, None]
    columns = tl.multiple_of(group * GROUP + channel, PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
    if not PERMUTED:
        columns = tl.load(order_ptr + columns, mask=mask[:, None], other=0).to(tl.int32)
    # Written as a product with GROUP, the pitch tells the compiler how stores are aligned.
    ptrs = weight_ptr + (row.to(tl.int64) * (num_groups * GROUP))[:, None] + columns
    tl.store(ptrs, weight.to(weight_ptr.dtype.element_ty), mask=mask[:, None])


def dequantize_weight(
    tiles: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    nbits: int,
    num_critical_groups: int,
    dtype: torch.dtype,
    permuted: bool,
) -> Tensor:
    """Launches the dequantization kernel; arguments as in `reference.dequantize_ref`, but codes tiled.

    Args:
        permuted: True for channels in the order of `channel_order` (multiply with `reorder(x, channel_order)`, the
            faster way), False for their original order.

    Returns:
        `[N, K]`, `dtype`.
    """
    out_features = scales.numel()
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    in_features = channel_order.numel()
    num_groups = in_features // in_group_size
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    high_start = tiles.numel() * 8 // (8 + high_bits(nbits))
    num_tiles = high_start // (TILE_GROUPS * TILE_ROWS)
    blocks = dequantize_blocks(in_group_size)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    grid = (triton.cdiv(out_features, blocks.thread_rows), triton.cdiv(num_groups, blocks.groups))
    dequantize_kernel[grid](
        tiles.contiguous(),
        codebooks.contiguous(),
        scales.contiguous(),
        channel_order.contiguous(),
        weight,
        out_features,
        high_start,
        num_tiles // triton.cdiv(num_codes, TILE_GROUPS),
        codebook_size,
        num_codebooks,
        num_groups,
        num_critical_groups,
        GROUP=in_group_size,
        HIGH_BITS=high_bits(nbits),
        PERMUTED=permuted,
        ROWS=blocks.thread_rows,
        BLOCK_G=blocks.groups,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    return weight
