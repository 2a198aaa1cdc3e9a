"""Kernels of the CRVQ linear layer: memory layout, reference, and PyTorch operators."""

from .ops import dequantize, implementation, linear
from .packing import channel_index, codebook_ids, num_virtual_groups, pack_codes, packed_width, unpack_codes
from .reference import dequantize_ref, linear_ref

__all__ = [
    "channel_index",
    "codebook_ids",
    "dequantize",
    "dequantize_ref",
    "implementation",
    "linear",
    "linear_ref",
    "num_virtual_groups",
    "pack_codes",
    "packed_width",
    "unpack_codes",
]
