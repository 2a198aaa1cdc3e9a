"""PyTorch operators `crvq::linear` and `crvq::dequantize`: schema, checks, implementations, gradient.

Both are opaque to `torch.compile` and depend on nothing but their arguments: nothing is cached. Triton is imported
when a CUDA tensor first needs it; everywhere else PyTorch does the work.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import channel_index, num_virtual_groups, packed_width, unpack_codes

logger = logging.getLogger("crvq")

_GEMV_MAX_TOKENS = 16
# Lookup tables take num_tokens * codebook_size multiply-adds per channel: beyond about this, dequantizing is faster.
_LOOKUP_MAX_TOKENS = 8
_LOOKUP_MAX_PRODUCTS = 8 * 256
# Codes per step of the PyTorch loops over rows, so that intermediate results stay in cache.
_CODES_PER_STEP = 2**17
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def implementation(device: torch.device | str, num_tokens: int, codebook_size: int = 256) -> str:
    """Names the code that `linear` runs for `num_tokens` rows of `x` on `device`.

    Returns:
        One of "triton: gemv", "triton: dequantize + matmul", "cpu: lookup tables" and
        "<device type>: dequantize + matmul".
    """
    device = torch.device(device)
    if _uses_triton(device):
        return "triton: gemv" if num_tokens <= _GEMV_MAX_TOKENS else "triton: dequantize + matmul"
    kind = device.type
    few = num_tokens <= _LOOKUP_MAX_TOKENS and num_tokens * codebook_size <= _LOOKUP_MAX_PRODUCTS
    return "cpu: lookup tables" if kind == "cpu" and few else f"{kind}: dequantize + matmul"


def linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
) -> Tensor:
    """Applies a CRVQ layer to `x`, with gradients for `x` and `bias`.

    Args:
        x: `[..., K]`, fp32, fp16 or bf16, any strides; may be empty.
        codes: `[N, packed_width(V, nbits)]`, uint8, see `packing`.
        codebooks: `[num_codebooks, C, d]`, floating, base codebook first; `C <= 2**nbits`.
        scales: `[N]`, floating, one factor per output row.
        channel_order: `[K]`, integer, new to old; critical channels first.
        bias: `[N]`, floating, or None.
        nbits: bits per code, 4..12.
        num_critical_groups: groups that have a code in every codebook.

    Returns:
        `[..., N]`, in the dtype of `x`, accumulated in fp32.

    Raises:
        ValueError: if a shape, dtype or device does not fit the others.
    """
    return torch.ops.crvq.linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups)


def dequantize(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    nbits: int,
    num_critical_groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the dense weight of a CRVQ layer: `[N, K]`, `dtype`, channels in their original order.

    The arguments are those of `linear`; `dtype` is fp32, fp16 or bf16.

    Raises:
        ValueError: if a shape, dtype or device does not fit the others.
    """
    return torch.ops.crvq.dequantize(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _uses_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@functools.cache
def _log_once(name: str) -> None:
    logger.info("CRVQ linear layers run as '%s'", name)


def _linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups):
    _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups)
    layer = (codes, codebooks, scales, channel_order)
    tokens = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], codes.shape[0])
    if tokens.shape[0] == 0:
        return x.new_empty(shape)
    name = implementation(x.device, tokens.shape[0], codebooks.shape[1])
    _log_once(name)
    if name == "triton: gemv":
        from .gemv import gemv

        with torch.cuda.device_of(x):
            y = gemv(tokens, *layer, bias, nbits, num_critical_groups)
    elif name == "triton: dequantize + matmul":
        weight = _dequantize_triton(*layer, nbits, num_critical_groups, x.dtype, permuted=True)
        y = F.linear(tokens.index_select(1, channel_order.int()), weight, None if bias is None else bias.to(x.dtype))
    else:
        run = _lookup_linear if name == "cpu: lookup tables" else _dequantize_linear
        y = run(tokens.float(), *layer, nbits, num_critical_groups)
        if bias is not None:
            y += bias
        y = y.to(x.dtype)
    return y.view(shape)


def _dequantize(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype):
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    _check_dtype("dtype", dtype)
    if _uses_triton(codes.device):
        layer = (codes, codebooks, scales, channel_order)
        return _dequantize_triton(*layer, nbits, num_critical_groups, dtype, permuted=False)
    inverse_order = torch.empty_like(channel_order, dtype=torch.int32)
    inverse_order[channel_order.long()] = torch.arange(len(channel_order), dtype=torch.int32, device=codes.device)
    weight = torch.empty(codes.shape[0], len(channel_order), dtype=dtype, device=codes.device)
    for rows, block in _dequantized_rows(codes, codebooks, len(channel_order), nbits, num_critical_groups):
        block *= scales[rows, None]
        weight[rows] = block.index_select(1, inverse_order)
    return weight


def _dequantize_triton(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype, permuted):
    from .dequant import dequantize_weight

    layer = (codes, codebooks, scales, channel_order)
    with torch.cuda.device_of(codes):
        return dequantize_weight(*layer, nbits, num_critical_groups, dtype, permuted)


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
    codebooks = codebooks.float()
    for rows in _row_steps(codes.shape[0], num_codes):
        block_codes = unpack_codes(codes[rows], nbits, num_codes).int()
        base, *extended = block_codes.split([num_groups] + [num_critical_groups] * (num_codebooks - 1), dim=1)
        block = F.embedding(base, codebooks[0])  # [rows, G, d]
        for codebook, critical in zip(codebooks[1:], extended, strict=True):
            block[:, :num_critical_groups] += F.embedding(critical, codebook)
        yield rows, block.flatten(1)


def _dequantize_linear(x, codes, codebooks, scales, channel_order, nbits, num_critical_groups):
    """Multiplies `x` (`[M, K]`, fp32) with a few dequantized rows at a time; returns `[M, N]`, fp32."""
    x_ordered = x.index_select(1, channel_order.int())
    y = x.new_empty(x.shape[0], codes.shape[0])
    for rows, block in _dequantized_rows(codes, codebooks, x.shape[1], nbits, num_critical_groups):
        y[:, rows] = x_ordered @ block.T
    return y.mul_(scales)


def _lookup_linear(x, codes, codebooks, scales, channel_order, nbits, num_critical_groups):
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
    codebooks = codebooks.float()
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


def _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups) -> None:
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    out_features, in_features = codes.shape[0], channel_order.shape[0]
    _check_dtype("x", x.dtype)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape [..., {in_features}] for this layer, got {list(x.shape)}")
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but the layer is on {codes.device}; move one of them")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")


def _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups) -> None:
    if codebooks.dim() != 3 or not codebooks.is_floating_point() or codebooks.shape[1] > 2**nbits:
        raise ValueError(
            f"codebooks must be a floating tensor of shape [num_codebooks, at most {2**nbits}, in_group_size], "
            f"got {codebooks.dtype} and {list(codebooks.shape)}"
        )
    num_codebooks, _, in_group_size = codebooks.shape
    if in_group_size not in (4, 8, 16):
        raise ValueError(f"the in_group_size (last axis of codebooks) must be 4, 8 or 16, got {in_group_size}")
    integer = not (channel_order.is_floating_point() or channel_order.is_complex())
    if channel_order.dim() != 1 or not integer or channel_order.shape[0] % in_group_size:
        raise ValueError(
            f"channel_order must be an integer tensor of shape [in_features], a multiple of {in_group_size}, "
            f"got {channel_order.dtype} and {list(channel_order.shape)}"
        )
    num_groups = channel_order.shape[0] // in_group_size
    if not 0 <= num_critical_groups <= num_groups:
        raise ValueError(f"num_critical_groups must be between 0 and {num_groups}, got {num_critical_groups}")
    num_codes = num_virtual_groups(channel_order.shape[0], in_group_size, num_codebooks, num_critical_groups)
    width = packed_width(num_codes, nbits)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"codes must be a uint8 tensor of shape [out_features, {width}] ({num_codes} codes of {nbits} bits per "
            f"row), got {codes.dtype} and {list(codes.shape)}"
        )
    if scales.shape != codes.shape[:1] or not scales.is_floating_point():
        raise ValueError(
            f"scales must be a floating tensor of shape [{codes.shape[0]}], "
            f"got {scales.dtype} and {list(scales.shape)}"
        )


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def _linear_fake(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups):
    _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _dequantize_fake(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype):
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    _check_dtype("dtype", dtype)
    return codes.new_empty(codes.shape[0], channel_order.shape[0], dtype=dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    _, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups = inputs
    ctx.save_for_backward(codes, codebooks, scales, channel_order)
    ctx.constants = (nbits, num_critical_groups)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    need_x, _, need_codebooks, need_scales, _, need_bias, *_ = ctx.needs_input_grad
    if need_codebooks or need_scales:
        raise ValueError(
            "crvq::linear has gradients for x and bias only; call requires_grad_(False) on codebooks and scales, "
            "or train them through a differentiable dequantization"
        )
    grad_x = grad_bias = None
    if need_x:
        grad_x = grad @ torch.ops.crvq.dequantize(*ctx.saved_tensors, *ctx.constants, grad.dtype)
    if need_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None


def _register() -> torch.library.Library:
    library = torch.library.Library("crvq", "DEF")
    layer = "Tensor codes, Tensor codebooks, Tensor scales, Tensor channel_order"
    schemas = {
        "linear": f"(Tensor x, {layer}, Tensor? bias, int nbits, int num_critical_groups) -> Tensor",
        "dequantize": f"({layer}, int nbits, int num_critical_groups, ScalarType dtype) -> Tensor",
    }
    for name, schema in schemas.items():
        library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    library.impl("linear", _linear, "CompositeExplicitAutograd")
    library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
    torch.library.register_fake("crvq::linear", _linear_fake, lib=library)
    torch.library.register_fake("crvq::dequantize", _dequantize_fake, lib=library)
    torch.library.register_autograd("crvq::linear", _linear_backward, setup_context=_save_for_backward, lib=library)
    return library


_LIBRARY = _register()
