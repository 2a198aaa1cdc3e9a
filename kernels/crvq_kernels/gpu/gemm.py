"""Matrix kernel: a CRVQ linear layer for few to many tokens, from codes straight to matrix instructions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import TILE_GROUPS, TILE_ROWS, high_bits, num_virtual_groups
from .decode import decoded, load_code_words, load_pieces, unpack_codes
from .tuning import NUM_STAGES, gemm_blocks, stage_blocks


@triton.jit
def stage_kernel(
    x_ptr,
    order_ptr,
    codebooks_ptr,
    staged_ptr,
    unscale_ptr,
    decoded_ptr,
    K,
    num_entries,
    width,
    num_virtual_groups,
    num_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    DECODE: tl.constexpr,
    MATRIX_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes `BLOCK` channels of one token in the order of the virtual groups, padding groups as 0.

    x: `[M, K]`, order: `[K]`, staged: `[M, width]`; all contiguous. `num_critical_groups` must be at least 1. With
    `SCALED`, a token is multiplied by the power of two that puts its largest magnitude in [2**14, 2**15), where fp16
    holds a bfloat16 exactly unless it is 2**28 times smaller than the largest; `unscale[M]`, fp32, is the inverse.

    With `DECODE`, the programs of the first token also write the `num_entries` int8 entries of the codebooks as fp16:
    once here, and not at every code that `gemm_kernel` reads.

    With `MATRIX_ORDER`, for groups of 8, the channels of every four groups lie in the order of `k` in a matrix
    instruction, see "gemm" in kernels/README.md.
    """
    token = tl.program_id(0).to(tl.int64)
    if DECODE:
        if token == 0:
            for start in range(tl.program_id(1) * BLOCK, num_entries, tl.num_programs(1) * BLOCK):
                entry = start + tl.arange(0, BLOCK)
                entries = tl.load(codebooks_ptr + entry, mask=entry < num_entries, other=0)
                tl.store(decoded_ptr + entry, decoded(entries), mask=entry < num_entries)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = channel // GROUP
    element = channel % GROUP
    if MATRIX_ORDER:
        # k = 16 h + 8 b + 2 q + j of 32: channel 4 h + 2 b + j of the q-th of four groups
        group = channel // 32 * 4 + channel % 8 // 2
        element = channel % 32 // 8 * 2 + channel % 2
    past_base = group - num_groups
    source = tl.where(past_base >= 0, past_base % num_critical_groups, group)
    mask = group < num_virtual_groups
    place = tl.load(order_ptr + source * GROUP + element, mask=mask, other=0).to(tl.int32)
    x = tl.load(x_ptr + token * K + place, mask=mask, other=0.0)
    if SCALED:
        x = x.to(tl.float32)
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, K, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            row = tl.load(x_ptr + token * K + columns, mask=columns < K, other=0.0)
            largest = tl.maximum(largest, tl.abs(row.to(tl.float32)))
        exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23  # biased by 127
        exponent = tl.minimum(268 - exponent, 253)
        x *= (exponent << 23).to(tl.float32, bitcast=True)
        tl.store(unscale_ptr + token, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(staged_ptr + token * width + channel, x.to(staged_ptr.dtype.element_ty), mask=channel < width)


@triton.jit
def sum_warps(acc):
    """Returns the sum over axis 0 of `[WARPS, ROWS, TOKENS]`, a power of two of warps.

    Halving makes the compiler hand all terms of a sum to one thread in a single exchange through shared memory;
    `tl.sum` takes one per 16 bytes of a thread.
    """
    for _ in tl.static_range(5):
        if acc.shape[0] > 1:
            pairs = tl.reshape(acc, (2, acc.shape[0] // 2, acc.shape[1], acc.shape[2]))
            first, second = tl.split(tl.permute(pairs, (1, 2, 3, 0)))
            acc = first + second
    return tl.reshape(acc, (acc.shape[1], acc.shape[2]))


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    staged_ptr,
    unscale_ptr,
    tiles_ptr,
    codebooks_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    width,
    high_start,
    num_row_tiles,
    num_padded_groups,
    codebook_size,
    num_codebooks,
    num_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    WARPS: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes `y[M, N]` for `BLOCK_M` tokens and `WARP_ROWS` output rows; the warps share out the virtual groups.

    staged: `[M, width]` and unscale: `[M]`, from `stage_kernel`; tiles: see `packing`; codebooks: `[num_codebooks,
    codebook_size, GROUP]`, scales and bias: `[N]`; all contiguous. `num_critical_groups` must be at least 1.

    Indices are those of the operands of an NVIDIA matrix instruction, so that what a thread loads is what it
    multiplies, see "gemm" in kernels/README.md. Nothing depends on it but speed.
    """
    THREADS: tl.constexpr = WARPS * 32
    ROWS: tl.constexpr = WARP_ROWS // 8  # per thread
    TOKENS: tl.constexpr = BLOCK_M // 8  # per thread
    PIECE: tl.constexpr = 8 if GROUP == 16 else GROUP
    PIECES: tl.constexpr = GROUP // PIECE
    STEP: tl.constexpr = WARPS * 4

    thread = tl.arange(0, THREADS)
    group = thread // 32 * 4 + thread % 4
    first_row = tl.program_id(0) * WARP_ROWS + thread % 32 // 4 * ROWS
    tile = first_row // 16  # num_row_tiles * 16 is a multiple of WARP_ROWS
    first_row = first_row % 16
    first_token = tl.program_id(1) * BLOCK_M
    token = first_token + tl.arange(0, TOKENS)[:, None] * 8 + (thread % 32 // 4)[None, :]
    # Tokens past the end repeat the last one: their columns are not stored.
    token_start = tl.minimum(token, M - 1) * width

    low, high = load_code_words(
        tiles_ptr,
        high_start,
        (group // 32 * num_row_tiles + tile) * 32 + group % 32,
        first_row,
        group < num_padded_groups,
        ROWS,
        HIGH_BITS,
    )
    acc = tl.zeros([WARPS, WARP_ROWS, BLOCK_M], dtype=tl.float32)
    for start in range(0, num_padded_groups, STEP):
        # The codes of the next step are on their way while this one gathers.
        following = group + STEP
        next_low, next_high = load_code_words(
            tiles_ptr,
            high_start,
            (following // 32 * num_row_tiles + tile) * 32 + following % 32,
            first_row,
            following < num_padded_groups,
            ROWS,
            HIGH_BITS,
        )
        vectors = unpack_codes(low, high, first_row, THREADS, ROWS, HIGH_BITS)
        if start + STEP > num_groups:
            past_base = group - num_groups
            codebook = tl.where(past_base >= 0, 1 + past_base // num_critical_groups, 0)
            vectors += (tl.minimum(codebook, num_codebooks - 1) * codebook_size)[None, :]
        weight = load_pieces(codebooks_ptr, vectors, THREADS, GROUP, PIECE).to(staged_ptr.dtype.element_ty)
        weight = tl.reshape(weight, (PIECES, ROWS, WARPS, 8, 4, PIECE // 4, 2, 2))
        weight = tl.permute(weight, (2, 1, 3, 0, 5, 6, 4, 7))
        weight = tl.reshape(weight, (WARPS, WARP_ROWS, GROUP * 4))

        elements = token_start[None, :, :] + (group * GROUP)[None, None, :]
        elements += (tl.arange(0, PIECES) * PIECE)[:, None, None]
        elements = tl.multiple_of(tl.reshape(elements, (PIECES * TOKENS * THREADS,)), PIECE)
        inside = tl.broadcast_to((group < num_padded_groups)[None, None, :], (PIECES, TOKENS, THREADS))
        inside = tl.reshape(inside, (PIECES * TOKENS * THREADS,))
        x = tl.load(staged_ptr + elements[:, None] + tl.arange(0, PIECE)[None, :], mask=inside[:, None], other=0.0)
        x = tl.reshape(x, (PIECES, TOKENS, WARPS, 8, 4, PIECE // 4, 2, 2))
        x = tl.permute(x, (2, 0, 5, 6, 4, 7, 1, 3))
        x = tl.reshape(x, (WARPS, GROUP * 4, BLOCK_M))
        acc = tl.dot(weight, x, acc, input_precision="ieee")
        low = next_low
        high = next_high
        group = following

    y = sum_warps(acc)
    index = tl.arange(0, WARP_ROWS)
    rows = tl.program_id(0) * WARP_ROWS + index % 8 * ROWS + index // 8
    row_mask = rows < N
    tokens = first_token + tl.arange(0, BLOCK_M)
    token_mask = tokens < M
    y *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if SCALED:
        y *= tl.load(unscale_ptr + tokens, mask=token_mask, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def stage(
    x: Tensor,
    channel_order: Tensor,
    codebooks: Tensor,
    num_codes: int,
    group_counts: tuple[int, int],
    dtype: torch.dtype,
    decode: bool,
    num_rows: int | None = None,
    matrix_order: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Puts the channels of `x`, `[M, K]`, in the order of the virtual groups; see `stage_kernel`.

    Args:
        group_counts: base groups, and critical groups, at least 1.
        dtype: of the result; float16 for float32 and bfloat16 that fits it once scaled.
        decode: whether to make the codebooks, int8, float16.
        num_rows: of the result; those past the tokens are unspecified. None for M.

    Returns:
        `[num_rows, width]`, width being that of all groups of whole tiles; what a token has to be multiplied by,
        `[M]`, or None; the codebooks, contiguous.
    """
    num_tokens, in_features = x.shape
    in_group_size = codebooks.shape[2]
    width = triton.cdiv(num_codes, TILE_GROUPS) * TILE_GROUPS * in_group_size
    scaled = x.dtype == torch.bfloat16 and dtype == torch.float16
    staged = torch.empty(num_rows or num_tokens, width, dtype=dtype, device=x.device)
    unscale = torch.empty(num_tokens, dtype=torch.float32, device=x.device) if scaled else None
    stored = codebooks.contiguous()
    codebooks = torch.empty(codebooks.shape, dtype=torch.float16, device=x.device) if decode else stored
    blocks = stage_blocks(scaled)
    stage_kernel[(num_tokens, triton.cdiv(width, blocks.channels))](
        x.contiguous(),
        channel_order.contiguous(),
        stored,
        staged,
        unscale,
        codebooks,
        in_features,
        codebooks.numel(),
        width,
        num_codes,
        *group_counts,
        GROUP=in_group_size,
        SCALED=scaled,
        DECODE=decode,
        MATRIX_ORDER=matrix_order,
        BLOCK=blocks.channels,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    return staged, unscale, codebooks


def gemm(
    x: Tensor,
    tiles: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
) -> Tensor:
    """Launches the matrix kernel; arguments as in `reference.linear_ref`, but `x` is `[M, K]`, `M >= 1`, codes tiled.

    Returns:
        `[M, N]`, in the dtype of `x`.
    """
    num_tokens, in_features = x.shape
    out_features = scales.numel()
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    num_padded_groups = triton.cdiv(num_codes, TILE_GROUPS) * TILE_GROUPS
    group_counts = (in_features // in_group_size, max(num_critical_groups, 1))
    # fp16 codebooks are exact factors of fp16 products; what does not fit fp16 is multiplied in fp32.
    exact = x.dtype == torch.float32 or codebooks.dtype not in (torch.float16, torch.int8)
    blocks = gemm_blocks(num_tokens, out_features, in_group_size, exact, torch.version.hip is not None)

    staged, unscale, codebooks = stage(
        x,
        channel_order,
        codebooks,
        num_codes,
        group_counts,
        torch.float32 if exact else torch.float16,
        codebooks.dtype == torch.int8,
    )
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    width_of_high = high_bits(nbits)
    gemm_kernel[(triton.cdiv(out_features, blocks.rows), triton.cdiv(num_tokens, blocks.tokens))](
        staged,
        unscale,
        tiles.contiguous(),
        codebooks,
        scales.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        num_tokens,
        out_features,
        staged.shape[1],
        tiles.numel() * 8 // (8 + width_of_high),
        tiles.numel() * 8 // (8 + width_of_high) // (num_padded_groups * TILE_ROWS),
        num_padded_groups,
        codebook_size,
        num_codebooks,
        *group_counts,
        GROUP=in_group_size,
        HIGH_BITS=width_of_high,
        HAS_BIAS=bias is not None,
        SCALED=unscale is not None,
        WARPS=blocks.warps,
        WARP_ROWS=blocks.rows,
        BLOCK_M=blocks.tokens,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    return y
