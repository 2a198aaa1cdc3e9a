"""Decode kernel: a CRVQ linear layer for one token or two, with a table lookup for every code.

All output rows multiply the same `x`, so a slice of virtual groups needs only the products of `x` with every codebook
row: a table, from which each output row then sums one entry per code. See "`gemv`" in `kernels/README.md`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import ROW_MULTIPLE, TILE_GROUPS, TILE_ROWS, num_virtual_groups
from .decode import decoded
from .tuning import NUM_STAGES, gemv_blocks, num_processors

GROUPS = tl.constexpr(TILE_GROUPS)
ROWS = tl.constexpr(TILE_ROWS)
WORDS = tl.constexpr(TILE_GROUPS * TILE_ROWS // 4)
_SUM_BLOCK, _SUM_WARPS = 128, 4
_HALF_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def load_x(
    x_ptr,
    order_ptr,
    first_group,
    book,
    num_groups,
    num_critical_groups,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Gathers what one token multiplies with codebook `book` in the slice of groups that starts at `first_group`.

    Returns:
        `[GROUPS / PARTS, PARTS * WIDTH]`, FACTOR: row `r` holds the groups `r`, `r + GROUPS / PARTS` and so on, each
        repeated to fill WIDTH columns; 0 where a group has another codebook or lies past the last one.
    """
    column = tl.arange(0, PARTS * WIDTH)[None, :]
    groups = first_group + tl.arange(0, GROUPS // PARTS)[:, None] + column // WIDTH * (GROUPS // PARTS)
    # The groups of codebook b > 0 follow the base groups; they repeat the critical groups from the first one on.
    source = groups if book == 0 else groups - num_groups - (book - 1) * num_critical_groups
    length = num_groups if book == 0 else num_critical_groups
    mask = (source >= 0) & (source < length)
    channels = tl.load(order_ptr + source * GROUP + column % GROUP, mask=mask, other=0).to(tl.int32)
    return tl.load(x_ptr + channels, mask=mask, other=0.0).to(FACTOR)


@triton.jit
def load_codebook(
    codebooks_ptr,
    book,
    codebook_size,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """Reads a codebook once for each part of a slice.

    Returns:
        `[PARTS * WIDTH, PARTS * CODES]`, FACTOR: column `2 * (PARTS * i + part) + j` holds codebook row `2 * i + j`
        among the WIDTH rows of that part, and 0 elsewhere. With REST, what rounding that to FACTOR has left.
    """
    SHARE: tl.constexpr = WIDTH // GROUP  # codebook rows that are read together
    k = tl.arange(0, PARTS * WIDTH)[:, None]
    column = tl.arange(0, PARTS * CODES)[None, :]
    code = column // (2 * PARTS) * 2 + column % 2
    element = code // SHARE * WIDTH + k % WIDTH
    mask = (k // WIDTH == column // 2 % PARTS) & (element < codebook_size * GROUP)
    vectors = decoded(tl.load(codebooks_ptr + book * codebook_size * GROUP + element, mask=mask, other=0))
    if SHARE > 1:
        vectors = tl.where(k % WIDTH // GROUP == code % SHARE, vectors, 0.0)
    if REST:
        vectors = vectors.to(tl.float32)
        vectors -= vectors.to(FACTOR).to(tl.float32)
    return vectors.to(FACTOR)


@triton.jit
def flatten_table(products, CODES: tl.constexpr, PARTS: tl.constexpr):
    """Turns the products of `load_x` and `load_codebook` into a table `[CODES * GROUPS]`, group fastest."""
    products = tl.reshape(products, (GROUPS // PARTS, CODES // 2, PARTS, 2))  # row, i, part, j
    return tl.reshape(tl.permute(products, (1, 3, 2, 0)), (CODES * GROUPS,))


@triton.jit
def sum_over_groups(partial, BLOCK_N: tl.constexpr):
    """Sums `[BLOCK_N * GROUPS]`, in the order of tiled codes, over the groups; returns `[BLOCK_N]`.

    Groups lie across the lanes of a warp. Through shared memory each thread gets all groups of its rows, starting at
    another group than its neighbours so that they read from different banks.
    """
    SIZE: tl.constexpr = BLOCK_N * GROUPS
    partial = tl.permute(tl.reshape(partial, (BLOCK_N // ROWS, GROUPS, ROWS)), (0, 2, 1))
    row = tl.arange(0, BLOCK_N)[None, :]
    position = row * GROUPS + (tl.arange(0, GROUPS)[:, None] + row) % GROUPS
    values = tl.gather(tl.reshape(partial, (SIZE,)), tl.reshape(position, (SIZE,)), axis=0)
    return tl.sum(tl.reshape(values, (GROUPS, BLOCK_N)), axis=0)


@triton.jit
def store_rows(y_ptr, y, scales_ptr, bias_ptr, rows, mask, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """Stores `[BLOCK_N]` sums of one token; scaled and with bias, unless they are one of several partial sums."""
    if not SPLIT:
        y *= tl.load(scales_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemv_kernel(
    x_ptr,
    tiles_ptr,
    codebooks_ptr,
    scales_ptr,
    order_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    row_tiles,
    codebook_size,
    num_groups,
    num_virtual_groups,
    num_critical_groups,
    slices_per_program,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes BLOCK_N output rows of one of M tokens, over `slices_per_program` slices of GROUPS groups.

    x: `[M, K]`, tiles: `[slices, row_tiles, GROUPS, ROWS]` uint8, codebooks: `[num_codebooks, codebook_size, GROUP]`,
    scales and bias: `[N]`, order: `[K]`; all contiguous. y: `[M, N]`, or with SPLIT `[splits, M, N]` fp32, sums
    without scale and bias. `num_critical_groups` must be at least 1, also where no group is critical.

    CODES: 2 to the number of bits, at least 16, at most 256. FACTORS: see `dot_factors`.
    """
    HALF_TYPE: tl.constexpr = tl.float16 if FACTORS == "fp16" else tl.bfloat16
    FACTOR: tl.constexpr = tl.float32 if FACTORS == "tf32" or FACTORS == "fp32" else HALF_TYPE
    TWICE: tl.constexpr = FACTORS == "bf16x2"
    PRECISION: tl.constexpr = "tf32" if FACTORS == "tf32" else "ieee"
    WIDTH: tl.constexpr = 8 if GROUP < 8 else GROUP  # two groups fill the 16 columns that tl.dot needs
    PARTS: tl.constexpr = 1 if GROUP == 16 and FACTOR == tl.float32 else 2
    SIZE: tl.constexpr = BLOCK_N * GROUPS
    first_tile = tl.program_id(0) * (BLOCK_N // ROWS)
    token = tl.program_id(2).to(tl.int64)
    num_slices = tl.cdiv(num_virtual_groups, GROUPS)
    first_slice = tl.program_id(1) * slices_per_program
    end_slice = tl.minimum(first_slice + slices_per_program, num_slices)

    # Four codes to a word, so that those of the next slice wait in few registers.
    word = tl.arange(0, SIZE // 4)
    word_mask = word < (row_tiles - first_tile) * WORDS
    words_ptr = tiles_ptr.to(tl.pointer_type(tl.int32)) + first_tile.to(tl.int64) * WORDS + word
    slice_words = row_tiles.to(tl.int64) * WORDS
    group = tl.arange(0, SIZE) // ROWS % GROUPS

    x_ptr += token * K
    base = load_codebook(codebooks_ptr, 0, codebook_size, GROUP, WIDTH, PARTS, CODES, FACTOR, False)
    base_rest = base
    if TWICE:
        base_rest = load_codebook(codebooks_ptr, 0, codebook_size, GROUP, WIDTH, PARTS, CODES, FACTOR, True)
    start = first_slice * GROUPS
    next_words = tl.load(words_ptr + first_slice * slice_words, mask=word_mask, other=0)
    next_x = load_x(x_ptr, order_ptr, start, 0, num_groups, num_critical_groups, GROUP, WIDTH, PARTS, FACTOR)
    partial = tl.zeros([SIZE], dtype=tl.float32)
    for index in range(first_slice, end_slice):
        words = next_words
        x = next_x
        start = index * GROUPS
        if index + 1 < end_slice:
            # Loaded one slice ahead: a program has too few warps to wait for memory in every slice.
            next_words = tl.load(words_ptr + (index + 1) * slice_words, mask=word_mask, other=0)
            next_x = load_x(
                x_ptr, order_ptr, start + GROUPS, 0, num_groups, num_critical_groups, GROUP, WIDTH, PARTS, FACTOR
            )

        products = tl.dot(x, base, input_precision=PRECISION)
        if TWICE:
            products = tl.dot(x, base_rest, acc=products)
        end = tl.minimum(start + GROUPS, num_virtual_groups) - num_groups
        if end > 0:
            first_book = 1 + tl.maximum(start - num_groups, 0) // num_critical_groups
            end_book = 2 + (end - 1) // num_critical_groups
            for book in range(first_book, end_book):
                codebook = load_codebook(codebooks_ptr, book, codebook_size, GROUP, WIDTH, PARTS, CODES, FACTOR, False)
                rest = codebook
                if TWICE:
                    rest = load_codebook(codebooks_ptr, book, codebook_size, GROUP, WIDTH, PARTS, CODES, FACTOR, True)
                x = load_x(x_ptr, order_ptr, start, book, num_groups, num_critical_groups, GROUP, WIDTH, PARTS, FACTOR)
                products = tl.dot(x, codebook, acc=products, input_precision=PRECISION)
                if TWICE:
                    products = tl.dot(x, rest, acc=products)

        low = tl.join(words & 255, words >> 16 & 255)
        high = tl.join(words >> 8 & 255, words >> 24 & 255)
        codes = tl.reshape(tl.join(low, high), (SIZE,))  # bytes 0, 1, 2, 3 of each word
        entry = codes * GROUPS + group
        partial += tl.gather(flatten_table(products, CODES, PARTS), entry, axis=0)

    rows = first_tile * ROWS + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    y_ptr += (tl.program_id(1) * tl.num_programs(2) + token) * N
    store_rows(y_ptr, sum_over_groups(partial, BLOCK_N), scales_ptr, bias_ptr, rows, row_mask, HAS_BIAS, SPLIT)


@triton.jit
def sum_splits_kernel(
    partial_ptr,
    scales_ptr,
    bias_ptr,
    unscale_ptr,
    y_ptr,
    N,
    num_splits,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up the partial sums of one token: partial `[num_splits, M, N]` fp32, scales, bias `[N]`, y `[M, N]`.

    With `SCALED` sums are multiplied by the token's entry of unscale, `[M]`, fp32.
    """
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    splits = tl.arange(0, BLOCK_S)[:, None]
    ptrs = partial_ptr + (splits.to(tl.int64) * tl.num_programs(1) + token) * N + rows[None, :]
    partial = tl.load(ptrs, mask=(splits < num_splits) & row_mask[None, :], other=0.0)
    y = tl.sum(partial, axis=0)
    if SCALED:
        y *= tl.load(unscale_ptr + token)
    store_rows(y_ptr + token * N, y, scales_ptr, bias_ptr, rows, row_mask, HAS_BIAS, False)


def sum_splits(partial: Tensor, scales: Tensor, bias: Tensor | None, unscale: Tensor | None, y: Tensor) -> None:
    """Writes the scaled sums of `partial` to `y`; all contiguous, shapes as in the kernel."""
    num_splits, num_tokens, out_features = partial.shape
    sum_splits_kernel[triton.cdiv(out_features, _SUM_BLOCK), num_tokens](
        partial,
        scales,
        bias,
        unscale,
        y,
        out_features,
        num_splits,
        HAS_BIAS=bias is not None,
        SCALED=unscale is not None,
        BLOCK_S=triton.next_power_of_2(num_splits),
        BLOCK_N=_SUM_BLOCK,
        num_warps=_SUM_WARPS,
        num_stages=NUM_STAGES,
    )


def gemv(
    x: Tensor,
    tiles: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
) -> Tensor:
    """Launches the decode kernel; arguments as in `reference.linear_ref`, but with tiled codes.

    Args:
        x: `[M, K]`, `M >= 1`; each token has programs of its own, so it is made for one or two.
        tiles: `[tiled_size(N, V, nbits)]`, uint8, see `packing.tile_codes`; aligned to 16 bytes to be fast.
        codebooks: `[num_codebooks, C, d]` with `C <= 256`.

    Returns:
        `[M, N]`, in the dtype of `x`.
    """
    num_tokens, in_features = x.shape
    out_features = scales.numel()
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    num_slices = triton.cdiv(num_codes, TILE_GROUPS)
    factors = dot_factors(x.dtype, codebooks.dtype)
    blocks = gemv_blocks(num_tokens, out_features, num_slices, num_processors(x.device), factors)
    scales = scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    split = blocks.splits > 1
    sums = torch.empty(blocks.splits, *y.shape, dtype=torch.float32, device=x.device) if split else y
    grid = (triton.cdiv(out_features, blocks.rows), blocks.splits, num_tokens)
    gemv_kernel[grid](
        x.contiguous(),
        tiles.contiguous(),
        codebooks.contiguous(),
        scales,
        channel_order.contiguous(),
        bias,
        sums,
        out_features,
        in_features,
        triton.cdiv(out_features, ROW_MULTIPLE) * ROW_MULTIPLE // TILE_ROWS,
        codebook_size,
        in_features // in_group_size,
        num_codes,
        max(num_critical_groups, 1),
        blocks.slices_per_program,
        GROUP=in_group_size,
        CODES=min(2**nbits, 256),  # the high plane of more bits is 0 for a codebook of up to 256
        HAS_BIAS=bias is not None,
        SPLIT=split,
        FACTORS=factors,
        BLOCK_N=blocks.rows,
        num_warps=blocks.num_warps,
        num_stages=NUM_STAGES,
    )
    if split:
        sum_splits(sums, scales, bias, None, y)
    return y


def dot_factors(x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> str:
    """Names factors of `tl.dot` that hold both types without rounding: "fp16", "bf16", "bf16x2", "tf32" or "fp32".

    Two equal 16-bit types stay as they are. With bfloat16 tokens an fp16 codebook is the sum of two bfloat16 ones,
    "bf16x2". tf32 holds the values of both types, except on AMD, which has fp32 matrix instructions. An int8 codebook
    fits every type.
    """
    if codebook_dtype == torch.int8:
        codebook_dtype = x_dtype if x_dtype in _HALF_TYPES else torch.float16
    hip = torch.version.hip is not None
    # The interpreter multiplies bf16 as integers, so there it is widened.
    if not triton.knobs.runtime.interpret:
        if x_dtype == codebook_dtype and x_dtype in _HALF_TYPES:
            return _HALF_TYPES[x_dtype]
        if x_dtype == torch.bfloat16 and codebook_dtype == torch.float16 and not hip:
            return "bf16x2"
    return "fp32" if hip or torch.float32 in (x_dtype, codebook_dtype) else "tf32"
