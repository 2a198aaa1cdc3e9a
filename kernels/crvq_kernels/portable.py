"""CRVQ layers in plain PyTorch, from stored codes, on any device: where there is no kernel.

Both ways of applying a layer take a few rows at a time, so that what they write stays in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import channel_index, decode_codebooks, num_virtual_groups, unpack_codes

# Lookup tables take num_tokens * codebook_size multiply-adds per channel: beyond about this, dequantizing is faster.
_LOOKUP_MAX_TOKENS = 8
_LOOKUP_MAX_PRODUCTS = 8 * 256
# Codes per step of the loops over rows.
_CODES_PER_STEP = 2**17


def uses_tables(device: torch.device, num_tokens: int, codebook_size: int) -> bool:
    """Returns whether lookup tables are the faster way."""
    few = num_tokens <= _LOOKUP_MAX_TOKENS and num_tokens * codebook_size <= _LOOKUP_MAX_PRODUCTS
    return device.type == "cpu" and few


def dequantize(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    nbits: int,
    num_critical_groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the dense weight `[N, K]`, `dtype`, channels in their original order."""
    inverse_order = torch.empty_like(channel_order, dtype=torch.int32)
    inverse_order[channel_order.long()] = torch.arange(len(channel_order), dtype=torch.int32, device=codes.device)
    weight = torch.empty(codes.shape[0], len(channel_order), dtype=dtype, device=codes.device)
    for rows, block in _dequantized_rows(codes, codebooks, len(channel_order), nbits, num_critical_groups):
        block *= scales[rows, None]
        weight[rows] = block.index_select(1, inverse_order)
    return weight


def _row_steps(num_rows: int, codes_per_row: int):
    """Yields slices of rows that hold about `_CODES_PER_STEP` codes each."""
    step = max(1, _CODES_PER_STEP // max(1, codes_per_row))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _dequantized_rows(codes, codebooks, in_features, nbits, num_critical_groups):
    """Yields `(rows, block)`: a slice of rows and their unscaled weight `[rows, K]`, fp32, in the channel order."""
    num_codebooks, _, in_group_size = codebooks.shape
    num_groups = in_features // in_group_size
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    codebooks = decode_codebooks(codebooks).float()
    for rows in _row_steps(codes.shape[0], num_codes):
        block_codes = unpack_codes(codes[rows], nbits, num_codes).int()
        base, *extended = block_codes.split([num_groups] + [num_critical_groups] * (num_codebooks - 1), dim=1)
        block = F.embedding(base, codebooks[0])  # [rows, G, d]
        for codebook, critical in zip(codebooks[1:], extended, strict=True):
            block[:, :num_critical_groups] += F.embedding(critical, codebook)
        yield rows, block.flatten(1)


def dequantize_linear(x, codes, codebooks, scales, channel_order, nbits, num_critical_groups):
    """Multiplies `x` (`[M, K]`, fp32) with a few dequantized rows at a time; returns `[M, N]`, fp32."""
    x_ordered = x.index_select(1, channel_order.int())
    y = x.new_empty(x.shape[0], codes.shape[0])
    for rows, block in _dequantized_rows(codes, codebooks, x.shape[1], nbits, num_critical_groups):
        y[:, rows] = x_ordered @ block.T
    return y.mul_(scales)


def lookup_linear(x, codes, codebooks, scales, channel_order, nbits, num_critical_groups):
    """Sums `table[v, codes[n, v]]` over v, where `table[v, c]` is the product of codebook row c and group v of `x`.

    `x` is `[M, K]`, fp32; returns `[M, N]`, fp32.
    """
    num_tokens, in_features = x.shape
    num_codebooks, codebook_size, in_group_size = codebooks.shape
    num_groups = in_features // in_group_size
    index = channel_index(channel_order, in_group_size, num_codebooks, num_critical_groups).int()
    num_codes = index.numel() // in_group_size
    # One column per token, so that one row of the table serves all of them.
    vectors = x.index_select(1, index).view(num_tokens, num_codes, in_group_size).transpose(0, 1)  # [V, M, d]
    base, extended = vectors.split([num_groups, num_codes - num_groups])
    codebooks = decode_codebooks(codebooks).float()
    table = x.new_empty(num_codes, codebook_size, num_tokens)
    table[:num_groups] = (base @ codebooks[0].T).transpose(1, 2)
    if extended.shape[0]:
        extended = extended.reshape(num_codebooks - 1, -1, in_group_size)
        products = (extended @ codebooks[1:].transpose(1, 2)).view(-1, num_tokens, codebook_size)
        table[num_groups:] = products.transpose(1, 2)
    table = table.view(-1, num_tokens)
    first_entry = torch.arange(0, num_codes * codebook_size, codebook_size, dtype=torch.int32, device=x.device)
    y = x.new_empty(codes.shape[0], num_tokens)
    for rows in _row_steps(codes.shape[0], num_codes):
        entries = unpack_codes(codes[rows], nbits, num_codes) + first_entry
        y[rows] = F.embedding_bag(entries, table, mode="sum")
    return y.mul_(scales[:, None]).T.contiguous()
