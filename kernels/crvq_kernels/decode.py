"""Reading codes and codebook rows inside a Triton kernel; shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def load_codes(codes_ptr, rows, groups, mask, row_bytes, NBITS: tl.constexpr, CODE_BYTES: tl.constexpr):
    """Reads codes from the little-endian bit stream of their rows.

    Args:
        codes_ptr: uint8, `row_bytes` bytes per row.
        rows: `[BLOCK_N]`, int64.
        groups: `[BLOCK_G]`, int32, virtual groups.
        mask: `[BLOCK_N, BLOCK_G]`; codes outside read as 0.
        NBITS: bits per code.
        CODE_BYTES: most bytes a code can touch, see `packing.code_span`.

    Returns:
        `[BLOCK_N, BLOCK_G]`, int32.
    """
    first_bit = groups * NBITS
    first_byte = first_bit >> 3
    ptrs = codes_ptr + rows[:, None] * row_bytes + first_byte[None, :]
    # The cast comes first: uint8 arithmetic wraps at 8 bits.
    codes = tl.load(ptrs, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, CODE_BYTES):
        in_row = (first_byte + byte < row_bytes)[None, :]
        codes |= tl.load(ptrs + byte, mask=mask & in_row, other=0).to(tl.int32) << (8 * byte)
    if NBITS != 8:
        codes = (codes >> (first_bit & 7)[None, :]) & ((1 << NBITS) - 1)
    return codes


@triton.jit
def load_vectors(codebooks_ptr, codebook_ids, codes, mask, codebook_size, GROUP: tl.constexpr):
    """Gathers the codebook row of every code.

    Args:
        codebooks_ptr: `[num_codebooks, codebook_size, GROUP]`, contiguous.
        codebook_ids: int32, shape broadcastable to that of `codes`.
        codes: `[BLOCK_N, BLOCK_G]`, int32.
        mask: shape broadcastable to that of `codes`; vectors outside read as 0.

    Returns:
        `[BLOCK_N, BLOCK_G, GROUP]`, float32.
    """
    element = (codebook_ids * codebook_size + codes) * GROUP
    ptrs = codebooks_ptr + element[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    return tl.load(ptrs, mask=mask[:, :, None], other=0.0).to(tl.float32)
