"""Dequantization kernel: the dense weight of a CRVQ layer, for many tokens, gradients and export."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import load_codes, load_vectors
from .packing import code_span
from .tuning import NUM_STAGES, dequantize_blocks


@triton.jit
def dequantize_kernel(
    codes_ptr,
    codebooks_ptr,
    scales_ptr,
    order_ptr,
    weight_ptr,
    N,
    row_bytes,
    codebook_size,
    num_codebooks,
    num_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    NBITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Writes one tile of `weight[N, K]`: `BLOCK_N` rows of `BLOCK_G` base groups, summed over the codebooks in fp32.

    codes: `[N, row_bytes]`, codebooks: `[num_codebooks, codebook_size, GROUP]`, scales: `[N]`, order: `[K]`; all
    contiguous. With `PERMUTED`, column `j` holds channel `order[j]` and stores are contiguous; without, column `j`
    holds channel `j` and stores are scattered.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_G
    groups = start + tl.arange(0, BLOCK_G)
    row_mask = rows < N
    group_mask = groups < num_groups
    mask = row_mask[:, None] & group_mask[None, :]

    codes = load_codes(codes_ptr, rows, groups, mask, row_bytes, NBITS, CODE_BYTES)
    weight = load_vectors(codebooks_ptr, 0, codes, mask, codebook_size, GROUP)  # [BLOCK_N, BLOCK_G, GROUP]
    if start < num_critical_groups:
        critical = mask & (groups < num_critical_groups)[None, :]
        for book in range(1, num_codebooks):
            extended = groups + num_groups + (book - 1) * num_critical_groups
            codes = load_codes(codes_ptr, rows, extended, critical, row_bytes, NBITS, CODE_BYTES)
            weight += load_vectors(codebooks_ptr, book, codes, critical, codebook_size, GROUP)
    weight *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None, None]

    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_G, GROUP]
    if not PERMUTED:
        columns = tl.load(order_ptr + columns, mask=group_mask[:, None], other=0).to(tl.int32)
    # Written as a product with GROUP, the pitch tells the compiler how stores are aligned.
    ptrs = weight_ptr + rows[:, None, None] * (num_groups * GROUP) + columns[None, :, :]
    tl.store(ptrs, weight.to(weight_ptr.dtype.element_ty), mask=mask[:, :, None])


def dequantize_weight(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    nbits: int,
    num_critical_groups: int,
    dtype: torch.dtype,
    permuted: bool,
) -> Tensor:
    """Launches the dequantization kernel; arguments as in `reference.dequantize_ref`.

    Args:
        permuted: True for channels in the order of `channel_order` (multiply with `x.index_select(-1, channel_order)`,
            the faster way), False for their original order.

    Returns:
        `[N, K]`, `dtype`.
    """
    out_features, row_bytes = codes.shape
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    in_features = channel_order.numel()
    num_groups = in_features // in_group_size
    blocks = dequantize_blocks(in_group_size)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(out_features, blocks.rows), triton.cdiv(num_groups, blocks.groups))
    dequantize_kernel[grid](
        codes.contiguous(),
        codebooks.contiguous(),
        scales.contiguous(),
        channel_order.contiguous(),
        weight,
        out_features,
        row_bytes,
        codebook_size,
        num_codebooks,
        num_groups,
        num_critical_groups,
        GROUP=in_group_size,
        NBITS=nbits,
        CODE_BYTES=code_span(nbits),
        PERMUTED=permuted,
        BLOCK_N=blocks.rows,
        BLOCK_G=blocks.groups,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    return weight
