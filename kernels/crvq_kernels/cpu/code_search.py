"""The search for codes in the library beside this file: `choose_codes_` of `crvq_kernels.code_search` on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .address import address
from .binding import SEARCH_CALL, library

_MULTIPLE = 16  # codewords of a codebook are padded to this many


def can_search(wanted: Tensor, in_group_size: int) -> bool:
    """Returns whether the library can do it."""
    return wanted.is_cpu and in_group_size in (4, 8, 16) and library() is not None


def choose_codes_(
    wanted: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    energies: Tensor,
    metric: Tensor | None,
    first_group: int,
    all_groups: int,
    critical: int,
) -> Tensor | None:
    """Does what `crvq_kernels.code_search.choose_codes_` says."""
    num_codebooks, size, d = codebooks.shape
    rows, columns = wanted.shape
    groups, padding = columns // d, -size % _MULTIPLE
    padded, fp32 = size + padding, torch.float32
    if columns != groups * d or not 0 <= first_group <= all_groups - groups or not 0 <= critical <= all_groups:
        raise ValueError(f"{columns} columns from group {first_group} on are not part of {all_groups} groups of {d}")
    codebooks = codebooks.contiguous()
    by_dimension = F.pad(codebooks.transpose(1, 2), (0, padding)).contiguous()
    energies = F.pad(energies, (0, padding), value=-torch.inf).contiguous()
    change = None if metric is None else torch.zeros_like(wanted)
    metric = None if metric is None else metric.contiguous()
    own = library()
    status = own.search(
        SEARCH_CALL.pack(
            address(wanted, fp32, rows * columns),
            0 if change is None else address(change, fp32, rows * columns),
            address(codes, torch.int64, (all_groups + (num_codebooks - 1) * critical) * rows),
            address(codebooks, fp32, num_codebooks * size * d),
            address(by_dimension, fp32, num_codebooks * d * padded),
            address(energies, fp32, groups * num_codebooks * padded),
            0 if metric is None else address(metric, fp32, columns * columns),
            rows,
            groups,
            size,
            padded,
            first_group,
            all_groups,
            critical,
            d,
            num_codebooks,
            own.level,
            torch.get_num_threads(),
        )
    )
    if status:
        raise ValueError(f"codes must be from 0 to {size - 1}, found others")
    return change
