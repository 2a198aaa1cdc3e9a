"""Rows of int8 numbers and a scale per row: making them of dense ones, and multiplying with them."""

from __future__ import annotations

import math

import crvq_kernels
import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of the head that are made dense at once: on a CPU what stays in the cache, on a GPU what fills it with work.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_LARGE_CHUNK = 2**27
_FEW_TOKENS = 8  # up to here PyTorch's int8 kernel for bfloat16 is faster than a dense multiplication


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


def dequantize_rows(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns dense rows `[..., H]` in `dtype` of int8 `weight` `[..., H]` and `scales` `[...]`."""
    return weight.to(dtype) * scales.to(dtype).unsqueeze(-1)


def int8_linear(input: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `input @ dense.T`, `[..., V]` in the dtype of `input`, without ever holding all of the dense weight.

    That is so in inference; for gradients, when compiled or traced, and under `torch.func`, the dense weight is made.

    Args:
        input: `[..., H]`, floating point.
        weight: `[V, H]`, int8.
        scales: `[V]`, floating point.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or crvq_kernels.is_transformed()
    if traced or (torch.is_grad_enabled() and input.requires_grad):
        return F.linear(input, dequantize_rows(weight, scales, input.dtype))
    tokens = input.reshape(-1, input.shape[-1])
    if input.is_cpu and input.dtype == torch.bfloat16 and len(tokens) <= _FEW_TOKENS:
        output = torch._weight_int8pack_mm(tokens, weight, scales.to(torch.bfloat16))
    else:
        if input.is_cpu and input.dtype == torch.float16:
            tokens = tokens.float()  # CPUs convert int8 to float32 fast, to float16 slowly
        output = tokens.new_empty(len(tokens), len(weight))
        rows = max(64, _CHUNK_ELEMENTS.get(input.device.type, _LARGE_CHUNK) // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            if tokens.dtype == torch.float16:  # whose range sums of int8 products may leave
                dense = dequantize_rows(weight[part], scales[part], tokens.dtype)
                output[:, part] = F.linear(tokens, dense)
            else:
                output[:, part] = F.linear(tokens, weight[part].to(tokens.dtype)) * scales[part].to(tokens.dtype)
    return output.to(input.dtype).view(*input.shape[:-1], len(weight))
