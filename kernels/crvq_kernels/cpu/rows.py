"""A product with int8 rows in the library beside this file: `crvq_kernels.rows_linear` on a CPU."""

import torch
from torch import Tensor

from .address import address
from .binding import FLOAT_TYPES, ROWS_CALL, library

_RUN = 64  # channels that C has in another order, see int8_rows.h


def can_multiply(tokens: Tensor, scales: Tensor) -> bool:
    """Returns whether the library can do it."""
    return tokens.dtype in FLOAT_TYPES and scales.dtype in FLOAT_TYPES and library() is not None


def int8_rows(tokens: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `tokens @ dense.T`, `[M, V]`, fp32: row `v` of the dense weight is `weight[v] * scales[v]`.

    Args:
        tokens: `[M, H]`, floating point.
        weight: `[V, H]`, int8.
        scales: `[V]`, fp32, fp16 or bf16.

    Raises:
        ValueError: a tensor is not on the CPU, or of another dtype.
    """
    (num_tokens, channels), rows = tokens.shape, len(weight)
    weight, scales = weight.contiguous(), scales.contiguous()
    ordered = torch.empty(num_tokens, channels, dtype=torch.float32, device="cpu")
    end = channels // _RUN * _RUN
    ordered[:, :end].view(num_tokens, -1, 4, _RUN // 4).copy_(tokens[:, :end].unflatten(1, (-1, _RUN // 4, 4)).mT)
    ordered[:, end:] = tokens[:, end:]
    y = torch.empty(num_tokens, rows, dtype=torch.float32, device="cpu")
    own = library()
    own.int8_rows(
        ROWS_CALL.pack(
            address(ordered, torch.float32, num_tokens * channels),
            address(y, torch.float32, num_tokens * rows),
            address(weight, torch.int8, rows * channels),
            address(scales, scales.dtype, rows),
            num_tokens,
            rows,
            channels,
            FLOAT_TYPES[scales.dtype],
            own.level,
            torch.get_num_threads(),
            0,
        )
    )
    return y
