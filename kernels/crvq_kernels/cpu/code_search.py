"""The search for codes in the library beside this file: `choose_codes_` of `crvq_kernels.code_search` on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    codebooks = codebooks.contiguous()
    by_dimension = F.pad(codebooks.transpose(1, 2), (0, padding)).contiguous()
    energies = F.pad(energies, (0, padding), value=-torch.inf).contiguous()
    change = None if metric is None else torch.zeros_like(wanted)
    metric = None if metric is None else metric.contiguous()
    fits = (
        columns == groups * d
        and 0 <= first_group <= all_groups - groups
        and 0 <= critical <= all_groups
        and codes.shape == (all_groups + (num_codebooks - 1) * critical, rows)
        and energies.shape == (groups, num_codebooks, size + padding)
        and (metric is None or metric.shape == (columns, columns))
    )
    floats = [wanted, codebooks, by_dimension, energies, *([] if metric is None else [change, metric])]
    if not (
        fits
        and codes.dtype == torch.int64
        and all(tensor.dtype == torch.float32 for tensor in floats)
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in [codes, *floats])
    ):
        raise ValueError("these tensors are not those of a search for codes: fp32, contiguous and of shapes that fit")
    own = library()
    status = own.search(
        SEARCH_CALL.pack(
            wanted.data_ptr(),
            *(0 if tensor is None else tensor.data_ptr() for tensor in (change, codes, codebooks, by_dimension)),
            energies.data_ptr(),
            0 if metric is None else metric.data_ptr(),
            rows,
            groups,
            size,
            size + padding,
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
