"""The part of a quantized weight that one process of several (tensor parallelism) holds; plain tensors, no vLLM.

Rows are cut as they lie. Columns are cut by base groups: a process takes every n-th group, so that all get their share
of the critical ones. Which channels these groups are is up to the channel order of the layer. The rows of the layers
before it are taken in that order, and what they hand on needs no reordering.
"""

from __future__ import annotations

import torch
from crvq_kernels import pack_codes, unpack_codes
from torch import Tensor

from ..quantized_weight import QuantizedWeight, order_dtype


def take_rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Returns the output rows `rows` (`[n]`, int64) of `weight`, in that order."""
    return QuantizedWeight(
        weight.codes[rows],
        weight.codebooks,
        weight.scales[rows],
        weight.channel_order,
        weight.nbits,
        weight.num_critical_groups,
    )


def share_of_rows(num_rows: int, rank: int, size: int) -> range:
    """Returns the rows of process `rank` of `size` where each takes a run of them, equal to within one."""
    return range(num_rows * rank // size, num_rows * (rank + 1) // size)


def share_of_groups(num_groups: int, rank: int, size: int) -> Tensor:
    """Returns the base groups of process `rank` of `size`: `[n]`, int64, critical ones first as they are in all."""
    return torch.arange(rank, num_groups, size)


def channels_of_groups(channel_order: Tensor, in_group_size: int, groups: Tensor) -> Tensor:
    """Returns the input channels, `[n * in_group_size]`, int64, that the base groups multiply, in their order."""
    return channel_order.long().view(-1, in_group_size)[groups].flatten()


def take_groups(weight: QuantizedWeight, groups: Tensor) -> QuantizedWeight:
    """Returns the part of `weight` that multiplies some base groups; the products of all parts add up to the whole.

    Args:
        weight: `[N, K]`.
        groups: `[n]`, int64, ascending.

    Returns:
        `[N, n * in_group_size]`; its input channels are those of `channels_of_groups`, numbered as they come there.
    """
    critical = groups[groups < weight.num_critical_groups]
    extended = [
        weight.num_groups + place * weight.num_critical_groups + critical for place in range(weight.num_codebooks - 1)
    ]
    codes = unpack_codes(weight.codes, weight.nbits, weight.num_virtual_groups)[:, torch.cat([groups, *extended])]
    num_channels = len(groups) * weight.in_group_size
    return QuantizedWeight(
        pack_codes(codes, weight.nbits),
        weight.codebooks if len(critical) else weight.codebooks[:1],
        weight.scales,
        torch.arange(num_channels).to(order_dtype(num_channels)),
        weight.nbits,
        len(critical),
    )
