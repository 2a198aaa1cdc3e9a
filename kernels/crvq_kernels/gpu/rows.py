"""Triton kernel for one to some tokens and a weight of int8 rows, each with a scale: the head in 8 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import rows_blocks


@triton.jit
def rows_kernel(x_ptr, weight_ptr, scales_ptr, y_ptr, M, V, H, BM: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr):
    """Writes `y[m, v] = scales[v] * sum_h x[m, h] * weight[v, h]` for BM tokens and BV rows, summed in fp32.

    x `[M, H]`, weight int8 `[V, H]`, scales `[V]`, y `[M, V]`, all contiguous. An int8 number is exact in every dtype
    of x.
    """
    row = tl.program_id(0) * BV + tl.arange(0, BV)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    channel = tl.arange(0, BH)
    sums = tl.zeros((BV, BM), dtype=tl.float32)
    w = weight_ptr + row.to(tl.int64)[:, None] * H + channel[None, :]
    x = x_ptr + token[None, :] * H + channel[:, None]
    for start in range(0, H, BH):
        inside = channel < H - start
        numbers = tl.load(w + start, mask=(row < V)[:, None] & inside[None, :], other=0)
        values = tl.load(x + start, mask=(token < M)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(numbers.to(values.dtype), values, sums, input_precision="ieee")
    scale = tl.load(scales_ptr + row, mask=row < V, other=0.0).to(tl.float32)
    place = y_ptr + token[None, :].to(tl.int64) * V + row[:, None]
    y = (sums * scale[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(place, y, mask=(token < M)[None, :] & (row < V)[:, None])


def rows_gemm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `x @ dense.T`, `[M, V]`, in the dtype of `x`.

    Args:
        x: `[M, H]`, fp32, fp16 or bf16, `M >= 1`.
        weight: `[V, H]`, int8.
        scales: `[V]`, floating.
    """
    (num_tokens, channels), rows = x.shape, weight.shape[0]
    blocks = rows_blocks(num_tokens, x.element_size())
    y = torch.empty(num_tokens, rows, dtype=x.dtype, device=x.device)
    grid = triton.cdiv(rows, blocks.rows), triton.cdiv(num_tokens, blocks.tokens)
    rows_kernel[grid](
        x.contiguous(),
        weight.contiguous(),
        scales.contiguous(),
        y,
        num_tokens,
        rows,
        channels,
        BM=blocks.tokens,
        BV=blocks.rows,
        BH=blocks.channels,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return y
