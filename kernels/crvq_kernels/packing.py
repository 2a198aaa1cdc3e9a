"""How codes lie in memory, and how the virtual groups of a layer follow from its shape.

A layer `W[N, K]` is cut into `G = K / in_group_size` base groups. Every further codebook adds one more group for each
of the `num_critical_groups` first groups, so the layer has `V = G + (num_codebooks - 1) * num_critical_groups` virtual
groups. Each virtual group owns one code per output row, `in_group_size` entries of `channel_index`, and one codebook.

A row of codes is stored as a little-endian bit stream: code `v` takes the bits `[v * nbits, (v + 1) * nbits)`, where
bit `b` is bit `b % 8` of byte `b // 8`. Eight codes fill exactly `nbits` bytes, so packing works on every eighth code
at once.

That is the stored layout. Kernels read the *tiled* one, made once when a model is loaded: tiles of `TILE_GROUPS`
virtual groups by `TILE_ROWS` output rows, a byte per code, in which the codes of one group lie side by side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NBITS, MAX_NBITS = 4, 12
TILE_GROUPS, TILE_ROWS = 32, 16
INT8_UNITS = 32  # of an int8 codebook entry: of unit root mean square, a codebook has entries up to about 4
ROW_MULTIPLE = 64  # rows are padded to whole cache lines of codes
_CODES_PER_PERIOD = 8


def packed_width(num_codes: int, nbits: int) -> int:
    """Returns the number of bytes that hold one row of `num_codes` codes of `nbits` bits.

    Raises:
        ValueError: if `nbits` is not in 4..12.
    """
    _check_nbits(nbits)
    return (num_codes * nbits + 7) // 8


def code_span(nbits: int) -> int:
    """Returns the most bytes that one code of `nbits` bits can touch: 1, 2, or, for 11 bits, 3."""
    last_start = 8 - math.gcd(nbits, 8)
    return (last_start + nbits + 7) // 8


def pack_codes(codes: Tensor, nbits: int) -> Tensor:
    """Packs one code per virtual group into the stored bit stream.

    Args:
        codes: `[N, V]`, any integer dtype, values in `[0, 2**nbits)`.
        nbits: bits per code, 4..12.

    Returns:
        `[N, packed_width(V, nbits)]`, uint8, contiguous; the unused bits of the last byte are 0.

    Raises:
        ValueError: if `codes` is not a 2-D integer tensor, a code is out of range or `nbits` is not in 4..12.
    """
    _check_nbits(nbits)
    if codes.dim() != 2 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be a 2-D integer tensor, got shape {tuple(codes.shape)} and dtype {codes.dtype}")
    num_rows, num_codes = codes.shape
    packed = torch.zeros(num_rows, packed_width(num_codes, nbits), dtype=torch.uint8, device=codes.device)
    for position in range(_CODES_PER_PERIOD):
        lane = codes[:, position::_CODES_PER_PERIOD].to(torch.int64)
        _check_range(lane, nbits)
        first_byte, shift = divmod(position * nbits, 8)
        for byte in range((shift + nbits + 7) // 8):
            down = 8 * byte - shift
            piece = lane >> down if down >= 0 else lane << -down
            packed[:, first_byte + byte :: nbits][:, : lane.shape[1]] |= (piece & 0xFF).to(torch.uint8)
    return packed


def unpack_codes(packed: Tensor, nbits: int, num_codes: int) -> Tensor:
    """Reads the codes back out of the stored bit stream.

    Args:
        packed: `[N, packed_width(num_codes, nbits)]`, uint8.
        nbits: bits per code, 4..12.
        num_codes: codes per row, `V`.

    Returns:
        `[N, num_codes]`, uint8 when `nbits <= 8`, else int16. With `nbits == 8` this is `packed` itself, not a copy.

    Raises:
        ValueError: if `packed` does not have that shape and dtype or `nbits` is not in 4..12.
    """
    width = packed_width(num_codes, nbits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width:
        raise ValueError(
            f"{num_codes} codes of {nbits} bits are stored as a uint8 tensor of shape [rows, {width}], "
            f"got {packed.dtype} and {list(packed.shape)}"
        )
    if nbits == 8:
        return packed
    dtype = torch.uint8 if nbits < 8 else torch.int16
    codes = torch.empty(packed.shape[0], num_codes, dtype=dtype, device=packed.device)
    for position in range(min(_CODES_PER_PERIOD, num_codes)):
        lane = codes[:, position::_CODES_PER_PERIOD]
        first_byte, shift = divmod(position * nbits, 8)
        # Bits shifted past the top of the 8- or 16-bit word lie outside the mask: the output dtype is wide enough.
        value = packed[:, first_byte::nbits][:, : lane.shape[1]].to(dtype) >> shift
        for byte in range(1, (shift + nbits + 7) // 8):
            high = packed[:, first_byte + byte :: nbits][:, : lane.shape[1]].to(dtype)
            value |= high << (8 * byte - shift)
        lane.copy_(value & (2**nbits - 1))
    return codes


def encode_codebooks(codebooks: Tensor) -> Tensor:
    """Returns codebooks as int8, in units of 1/32, rounded to nearest; entries must be from -4 to 127/32."""
    return (codebooks.float() * INT8_UNITS).round_().to(torch.int8)


def decode_codebooks(codebooks: Tensor) -> Tensor:
    """Returns codebooks, int8 or floating, as floating values: of int8 ones float16, which is exact."""
    return codebooks.half() / INT8_UNITS if codebooks.dtype == torch.int8 else codebooks


def high_bits(nbits: int) -> int:
    """Returns the bits per code in the high plane of the tiled layout: 0 up to 8 bits, then 1, 2, 4 and 4."""
    _check_nbits(nbits)
    return 0 if nbits <= 8 else min(1 << (nbits - 9), 4)


def tiled_size(num_rows: int, num_codes: int, nbits: int) -> int:
    """Returns the number of bytes of `[num_rows, num_codes]` codes in the tiled layout."""
    tiles = -(-num_codes // TILE_GROUPS) * (_padded(num_rows, ROW_MULTIPLE) // TILE_ROWS)
    return tiles * TILE_GROUPS * TILE_ROWS * (8 + high_bits(nbits)) // 8


def tile_codes(packed: Tensor, nbits: int, num_codes: int) -> Tensor:
    """Turns stored codes into the layout of the kernels.

    With `Vt = ceil(V / TILE_GROUPS)` and `Nt = N / TILE_ROWS`, N rounded up to a multiple of `ROW_MULTIPLE`, the
    result is `[Vt, Nt, TILE_GROUPS, TILE_ROWS]` low bytes of the codes, and for more than 8 bits a high plane of
    `[Vt, Nt, TILE_GROUPS, TILE_ROWS * h / 8]` bytes after it, `h = high_bits(nbits)`, in which row `r` of a tile has
    the bits `[r * h, (r + 1) * h)`. Padding is code 0.

    Args:
        packed: `[N, packed_width(V, nbits)]`, uint8.
        nbits: bits per code, 4..12.
        num_codes: codes per row, `V`.

    Returns:
        `[tiled_size(N, V, nbits)]`, uint8.

    Raises:
        ValueError: if `packed` does not have that shape and dtype or `nbits` is not in 4..12.
    """
    codes = unpack_codes(packed, nbits, num_codes)
    padding = (0, -num_codes % TILE_GROUPS, 0, -codes.shape[0] % ROW_MULTIPLE)
    codes = F.pad(codes, padding).unflatten(1, (-1, TILE_GROUPS)).unflatten(0, (-1, TILE_ROWS)).permute(2, 0, 3, 1)
    width = high_bits(nbits)
    if not width:
        return codes.flatten()
    per_byte = 8 // width
    high = (codes >> 8).to(torch.uint8).unflatten(-1, (-1, per_byte))
    plane = torch.zeros(high.shape[:-1], dtype=torch.uint8, device=packed.device)
    for position in range(per_byte):
        plane |= high[..., position] << (position * width)
    return torch.cat([(codes & 0xFF).to(torch.uint8).flatten(), plane.flatten()])


def untile_codes(tiles: Tensor, nbits: int, num_rows: int, num_codes: int) -> Tensor:
    """Turns the layout of the kernels back into the stored one; undoes `tile_codes`.

    Args:
        tiles: `[tiled_size(num_rows, num_codes, nbits)]`, uint8.
        nbits: bits per code, 4..12.
        num_rows: output rows, `N`.
        num_codes: codes per row, `V`.

    Returns:
        `[num_rows, packed_width(num_codes, nbits)]`, uint8, contiguous.

    Raises:
        ValueError: if `tiles` does not have that shape and dtype or `nbits` is not in 4..12.
    """
    size = tiled_size(num_rows, num_codes, nbits)
    if tiles.dtype != torch.uint8 or tiles.shape != (size,):
        raise ValueError(
            f"{num_rows} rows of {num_codes} codes of {nbits} bits are tiled as a uint8 tensor of shape [{size}], "
            f"got {tiles.dtype} and {list(tiles.shape)}"
        )
    width = high_bits(nbits)
    low_size = size * 8 // (8 + width)
    shape = (-1, _padded(num_rows, ROW_MULTIPLE) // TILE_ROWS, TILE_GROUPS, TILE_ROWS)
    codes = tiles[:low_size].view(shape)
    if width:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=tiles.device)
        high = (tiles[low_size:, None] >> shifts) & (2**width - 1)
        codes = codes.to(torch.int16) | high.to(torch.int16).view(shape) << 8
    codes = codes.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:num_rows, :num_codes]
    return codes.contiguous() if nbits == 8 else pack_codes(codes, nbits)


def num_virtual_groups(in_features: int, in_group_size: int, num_codebooks: int, num_critical_groups: int) -> int:
    """Returns `V`: base groups plus one further group per critical group and further codebook."""
    return in_features // in_group_size + (num_codebooks - 1) * num_critical_groups


def codebook_ids(num_groups: int, num_codebooks: int, num_critical_groups: int) -> Tensor:
    """Returns the codebook of each virtual group: `[V]`, int64, 0 for the `num_groups` base groups, then 1, 2, ..."""
    extended = torch.arange(1, num_codebooks, dtype=torch.int64, device="cpu").repeat_interleave(num_critical_groups)
    return torch.cat([extended.new_zeros(num_groups), extended])


def channel_index(channel_order: Tensor, in_group_size: int, num_codebooks: int, num_critical_groups: int) -> Tensor:
    """Returns the input channel that each element of each virtual group multiplies.

    Args:
        channel_order: `[K]`, any integer dtype, new to old; the critical channels are its first
            `num_critical_groups * in_group_size` entries.
        in_group_size: channels per group, `d`.
        num_codebooks: base codebook included.
        num_critical_groups: groups that have a code in every codebook.

    Returns:
        `[V * d]`, int64, on the device of `channel_order`.
    """
    order = channel_order.to(torch.int64)
    critical = order[: num_critical_groups * in_group_size]
    return torch.cat([order, critical.repeat(num_codebooks - 1)])


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check_nbits(nbits: int) -> None:
    if not MIN_NBITS <= nbits <= MAX_NBITS:
        raise ValueError(f"nbits must be between {MIN_NBITS} and {MAX_NBITS}, got {nbits}")


def _check_range(codes: Tensor, nbits: int) -> None:
    if codes.numel() == 0:
        return
    low, high = (int(value) for value in codes.aminmax())
    if low < 0 or high >= 2**nbits:
        raise ValueError(f"codes of {nbits} bits must lie in [0, {2**nbits}), got values from {low} to {high}")
