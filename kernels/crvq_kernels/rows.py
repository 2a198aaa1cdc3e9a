"""PyTorch operator `crvq::rows_linear`: a product with a weight of int8 rows, each with a scale.

Embeddings and heads in 8 bits have such weights. The operator is opaque to `torch.compile` and never holds all of the
dense weight, in neither direction. Triton is imported when a CUDA tensor first needs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import multiplies_bfloat16
from .cpu import rows as cpu
from .ops import is_transformed, uses_triton

# Rows that are made dense at once: on a CPU what stays in the cache, on a GPU what fills it with work.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_LARGE_CHUNK = 2**27
_FEW_TOKENS = 32  # on a CPU: up to here the compiled kernel is faster than a dense product, benchmarks/speed/cpu.py


def dequantize_rows(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns dense rows `[..., H]` in `dtype` of int8 `weight` `[..., H]` and `scales` `[...]`."""
    return weight.to(dtype) * scales.to(dtype).unsqueeze(-1)


def rows_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `x @ dense.T`, `[..., V]` in the dtype of `x`, with a gradient for `x`.

    Under transforms of `torch.func` and forward-mode differentiation the dense weight is made.

    Args:
        x: `[..., H]`, fp32, fp16 or bf16.
        weight: `[V, H]`, int8.
        scales: `[V]`, floating; row `v` of the dense weight is `weight[v] * scales[v]`.

    Raises:
        ValueError: if a shape, dtype or device does not fit the others.
    """
    if is_transformed():
        _check(x, weight, scales)
        return F.linear(x, dequantize_rows(weight, scales, x.dtype))
    return torch.ops.crvq.rows_linear(x, weight, scales)


def _parts(weight: Tensor) -> list[slice]:
    """Returns the rows of `weight`, in pieces that are made dense one after the other."""
    rows = max(64, _CHUNK_ELEMENTS.get(weight.device.type, _LARGE_CHUNK) // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _rows_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    weight = weight.detach()  # of parameters that say another dtype than they have, the numbers
    _check(x, weight, scales)
    tokens = x.reshape(-1, x.shape[-1])
    if _reads_rows(tokens):
        from .gpu.rows import rows_gemm

        with torch.cuda.device_of(x):
            output = rows_gemm(tokens, weight, scales)
    elif x.is_cpu and 0 < len(tokens) <= _FEW_TOKENS and cpu.can_multiply(tokens, scales):
        output = cpu.int8_rows(tokens, weight, scales)
    else:
        output = in_parts(tokens, weight, scales)
    return torch.ops.aten._unsafe_view(output.to(x.dtype), (*x.shape[:-1], len(weight)))


def in_parts(tokens: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Returns `tokens @ dense.T` in the dtype it was summed in; tokens `[M, H]`, some rows made dense at a time."""
    slow = (torch.float16,) if multiplies_bfloat16() else (torch.float16, torch.bfloat16)
    if tokens.is_cpu and tokens.dtype in slow:  # a conversion and a product that take several times as long
        tokens = tokens.float()
    output = tokens.new_empty(len(tokens), len(weight))
    for part in _parts(weight):
        if tokens.dtype == torch.float16:  # whose range sums of int8 products may leave
            dense = dequantize_rows(weight[part], scales[part], tokens.dtype)
            output[:, part] = F.linear(tokens, dense)
        else:
            output[:, part] = F.linear(tokens, weight[part].to(tokens.dtype)) * scales[part].to(tokens.dtype)
    return output


def _reads_rows(tokens: Tensor) -> bool:
    """Returns whether the Triton kernel runs: where a GPU has measured it."""
    if tokens.dtype != torch.float16 or not uses_triton(tokens.device) or torch.version.hip is not None:
        return False
    from .gpu.tuning import MEASURED, ROWS_MAX_TOKENS

    return 0 < len(tokens) <= ROWS_MAX_TOKENS and torch.cuda.get_device_capability(tokens.device) in MEASURED


def _check(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight must be an int8 tensor of shape [V, H], got {weight.dtype} and {list(weight.shape)}")
    if scales.shape != weight.shape[:1] or not scales.is_floating_point():
        raise ValueError(
            f"scales must be a floating tensor of shape [{len(weight)}], got {scales.dtype} and {list(scales.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating tensor of shape [..., {weight.shape[1]}], got {x.dtype} and {list(x.shape)}"
        )
    if not x.device == weight.device == scales.device:
        raise ValueError(
            f"x is on {x.device}, weight on {weight.device}, scales on {scales.device}; move them together"
        )


def _fake(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    _check(x, weight, scales)
    return x.new_empty(*x.shape[:-1], len(weight))


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None]:
    if ctx.needs_input_grad[2]:
        raise ValueError("crvq::rows_linear has a gradient for x only; call requires_grad_(False) on the scales")
    weight, scales = ctx.saved_tensors
    tokens = grad.reshape(-1, grad.shape[-1])
    total = torch.zeros(len(tokens), weight.shape[1], dtype=torch.float32, device=grad.device)
    for part in _parts(weight):
        total += tokens[:, part] @ dequantize_rows(weight[part], scales[part], grad.dtype)
    return total.to(grad.dtype).view(*grad.shape[:-1], -1), None, None


def _register() -> torch.library.Library:
    library = torch.library.Library("crvq", "FRAGMENT")
    library.define("rows_linear(Tensor x, Tensor weight, Tensor scales) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
    library.impl("rows_linear", _rows_linear, "CompositeExplicitAutograd")
    torch.library.register_fake("crvq::rows_linear", _fake, lib=library)
    torch.library.register_autograd("crvq::rows_linear", _backward, setup_context=_save_for_backward, lib=library)
    return library


_LIBRARY = _register()
