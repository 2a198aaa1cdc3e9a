"""Decode kernel: a CRVQ linear layer for a handful of tokens, straight from the packed codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import load_codes, load_vectors
from .packing import code_span, num_virtual_groups
from .tuning import NUM_STAGES, gemv_blocks


@triton.jit
def gemv_kernel(
    x_ptr,
    codes_ptr,
    codebooks_ptr,
    scales_ptr,
    order_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    row_bytes,
    codebook_size,
    num_groups,
    num_virtual_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    NBITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Computes `y[M, N]` for one tile of tokens and output rows, summing over all virtual groups in fp32.

    x: `[M, K]`, codes: `[N, row_bytes]`, codebooks: `[num_codebooks, codebook_size, GROUP]`, scales and bias: `[N]`,
    order: `[K]`; all contiguous. `num_critical_groups` must be at least 1, also where no group is critical.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    token_mask = tokens < M
    lane = tl.arange(0, GROUP)

    if BLOCK_M == 1:
        partial = tl.zeros([BLOCK_N, BLOCK_G], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, num_virtual_groups, BLOCK_G):
        groups = start + tl.arange(0, BLOCK_G)
        group_mask = groups < num_virtual_groups
        past_base = groups - num_groups
        extended = past_base >= 0
        source = tl.where(extended, past_base % num_critical_groups, groups)
        codebook_ids = tl.where(extended, 1 + past_base // num_critical_groups, 0)

        codes = load_codes(
            codes_ptr, rows, groups, row_mask[:, None] & group_mask[None, :], row_bytes, NBITS, CODE_BYTES
        )
        vectors = load_vectors(
            codebooks_ptr, codebook_ids[None, :], codes, group_mask[None, :], codebook_size, GROUP
        )  # [BLOCK_N, BLOCK_G, GROUP]
        positions = source[:, None] * GROUP + lane[None, :]
        channels = tl.load(order_ptr + positions, mask=group_mask[:, None], other=0).to(tl.int32)  # [BLOCK_G, GROUP]
        if BLOCK_M == 1:
            x = tl.load(x_ptr + tl.program_id(1).to(tl.int64) * K + channels, mask=group_mask[:, None], other=0.0)
            partial += tl.sum(vectors * x.to(tl.float32)[None, :, :], axis=2)
        else:
            x = tl.load(
                x_ptr + tokens[:, None, None] * K + channels[None, :, :],
                mask=token_mask[:, None, None] & group_mask[None, :, None],
                other=0.0,
            )
            x = tl.reshape(x.to(tl.float32), (BLOCK_M, BLOCK_G * GROUP))
            weight = tl.reshape(vectors, (BLOCK_N, BLOCK_G * GROUP))
            acc += tl.dot(x, tl.trans(weight), input_precision=PRECISION)

    scales = tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    if BLOCK_M == 1:
        acc = tl.sum(partial, axis=1)[None, :]
    y = acc * scales[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + tokens[:, None] * N + rows[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])


def gemv(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
) -> Tensor:
    """Launches the decode kernel; arguments as in `reference.linear_ref`, but `x` is `[M, K]` with `M >= 1`.

    Returns:
        `[M, N]`, in the dtype of `x`.
    """
    num_tokens, in_features = x.shape
    out_features, row_bytes = codes.shape
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    blocks = gemv_blocks(num_tokens, in_group_size)
    # tf32 holds every fp16 and bf16 value exactly; only an fp32 `x` needs full fp32 products.
    exact = x.dtype == torch.float32 or torch.version.hip is not None
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_features, blocks.rows), triton.cdiv(num_tokens, blocks.tokens))
    gemv_kernel[grid](
        x.contiguous(),
        codes.contiguous(),
        codebooks.contiguous(),
        scales.contiguous(),
        channel_order.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        num_tokens,
        out_features,
        in_features,
        row_bytes,
        codebook_size,
        in_features // in_group_size,
        num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups),
        max(num_critical_groups, 1),
        GROUP=in_group_size,
        NBITS=nbits,
        CODE_BYTES=code_span(nbits),
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if exact else "tf32",
        BLOCK_M=blocks.tokens,
        BLOCK_N=blocks.rows,
        BLOCK_G=blocks.groups,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    return y
