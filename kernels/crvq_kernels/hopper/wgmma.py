"""Matrix kernel for tens to hundreds of tokens: codewords go from a gather straight into wgmma's register operand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.gemm import stage
from ..gpu.gemv import sum_splits
from ..gpu.tuning import num_processors
from ..packing import INT8_UNITS, ROW_MULTIPLE, num_virtual_groups
from ..packing import TILE_GROUPS as _TILE_GROUPS
from ..packing import TILE_ROWS as _TILE_ROWS
from .tuning import WgmmaBlocks, wgmma_blocks

_UNIT = tl.constexpr(1 / INT8_UNITS)
TILE_GROUPS, TILE_ROWS = tl.constexpr(_TILE_GROUPS), tl.constexpr(_TILE_ROWS)
MAX_CODEBOOKS, MAX_CODEBOOK_SIZE = 4, 256


@triton.jit
def load_codes(ptrs, start, num_row_tiles, ROWS: tl.constexpr, INLINE: tl.constexpr):
    """Reads the codes of the step that begins with group `start`.

    The load is written as an instruction so that Triton does not make an asynchronous copy of it.

    Args:
        ptrs: `[QUADS, T]`, where the step that begins with group 0 has the codes of `ROWS`, 2 or 4, rows side by side.

    Returns:
        `[QUADS, T]`, int32, a byte per row.
    """
    # Steps do not cross the border between tiles.
    cell = start // TILE_GROUPS * num_row_tiles * TILE_GROUPS + start % TILE_GROUPS
    ptrs += cell * (TILE_ROWS // ROWS)
    if INLINE:
        if ROWS == 2:
            words = tl.inline_asm_elementwise(
                "ld.global.nc.L1::no_allocate.L2::256B.u16 $0, [$1];", "=h,l", [ptrs], tl.int16, is_pure=True, pack=1
            )
        else:
            words = tl.inline_asm_elementwise(
                "ld.global.nc.L1::no_allocate.L2::256B.u32 $0, [$1];", "=r,l", [ptrs], tl.int32, is_pure=True, pack=1
            )
    else:
        words = tl.load(ptrs)
    return words.to(tl.int32)


@triton.jit
def codebook_rows(low, group, codebook_size, num_groups, critical_groups, BOOKS: tl.constexpr, ROWS: tl.constexpr):
    """Returns which rows of the flattened codebooks the codes in `low` name: `[ROWS * QUADS * T]`, int32."""
    codes = (low[None, :, :] >> (tl.arange(0, ROWS) * 8)[:, None, None]) & 255
    for book in tl.static_range(BOOKS - 1):
        codes += tl.where(group >= num_groups + book * critical_groups, codebook_size, 0)[None, :, :]
    return tl.reshape(codes, (codes.shape[0] * codes.shape[1] * codes.shape[2],))


@triton.jit
def gather_codewords(codebooks_ptr, vectors, INLINE: tl.constexpr):
    """Gathers rows of 8 of the flattened codebooks, `vectors`: `[T]`, int32, in words of 32 bits.

    The loads are instructions, as in `load_codes`.

    Returns:
        Four times `[T]`, int32; of int8 the third and fourth repeat the first and second.
    """
    INT8: tl.constexpr = codebooks_ptr.dtype.element_ty == tl.int8
    ptrs = codebooks_ptr.to(tl.pointer_type(tl.int32)) + vectors * (2 if INT8 else 4)
    if INLINE:
        if INT8:
            w0, w1 = tl.inline_asm_elementwise(
                "ld.global.nc.L1::evict_last.v2.b32 {$0, $1}, [$2];",
                "=r,=r,l",
                [ptrs],
                (tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
            w2, w3 = w0, w1
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                "ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,l",
                [ptrs],
                (tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
    else:
        w0, w1 = tl.load(ptrs), tl.load(ptrs + 1)
        w2, w3 = w0, w1
        if not INT8:
            w2, w3 = tl.load(ptrs + 2), tl.load(ptrs + 3)
    return w0, w1, w2, w3


@triton.jit
def int8_pairs(word, INLINE: tl.constexpr):
    """Returns the bytes of `word`, int32, as fp16: the low two in one int32 and the high two in another."""
    if INLINE:
        # The low byte of the fp16 number 1024 is a number of units.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, pair;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 pair, bytes, 0x64646464, 0x4140;
            add.rn.f16x2 $0, pair, $3;
            prmt.b32 pair, bytes, 0x64646464, 0x4342;
            add.rn.f16x2 $1, pair, $3;
            }""",
            "=&r,=r,r,r",
            [word, 0xE480E480 - 2**32],  # -1152 twice
            (tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = fp16_bits(word << 24) | fp16_bits(word << 16) << 16
        high = fp16_bits(word << 8) | fp16_bits(word) << 16
    return low, high


@triton.jit
def fp16_bits(word):
    """Returns the highest byte of `word` as fp16, in the low half of an int32."""
    return (word >> 24).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def as_operand(
    w0,
    w1,
    w2,
    w3,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
    WARPS: tl.constexpr,
    INLINE: tl.constexpr,
):
    """Renumbers gathered words, `[ROWS * QUADS * threads]`, to the left factor of a product: `[rows, k]`, fp16.

    Of int8, numbers are in the codebooks' own units.
    """
    if INT8:
        w2, w3 = int8_pairs(w1, INLINE)
        w0, w1 = int8_pairs(w0, INLINE)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [T, h, b]: word 2h + b
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    numbers = tl.reshape(tl.join(low, high), (ROWS // 2, 2, QUADS, WARPS, 8, 4, 2, 2, 2))  # ..., r, q, h, b, j
    numbers = tl.permute(numbers, (0, 3, 1, 4, 2, 6, 7, 5, 8))
    return tl.reshape(numbers, (ROWS * 8 * WARPS, 32 * QUADS))


@triton.jit(
    do_not_specialize=["M", "num_row_tiles", "num_steps", "steps_per_program", "num_groups", "critical_groups"]
)
def wgmma_kernel(
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
    codebook_size,
    num_row_tiles,
    num_steps,
    steps_per_program,
    num_groups,
    critical_groups,
    NUM_CODEBOOKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    QUADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes `y[M, N]`, or with `SPLIT` a partial sum in `y[splits, M, N]`, fp32, for a block of tokens and rows.

    staged: `[M, width]`, with whole blocks of tokens, what is past the end unspecified, and unscale: `[M]`, from
    `gemm.stage` in matrix order; tiles: see `packing`; codebooks: `[NUM_CODEBOOKS, codebook_size, 8]`, fp16 or int8;
    scales and bias: `[N]`; all contiguous. A step is 4 * QUADS virtual groups, 32 * QUADS terms of the sum.

    In `wgmma.m64nNk16` lane `4r + q` of a warp supplies rows `r` and `r + 8` of the warp's 16, as in "gemm" in
    kernels/README.md; a lane owns `R` rows side by side. Nothing depends on that but speed.
    """
    R: tl.constexpr = BLOCK_N // (8 * WARPS)
    THREADS: tl.constexpr = WARPS * 32
    STEP: tl.constexpr = 4 * QUADS
    INT8: tl.constexpr = codebooks_ptr.dtype.element_ty == tl.int8
    thread = tl.arange(0, THREADS)
    quad = tl.arange(0, QUADS)[:, None] * 4 + (thread % 4)[None, :]
    row = tl.program_id(0) * BLOCK_N + thread // 32 * (8 * R) + thread % 32 // 4 * R
    tile = tl.minimum(row // TILE_ROWS, num_row_tiles - 1)  # rows past the end are not stored
    code_ptrs = tiles_ptr.to(tl.pointer_type(tl.int16 if R == 2 else tl.int32))
    code_ptrs += ((tile * TILE_GROUPS)[None, :] + quad) * (TILE_ROWS // R) + (row % TILE_ROWS // R)[None, :]
    first = tl.program_id(2) * steps_per_program * STEP
    end = tl.minimum(first + steps_per_program * STEP, num_steps * STEP)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 32 * QUADS)
    x_ptrs = staged_ptr + token.to(tl.int64)[None, :] * width + k[:, None]

    # Codes are asked for two steps before they are looked up, as they come from DRAM. They are carried over one step
    # as codes and over the other as rows of the codebooks: Triton copies x asynchronously only if no value is carried
    # over two steps.
    last = (num_steps - 1) * STEP
    low = load_codes(code_ptrs, first, num_row_tiles, R, INLINE)
    vectors = codebook_rows(low, first + quad, codebook_size, num_groups, critical_groups, NUM_CODEBOOKS, R)
    low = load_codes(code_ptrs, tl.minimum(first + STEP, last), num_row_tiles, R, INLINE)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(first, end, STEP, num_stages=STAGES):
        w0, w1, w2, w3 = gather_codewords(codebooks_ptr, vectors, INLINE)
        group = tl.minimum(start + STEP, last) + quad
        vectors = codebook_rows(low, group, codebook_size, num_groups, critical_groups, NUM_CODEBOOKS, R)
        low = load_codes(code_ptrs, tl.minimum(start + 2 * STEP, last), num_row_tiles, R, INLINE)
        weight = as_operand(w0, w1, w2, w3, INT8, R, QUADS, WARPS, INLINE)
        acc = tl.dot(weight, tl.load(x_ptrs + start * 8), acc)

    # From the order of the instruction to that of the rows.
    acc = tl.reshape(acc, (R // 2, WARPS, 2, 8, BLOCK_M))
    y = tl.reshape(tl.permute(acc, (1, 3, 0, 2, 4)), (BLOCK_N, BLOCK_M))
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, token_mask = rows < N, token < M
    if SPLIT:
        if INT8:
            y *= _UNIT
        y_ptr += tl.program_id(2).to(tl.int64) * M * N
    else:
        scales = tl.load(scales_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
        if INT8:
            scales *= _UNIT
        y *= scales[:, None]
        if SCALED:
            y *= tl.load(unscale_ptr + token, mask=token_mask, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + token.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def serves(
    device: torch.device,
    dtype: torch.dtype,
    codebook_dtype: torch.dtype,
    codebooks_shape: tuple[int, int, int],
) -> bool:
    """Returns whether the kernel can multiply `x` of type `dtype` with such a layer.

    Only where there is wgmma: elsewhere codewords would go through shared memory, and large tiles spill.
    """
    num_codebooks, codebook_size, in_group_size = codebooks_shape
    return (
        dtype in (torch.float16, torch.bfloat16)
        and codebook_dtype in (torch.float16, torch.int8)
        and codebook_size <= MAX_CODEBOOK_SIZE  # so that the high plane of more bits is 0
        and in_group_size == 8
        and num_codebooks <= MAX_CODEBOOKS
        and torch.version.hip is None
        and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9)
    )


def wgmma(
    x: Tensor,
    tiles: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
    blocks: WgmmaBlocks | None = None,
) -> Tensor:
    """Launches the kernel; arguments as in `reference.linear_ref`, but codes tiled and what `serves` says.

    Args:
        x: `[M, K]`, float16 or bfloat16, `M >= 1`.
        blocks: how to run it; chosen if None. Each has its own rounding, and always the same.

    Returns:
        `[M, N]`, in the dtype of `x`.
    """
    num_tokens, in_features = x.shape
    out_features = scales.numel()
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    group_counts = (in_features // in_group_size, max(num_critical_groups, 1))
    int8 = codebooks.dtype == torch.int8
    if blocks is None:
        blocks = wgmma_blocks(num_tokens, out_features, num_codes, num_processors(x.device), int8)[0]
    programs = (triton.cdiv(out_features, blocks.rows), triton.cdiv(num_tokens, blocks.tokens))
    num_steps = triton.cdiv(num_codes, 4 * blocks.quads)
    steps = triton.cdiv(num_steps, blocks.splits)
    splits = triton.cdiv(num_steps, steps)
    staged, unscale, codebooks = stage(
        x,
        channel_order,
        codebooks,
        num_codes,
        group_counts,
        torch.float16,
        int8 and not blocks.int8,
        programs[1] * blocks.tokens,
        True,
    )
    scales, bias = scales.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(splits, *y.shape, dtype=torch.float32, device=x.device) if splits > 1 else y
    wgmma_kernel[(*programs, splits)](
        staged,
        unscale,
        tiles.contiguous(),
        codebooks,
        scales,
        bias,
        sums,
        num_tokens,
        out_features,
        staged.shape[1],
        codebook_size,
        triton.cdiv(out_features, ROW_MULTIPLE) * (ROW_MULTIPLE // _TILE_ROWS),
        num_steps,
        steps,
        *group_counts,
        NUM_CODEBOOKS=num_codebooks,
        HAS_BIAS=bias is not None,
        SCALED=unscale is not None,
        SPLIT=splits > 1,
        INLINE=not triton.knobs.runtime.interpret,
        BLOCK_N=blocks.rows,
        BLOCK_M=blocks.tokens,
        WARPS=blocks.warps,
        QUADS=blocks.quads,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if splits > 1:
        sum_splits(sums, scales, bias, unscale, y)
    return y
