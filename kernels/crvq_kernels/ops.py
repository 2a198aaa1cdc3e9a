"""PyTorch operators `crvq::linear` and `crvq::dequantize`: schema, checks, implementations, gradient.

Both are opaque to `torch.compile` and depend on nothing but their arguments: nothing is cached. Codes come as they are
stored, or tiled, as the kernels read them; a model tiles them once when it is loaded. Triton is imported when a CUDA
tensor first needs it; on a CPU the compiled kernel runs, everywhere else PyTorch.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, portable
from .packing import decode_codebooks, num_virtual_groups, packed_width, tile_codes, tiled_size, untile_codes

logger = logging.getLogger("crvq")

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a thread has set where nothing special is going on, in inference mode and outside of it.
_included_keys = torch._C._dispatch_tls_local_include_set
_num_function_modes = torch._C._len_torch_function_stack
_INFERENCE_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_ORDINARY_KEYS = (_INFERENCE_KEYS.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr(), _INFERENCE_KEYS.raw_repr())


def prefers_tiles(device: torch.device | str) -> bool:
    """Returns whether layers on `device` run from tiled codes; stored ones would be slower."""
    device = torch.device(device)
    return uses_triton(device) or (device.type == "cpu" and cpu.library() is not None)


def prefers_int8_codebooks(device: torch.device | str) -> bool:
    """Returns whether layers on `device` run from int8 codebooks if stored so; elsewhere they are decoded once."""
    return uses_triton(torch.device(device))


def implementation(
    device: torch.device | str,
    num_tokens: int,
    out_features: int = 4096,
    in_features: int = 4096,
    codebook_size: int = 256,
    nbits: int = 8,
    dtype: torch.dtype = torch.float32,
    tiled: bool = True,
    codebook_dtype: torch.dtype = torch.float16,
    num_codebooks: int = 2,
    in_group_size: int = 8,
) -> str:
    """Names the code that `linear` runs for `num_tokens` rows of `x`, of type `dtype`, on `device`.

    Returns:
        "cuda: mma_gather"; or "triton: " and "gemv", "gemm", "wgmma" or "dequantize + matmul"; or
        "cpu (<instructions>): " and "tables" or "dequantize + matmul"; or "<device type> (torch): " and one of these
        two.
    """
    device = torch.device(device)
    if uses_triton(device):
        from .gpu import mma_gather
        from .gpu.tuning import kernel_for
        from .hopper.tuning import WGMMA_TOKENS

        codebooks = codebook_dtype, (num_codebooks, codebook_size, in_group_size)
        if mma_gather.serves(device, num_tokens, in_features, dtype, *codebooks):
            return "cuda: mma_gather"
        if num_tokens in WGMMA_TOKENS:
            from .hopper import wgmma

            if wgmma.serves(device, dtype, *codebooks):
                return "triton: wgmma"
        return f"triton: {kernel_for(num_tokens, out_features, in_features, codebook_size)}"
    if device.type == "cpu" and tiled and cpu.library() is not None:
        way = "tables" if cpu.uses_tables(num_tokens, out_features, nbits, dtype) else "dequantize + matmul"
        return f"cpu ({cpu.INSTRUCTIONS[cpu.library().level]}): {way}"
    way = "tables" if portable.uses_tables(device, num_tokens, codebook_size) else "dequantize + matmul"
    return f"{device.type} (torch): {way}"


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
        codes: uint8, see `packing`: stored, `[N, packed_width(V, nbits)]`, or tiled, `[tiled_size(N, V, nbits)]`.
        codebooks: `[num_codebooks, C, d]`, floating or int8, in units of 1/32; base codebook first; `C <= 2**nbits`.
        scales: `[N]`, floating, one factor per output row.
        channel_order: `[K]`, integer, new to old; critical channels first.
        bias: `[N]`, floating, or None.
        nbits: bits per code, 4..12.
        num_critical_groups: groups that have a code in every codebook.

    Under transforms of `torch.func` and forward-mode differentiation the dense weight is made, whose product PyTorch
    can differentiate and vectorise in every way.

    Returns:
        `[..., N]`, in the dtype of `x`, accumulated in fp32.

    Raises:
        ValueError: if a shape, dtype or device does not fit the others.
    """
    if is_transformed():
        layer = (codes, codebooks, scales, channel_order)
        _check_linear(x, *layer, bias, nbits, num_critical_groups)
        weight = torch.ops.crvq.dequantize(*layer, nbits, num_critical_groups, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
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


def uses_triton(device: torch.device) -> bool:
    """Returns whether Triton's kernels run on `device`."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _log_once(name: str) -> None:
    logger.info("CRVQ linear layers run as '%s'", name)


def is_plain(x: Tensor, *trainable: Tensor | None) -> bool:
    """Returns whether the dispatcher would end up calling the kernel with these tensors, and do nothing else.

    It takes as long as a small layer on a CPU, so `CRVQLinear` calls `cpu.Layer` itself where this holds: no tracing
    and no mode of any kind, which PyTorch writes down in a set of keys, no subclass or special kind of tensor, nothing
    to differentiate in either direction.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if _included_keys().raw_repr() not in _ORDINARY_KEYS or _num_function_modes() or forward_ad._current_level >= 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(tensor is not None and tensor.requires_grad for tensor in (x, *trainable))


def is_transformed() -> bool:
    """Returns whether `torch.func` transforms what runs, or forward-mode differentiation carries tangents along.

    The gradient that is registered below serves neither.
    """
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups):
    _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups)
    shape = (*x.shape[:-1], scales.shape[0])
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.shape[0] == 0:
        return x.new_empty(shape)
    sizes = tokens.shape[0], scales.shape[0], tokens.shape[1], codebooks.shape[1]
    codebooks_are = codebooks.dtype, codebooks.shape[0], codebooks.shape[2]
    name = implementation(x.device, *sizes, nbits, x.dtype, codes.dim() == 1, *codebooks_are)
    _log_once(name)
    layer = (codes, codebooks, scales, channel_order)
    constants = (nbits, num_critical_groups)
    if name.startswith(("triton", "cuda:")):
        y = _linear_gpu(name, tokens, layer, bias, *constants)
    elif "(torch)" in name:
        layer = _stored(layer, *constants)
        run = portable.lookup_linear if name.endswith("tables") else portable.dequantize_linear
        y = run(tokens.float(), *layer, *constants)
        y = (y if bias is None else y.add_(bias)).to(x.dtype)
    else:
        return _cpu_layer(layer, bias, *constants)(x)
    # Not as a view: what an operator returns could else not be changed in place under autograd.
    return torch.ops.aten._unsafe_view(y, shape)


def _linear_gpu(name, tokens, layer, bias, nbits, num_critical_groups):
    constants = (nbits, num_critical_groups)
    with torch.cuda.device_of(tokens):
        written, layer = layer[0].dim() == 2, _tiled(layer, *constants)
        if name == "cuda: mma_gather":
            from .gpu.mma_gather import give_up, mma_gather

            try:
                return mma_gather(tokens, *layer, bias, *constants, written=written)
            except torch.OutOfMemoryError:
                raise  # of the device, not of the kernel
            except (OSError, RuntimeError) as error:
                give_up(error)
            name = implementation(
                tokens.device, tokens.shape[0], layer[2].shape[0], tokens.shape[1], layer[1].shape[1]
            )
        if name == "triton: gemv":
            from .gpu.gemv import gemv

            return gemv(tokens, *layer, bias, *constants)
        if name == "triton: wgmma":
            from .hopper.wgmma import wgmma

            return wgmma(tokens, *layer, bias, *constants)
        if name == "triton: gemm":
            from .gpu.gemm import gemm

            return gemm(tokens, *layer, bias, *constants)
        from .gpu.dequant import dequantize_weight
        from .gpu.reorder import reorder

        weight = dequantize_weight(*layer, *constants, tokens.dtype, permuted=True)
        return F.linear(reorder(tokens, layer[3]), weight, None if bias is None else bias.to(tokens.dtype))


def _dequantize(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype):
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    _check_dtype("dtype", dtype)
    layer = (codes, codebooks, scales, channel_order)
    constants = (nbits, num_critical_groups)
    if uses_triton(codes.device):
        from .gpu.dequant import dequantize_weight

        with torch.cuda.device_of(codes):
            return dequantize_weight(*_tiled(layer, *constants), *constants, dtype, permuted=False)
    if codes.device.type == "cpu" and codes.dim() == 1 and cpu.library() is not None:
        return _cpu_layer(layer, None, *constants).dequantize(dtype)
    return portable.dequantize(*_stored(layer, *constants), *constants, dtype)


def _cpu_layer(layer, bias, nbits, num_critical_groups):
    """Returns a layer for the compiled kernel, with the dtypes and strides it reads."""
    codes, codebooks, scales, channel_order = layer
    codebooks = decode_codebooks(codebooks)
    floats = [codebooks, scales] if bias is None else [codebooks, scales, bias]
    floats = [(t if t.dtype in _FLOAT_DTYPES else t.float()).contiguous() for t in floats]
    bias = None if bias is None else floats[2]
    return cpu.Layer(codes.contiguous(), *floats[:2], channel_order.contiguous(), bias, nbits, num_critical_groups)


def _num_codes(layer, num_critical_groups):
    _, codebooks, _, channel_order = layer
    return num_virtual_groups(channel_order.shape[0], codebooks.shape[2], codebooks.shape[0], num_critical_groups)


def _tiled(layer, nbits, num_critical_groups):
    codes, *others = layer
    if codes.dim() == 2:
        codes = tile_codes(codes, nbits, _num_codes(layer, num_critical_groups))
    return (codes, *others)


def _stored(layer, nbits, num_critical_groups):
    codes, _, scales, _ = layer
    if codes.dim() == 1:
        codes = untile_codes(codes, nbits, scales.shape[0], _num_codes(layer, num_critical_groups))
    return (codes, *layer[1:])


def _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups) -> None:
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    out_features, in_features = scales.shape[0], channel_order.shape[0]
    _check_dtype("x", x.dtype)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape [..., {in_features}] for this layer, got {list(x.shape)}")
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but the layer is on {codes.device}; move one of them")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")


def _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups) -> None:
    numbers = codebooks.is_floating_point() or codebooks.dtype == torch.int8
    if codebooks.dim() != 3 or not numbers or codebooks.shape[1] > 2**nbits:
        raise ValueError(
            f"codebooks must be a floating or int8 tensor of shape "
            f"[num_codebooks, at most {2**nbits}, in_group_size], "
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
    if scales.dim() != 1 or not scales.is_floating_point():
        raise ValueError(
            f"scales must be a floating tensor of shape [out_features], got {scales.dtype} and {list(scales.shape)}"
        )
    out_features = scales.shape[0]
    stored, tiled = (out_features, packed_width(num_codes, nbits)), (tiled_size(out_features, num_codes, nbits),)
    if codes.dtype != torch.uint8 or codes.shape not in (stored, tiled):
        raise ValueError(
            f"codes must be a uint8 tensor of shape {list(stored)} ({num_codes} codes of {nbits} bits for each of "
            f"{out_features} scales) or, tiled, {list(tiled)}, got {codes.dtype} and {list(codes.shape)}"
        )


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def _linear_fake(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups):
    _check_linear(x, codes, codebooks, scales, channel_order, bias, nbits, num_critical_groups)
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def _dequantize_fake(codes, codebooks, scales, channel_order, nbits, num_critical_groups, dtype):
    _check_layer(codes, codebooks, scales, channel_order, nbits, num_critical_groups)
    _check_dtype("dtype", dtype)
    return codes.new_empty(scales.shape[0], channel_order.shape[0], dtype=dtype)


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
