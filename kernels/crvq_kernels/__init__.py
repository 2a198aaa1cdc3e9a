"""Kernels of the CRVQ linear layer: memory layout, reference, and PyTorch operators."""

from .cpu import Layer as CPULayer
from .cpu import multiplies_bfloat16, why_not_better
from .ops import dequantize, implementation, is_plain, is_transformed, linear, prefers_int8_codebooks, prefers_tiles
from .packing import (
    channel_index,
    codebook_ids,
    decode_codebooks,
    encode_codebooks,
    num_virtual_groups,
    pack_codes,
    packed_width,
    tile_codes,
    unpack_codes,
    untile_codes,
)
from .reference import dequantize_ref, linear_ref
from .rows import dequantize_rows, rows_linear

__all__ = [
    "CPULayer",
    "channel_index",
    "codebook_ids",
    "decode_codebooks",
    "dequantize",
    "dequantize_ref",
    "dequantize_rows",
    "encode_codebooks",
    "implementation",
    "is_plain",
    "is_transformed",
    "linear",
    "linear_ref",
    "multiplies_bfloat16",
    "num_virtual_groups",
    "pack_codes",
    "packed_width",
    "prefers_int8_codebooks",
    "prefers_tiles",
    "rows_linear",
    "tile_codes",
    "unpack_codes",
    "untile_codes",
    "why_not_better",
]
