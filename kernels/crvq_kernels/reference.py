"""The truth: a CRVQ layer written as its definition, in PyTorch, on any device, accumulating in fp32.

    y[n] = scales[n] * sum_v <codebooks[codebook_id[v]][codes[n, v]], x[channel_index][v * d : (v + 1) * d]> + bias[n]

Everything faster than this is tested against it.
"""

import torch
from torch import Tensor

from .packing import channel_index, codebook_ids, decode_codebooks, num_virtual_groups, unpack_codes


def dequantize_ref(
    codes_packed: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    nbits: int,
    num_critical_groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the weight that a CRVQ layer stands for.

    Args:
        codes_packed: `[N, packed_width(V, nbits)]`, uint8, see `packing`.
        codebooks: `[num_codebooks, C, d]`, floating or int8, in units of 1/32; base codebook first.
        scales: `[N]`, floating, one factor per output row.
        channel_order: `[K]`, integer, new to old.
        nbits: bits per code.
        num_critical_groups: groups that have a code in every codebook.
        dtype: of the result; the sum over codebooks is taken in fp32 first.

    Returns:
        `[N, K]`, `dtype`, channels in their original order.
    """
    vectors = _code_vectors(codes_packed, codebooks, channel_order, nbits, num_critical_groups)
    num_codebooks, _, in_group_size = codebooks.shape
    index = channel_index(channel_order, in_group_size, num_codebooks, num_critical_groups)
    weight = vectors.new_zeros(codes_packed.shape[0], channel_order.numel())
    weight.index_add_(1, index, vectors)
    return (weight * scales.float()[:, None]).to(dtype)


def linear_ref(
    x: Tensor,
    codes_packed: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
) -> Tensor:
    """Applies a CRVQ layer to `x`.

    Args:
        x: `[..., K]`, floating.
        bias: `[N]`, floating, or None. The other arguments are those of `dequantize_ref`.

    Returns:
        `[..., N]`, in the dtype of `x`, accumulated in fp32.
    """
    vectors = _code_vectors(codes_packed, codebooks, channel_order, nbits, num_critical_groups)
    num_codebooks, _, in_group_size = codebooks.shape
    index = channel_index(channel_order, in_group_size, num_codebooks, num_critical_groups)
    y = (x.float()[..., index] @ vectors.T) * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _code_vectors(
    codes_packed: Tensor, codebooks: Tensor, channel_order: Tensor, nbits: int, num_critical_groups: int
) -> Tensor:
    """Returns the codebook row of every code: `[N, V * d]`, fp32."""
    num_codebooks, _, in_group_size = codebooks.shape
    num_groups = channel_order.numel() // in_group_size
    num_codes = num_virtual_groups(channel_order.numel(), in_group_size, num_codebooks, num_critical_groups)
    codes = unpack_codes(codes_packed, nbits, num_codes).to(torch.int64)
    ids = codebook_ids(num_groups, num_codebooks, num_critical_groups).to(codes.device)
    return decode_codebooks(codebooks).float()[ids, codes].flatten(1)
