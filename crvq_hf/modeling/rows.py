"""Rows of int8 numbers and a scale per row, made of dense ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 numbers `[V, H]` and scales `[V]` in the dtype of `weight`; scales are also exact in float16.

    Args:
        weight: `[V, H]`, floating point.

    Raises:
        ValueError: `weight` holds NaN or infinite values, or a row is too large for a float16 scale.
    """
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for start in range(0, weight.shape[0], 8192):
        rows = weight[start : start + 8192].float()
        largest = rows.abs().amax(dim=1)
        scale = (largest / 127).half().to(weight.dtype).half().float()
        if not scale.isfinite().all():
            raise ValueError(
                f"A row with largest magnitude {float(largest.max()):.3g} does not fit 8 bits and a float16 scale; "
                "check the embeddings for NaN, or leave them with embedding_bits=16."
            )
        step = torch.where(scale > 0, scale, math.inf)[:, None]  # a row of zeros, or next to it
        numbers[start : start + 8192] = (rows / step).round_().clamp_(-127, 127).to(torch.int8)
        scales[start : start + 8192] = scale
    return numbers, scales
