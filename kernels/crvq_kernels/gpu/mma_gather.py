"""Decode kernel in CUDA C++: a CRVQ linear layer for 1 to 16 tokens, from int8 codebooks to int8 matrix instructions.

See `mma_gather.cu` beside this file, and "`mma_gather`" in `kernels/README.md`.
"""

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ..packing import ROW_MULTIPLE, TILE_ROWS, num_virtual_groups
from . import nvrtc
from .tuning import MMA_GATHER_TOKENS, MmaGatherBlocks, mma_gather_blocks, mma_gather_pays, num_processors

logger = logging.getLogger("crvq")

SOURCE = Path(__file__).with_suffix(".cu")
_MAX_CODEBOOKS, _MAX_CODEBOOK_SIZE = 4, 256
# 128 * 128 times as many products still fit int32.
_MAX_ELEMENTS = 2**17
_TYPES = {None: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
_TABLE_BYTES = 65536  # of two codebooks


class _Arguments(ctypes.Structure):
    """`struct Arguments` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "tiles codebooks order scales bias x digits units y".split()),
        *((name, ctypes.c_int) for name in "tokens out_features in_features row_tiles codebook_size".split()),
        *((name, ctypes.c_int) for name in "groups critical_groups virtual_groups scale_type bias_type".split()),
    ]


# Why the kernel runs no more, if it has failed.
_failure: str | None = None


def give_up(error: Exception) -> None:
    """Has `serves` say no from now on, and logs why."""
    global _failure
    if _failure is None:
        _failure = f"{type(error).__name__}: {error}"
        logger.warning("The CUDA kernel mma_gather failed, Triton's kernels run in its place: %s", _failure)


def failure() -> str | None:
    """Returns why the kernel runs no more, None if it has not failed."""
    return _failure


def serves(
    device: torch.device,
    num_tokens: int,
    in_features: int,
    dtype: torch.dtype,
    codebook_dtype: torch.dtype,
    codebooks_shape: tuple[int, int, int],
) -> bool:
    """Returns whether the kernel is to multiply `num_tokens` rows of `x`, of type `dtype`, with such a layer."""
    num_codebooks, codebook_size, in_group_size = codebooks_shape
    return (
        _failure is None
        and 1 <= num_tokens <= MMA_GATHER_TOKENS
        and dtype in (torch.float16, torch.bfloat16)
        and codebook_dtype == torch.int8
        and in_group_size == 8
        and num_codebooks <= _MAX_CODEBOOKS
        and codebook_size <= _MAX_CODEBOOK_SIZE
        and num_codebooks * in_features <= _MAX_ELEMENTS
        and torch.version.hip is None
        and _capability(device) >= (8, 0)
        and _is_wanted(device, num_tokens, in_features, dtype, num_codebooks)
        and _fits(device, num_tokens, num_codebooks)
    )


def _is_wanted(
    device: torch.device, num_tokens: int, in_features: int, dtype: torch.dtype, num_codebooks: int
) -> bool:
    """Returns whether CRVQ_MMA_GATHER asks for the kernel for so many tokens, or without it a GPU has measured it."""
    most = os.environ.get("CRVQ_MMA_GATHER")
    if most:
        return num_tokens <= int(most)
    return dtype == torch.float16 and mma_gather_pays(_capability(device), num_tokens, in_features, num_codebooks)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _fits(device: torch.device, num_tokens: int, num_codebooks: int) -> bool:
    """Returns whether a program has the shared memory, whatever the size of the layer."""
    limit = nvrtc.max_shared_bytes(torch.cuda.current_device() if device.index is None else device.index)
    sizes = (num_tokens, num_tokens * _num_digits(num_tokens), 0, 0, num_codebooks)
    return any(not some.fused and _shared_bytes(some, *sizes) <= limit for some in mma_gather_blocks(num_tokens))


def mma_gather(
    x: Tensor,
    tiles: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    channel_order: Tensor,
    bias: Tensor | None,
    nbits: int,
    num_critical_groups: int,
    blocks: MmaGatherBlocks | None = None,
    written: bool = False,
) -> Tensor:
    """Launches the kernel; arguments as in `reference.linear_ref`, but codes tiled and what `serves` says.

    Args:
        x: `[M, K]`, float16 or bfloat16, `1 <= M <= MMA_GATHER_TOKENS`.
        codebooks: `[num_codebooks, C, 8]`, int8.
        blocks: how to run it; chosen if None. The result is the same bit for bit.
        written: whether the kernel ahead may have written one of the tensors but `x`: then this one waits for it.

    Returns:
        `[M, N]`, in the dtype of `x`.

    Raises:
        OSError: there is no NVRTC library.
        RuntimeError: the kernel does not compile, or the GPU has less than the blocks need.
    """
    num_tokens, in_features = x.shape
    out_features, (num_codebooks, codebook_size, in_group_size) = scales.numel(), codebooks.shape
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    digits = _num_digits(num_tokens)
    columns, steps = num_tokens * digits, -(-num_codes // 4)
    order_bytes, given = channel_order.element_size(), (tiles, codebooks, scales, channel_order, bias)
    if order_bytes == 8:
        channel_order, order_bytes = channel_order.int(), 4
    scales = _readable(scales)
    bias = None if bias is None else _readable(bias)
    x, tiles, codebooks, channel_order = map(_aligned, (x, tiles, codebooks, channel_order))

    written |= any(a is not b for a, b in zip(given, (tiles, codebooks, scales, channel_order, bias), strict=True))
    sizes = (num_tokens, columns, steps, in_features, num_codebooks)
    limit = nvrtc.max_shared_bytes(x.device.index)
    fitting = [
        some
        for some in (mma_gather_blocks(num_tokens, out_features, in_features) if blocks is None else (blocks,))
        if _shared_bytes(some, *sizes) <= limit
    ]
    if not fitting:
        raise RuntimeError(f"a program takes more than the {limit} bytes of shared memory that there are")
    blocks = fitting[0]
    dependent = blocks.dependent and not written and _capability(x.device) >= (9, 0)
    # Outside of graphs the host is slower than launches, and who knows what has just written the layer.
    dependent = dependent and torch.cuda.is_current_stream_capturing()
    shared_bytes = _shared_bytes(blocks, *sizes)
    gather, split = _kernels(macros(blocks, num_tokens, num_codebooks, order_bytes, x.dtype), x.device)

    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    arguments = _Arguments(
        tiles=tiles.data_ptr(),
        codebooks=codebooks.data_ptr(),
        order=channel_order.data_ptr(),
        scales=scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        x=x.data_ptr(),
        y=y.data_ptr(),
        tokens=num_tokens,
        out_features=out_features,
        in_features=in_features,
        row_tiles=-(-out_features // ROW_MULTIPLE) * (ROW_MULTIPLE // TILE_ROWS),
        codebook_size=codebook_size,
        groups=in_features // in_group_size,
        critical_groups=max(num_critical_groups, 1),
        virtual_groups=num_codes,
        scale_type=_TYPES[scales.dtype],
        bias_type=_TYPES[None if bias is None else bias.dtype],
    )
    stream, threads = torch.cuda.current_stream(x.device).cuda_stream, 32 * blocks.warps
    if not blocks.fused:
        split_x = torch.empty(steps * columns * 32 + num_tokens * 4, dtype=torch.uint8, device=x.device)
        arguments.digits, arguments.units = split_x.data_ptr(), split_x.data_ptr() + steps * columns * 32
        grid = (-(-steps * 4 // threads), num_tokens)
        split.launch(grid, threads, 4 * blocks.warps, arguments, stream, dependent)
    programs = min(gather.programs(threads, shared_bytes), blocks.programs) * num_processors(x.device)
    grid = (min(-(-out_features // blocks.rows), programs), 1)
    gather.launch(grid, threads, shared_bytes, arguments, stream, dependent)
    return y


def _num_digits(num_tokens: int) -> int:
    return 3 if num_tokens <= 2 else 2


def macros(
    blocks: MmaGatherBlocks, num_tokens: int, num_codebooks: int, order_bytes: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    """Returns the macros that the source is compiled with.

    Args:
        order_bytes: of an entry of the channel order: 1, 2 or 4.
        dtype: of `x`.
    """
    column_tiles = -(-num_tokens * _num_digits(num_tokens) // 8)
    return (
        ("WARPS", blocks.warps),
        ("ROWS", blocks.rows // 8),
        ("AHEAD", blocks.ahead),
        ("DIGITS", _num_digits(num_tokens)),
        ("COLUMN_TILES", 4 if column_tiles == 3 else column_tiles),
        ("BOOKS", num_codebooks),
        ("ORDER_BYTES", order_bytes),
        ("BFLOAT16", int(dtype == torch.bfloat16)),
        ("FUSED", int(blocks.fused)),
        ("PROGRAMS", blocks.programs),
        ("DEPENDENT", int(blocks.dependent)),
    )


@functools.cache
def _kernels(macros: tuple[tuple[str, int], ...], device: torch.device) -> tuple[nvrtc.Kernel, nvrtc.Kernel | None]:
    names = ("mma_gather",) if dict(macros)["FUSED"] else ("mma_gather", "split_x")
    found = nvrtc.load(SOURCE.read_text(encoding="utf-8"), macros, names, device.index)
    return found if len(found) == 2 else (*found, None)


def _shared_bytes(
    blocks: MmaGatherBlocks, num_tokens: int, columns: int, steps: int, in_features: int, num_codebooks: int
) -> int:
    """Returns the shared memory that a program takes; see the source."""
    table = _TABLE_BYTES if num_codebooks <= 2 else 2 * _TABLE_BYTES
    words = -(-num_tokens * (blocks.warps + 1) * 4 // 16) * 16
    sums = blocks.warps * columns * (blocks.rows + 4) * 4
    if not blocks.fused:
        return table + words + sums
    return table + words + steps * columns * 32 + max(sums, num_tokens * in_features * 2)


def _aligned(tensor: Tensor) -> Tensor:
    """Returns `tensor` contiguous and at an address that vectors of 16 bytes can be read from."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _readable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in _TYPES else tensor.float()).contiguous()
