"""The library that the C files beside this one make: finding it, choosing its instruction set, calling it.

The library is optional: without a C compiler at install time there is none, and the PyTorch code in `portable` runs
instead. The environment variable CRVQ_CPU forces a choice: one of `INSTRUCTIONS`, or "torch" for no library. Two are
only chosen so: "avx512bw" and "neon", which are right (tested by emulation) but whose speed nobody has measured.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import num_virtual_groups, tiled_size
from .address import address
from .processor import multiplies_bfloat16

INSTRUCTIONS = ("scalar", "avx2", "avx512bw", "vbmi", "neon")  # numbered as in instruction_set.h
CHOICES = (*INSTRUCTIONS, "torch")
FILE = Path(__file__).with_name("libcrvq_cpu.so")
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ORDERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# crvq_call in call.h: what changes from call to call, and what belongs to the layer.
_CALL = struct.Struct("2P3q4i")
_LAYER = struct.Struct("5P2q10i")
SEARCH_CALL = struct.Struct("7P7q4i")  # crvq_search_call
ROWS_CALL = struct.Struct("4P3q4i")  # crvq_rows_call
_WEIGHTS_PER_STEP = 2**20  # dequantized at a time


class Library:
    """The loaded library.

    Attributes:
        supported: indices into `INSTRUCTIONS` of all that this processor has.
        level: index into `INSTRUCTIONS` of what is used.
        linear, dequantize: C functions of a packed `crvq_call`; what they return is for `Layer`.
        search: C function of a packed `SEARCH_CALL`; returns 0, or another number for a code that is no codeword's.
        int8_rows: C function of a packed `ROWS_CALL`.
    """

    def __init__(self, path: Path):
        """Loads the library at `path`.

        Raises:
            OSError: it cannot be loaded, or belongs to another version of this package.
        """
        library = ctypes.CDLL(str(path))
        size = _CALL.size + _LAYER.size + SEARCH_CALL.size + ROWS_CALL.size
        if not hasattr(library, "crvq_has_instructions") or library.crvq_call_size() != size:
            raise OSError(f"{path} was built from other sources; install crvq_hf again")
        self.linear, self.dequantize = library.crvq_linear, library.crvq_dequantize
        self.search, self.int8_rows = library.crvq_search, library.crvq_int8_rows
        for function in (self.linear, self.dequantize, self.search, self.int8_rows):
            function.argtypes = [ctypes.c_char_p]
        self.supported = [number for number in range(len(INSTRUCTIONS)) if library.crvq_has_instructions(number)]
        self.level = library.crvq_instructions()


@functools.cache
def library() -> Library | None:
    """Returns the library as CRVQ_CPU says to use it, None where PyTorch code is to run.

    Raises:
        ValueError: CRVQ_CPU names what is unknown or what this machine does not have.
    """
    choice = os.environ.get("CRVQ_CPU", "").strip().lower()
    if choice and choice not in CHOICES:
        raise ValueError(f"CRVQ_CPU must be one of {', '.join(CHOICES)} or unset, got {choice!r}")
    if choice == "torch":
        return None
    try:
        loaded = Library(FILE)
    except OSError as error:
        if choice:
            raise ValueError(f"CRVQ_CPU asks for {choice!r}, but there is no compiled kernel: {error}") from None
        return None
    if choice:
        loaded.level = INSTRUCTIONS.index(choice)
        if loaded.level not in loaded.supported:
            names = ", ".join(INSTRUCTIONS[number] for number in loaded.supported)
            raise ValueError(f"CRVQ_CPU asks for {choice!r}, but this processor has {names} only")
    return loaded


def why_not_better() -> str:
    """Returns why `library` is not the fastest there is, "" if it is."""
    choice = os.environ.get("CRVQ_CPU")
    if choice:
        return f"CRVQ_CPU={choice}"
    if library() is None:
        try:
            Library(FILE)
        except OSError as error:
            return f"no compiled kernel ({error}); install crvq_hf where there is a C compiler"
    if library().level != INSTRUCTIONS.index("vbmi"):
        return "this processor has no AVX-512 VBMI"
    return ""


def uses_tables(num_tokens: int, out_features: int, nbits: int, dtype: torch.dtype) -> bool:
    """Returns whether tables, whose cost is per token, are faster than dequantizing once and multiplying.

    With 16-bit tables (vbmi) only bfloat16, whose matrix products are fast, ever overtakes them, and only where few
    rows share a table. Making fp32 tables takes 2**nbits operations a channel, where each row saves about one, and
    dequantizing takes as long as a product with some 50 tokens; the largest tables leave the caches. The rule that
    follows was fitted to the measurements in kernels/README.md.
    """
    if nbits <= 8 and INSTRUCTIONS[library().level] == "vbmi":
        return dtype != torch.bfloat16 or num_tokens < 256 or out_features >= 2048
    least_rows = 2 ** (max(nbits, 8) + (1 if nbits <= 10 else 2)) * num_tokens / (num_tokens + 48)
    return num_tokens == 1 or out_features >= least_rows


class Layer:
    """A layer as the library reads it: tensors checked, and packed once for many calls.

    A call of a small layer takes a few microseconds, so there is as little Python on the way as can be.
    """

    def __init__(
        self,
        tiles: Tensor,
        codebooks: Tensor,
        scales: Tensor,
        channel_order: Tensor,
        bias: Tensor | None,
        nbits: int,
        num_critical_groups: int,
    ):
        """Takes the arguments of `ops.linear`: contiguous, on the CPU, floats of 16 or 32 bits, codes tiled.

        Raises:
            ValueError: they are not, or do not fit each other.
        """
        tensors = (tiles, codebooks, scales, channel_order, bias)
        given = [tensor for tensor in tensors if tensor is not None]
        floats = [codebooks, scales] if bias is None else [codebooks, scales, bias]
        self.in_features, self.out_features = channel_order.shape[0], scales.shape[0]
        num_codebooks, codebook_size, in_group_size = codebooks.shape
        num_codes = num_virtual_groups(self.in_features, in_group_size, num_codebooks, num_critical_groups)
        if (
            not all(tensor.dtype in FLOAT_TYPES for tensor in floats)
            or channel_order.dtype not in _ORDERS
            or in_group_size not in (4, 8, 16)
            or not 0 < codebook_size <= 2**nbits
            or self.in_features % in_group_size
            or not 0 <= num_critical_groups <= self.in_features // in_group_size
        ):
            raise ValueError("these tensors are not those of a tiled layer")
        self.nbits = nbits
        self.tensors = tensors
        self.addresses = (
            address(tiles, torch.uint8, tiled_size(self.out_features, num_codes, nbits)),
            address(codebooks, codebooks.dtype, num_codebooks * codebook_size * in_group_size),
            address(scales, scales.dtype, self.out_features),
            address(channel_order, channel_order.dtype, self.in_features),
            *([] if bias is None else [address(bias, bias.dtype, self.out_features)]),
        )
        # While these are held, nothing else can come to lie at the addresses, whatever `.data` of a tensor becomes.
        self._memory = [tensor.untyped_storage() for tensor in given]
        self._library = library()
        self._constants = _LAYER.pack(
            *(self.addresses if bias is not None else (*self.addresses, 0)),
            self.out_features,
            self.in_features,
            in_group_size,
            num_codebooks,
            codebook_size,
            nbits,
            num_critical_groups,
            channel_order.element_size(),
            FLOAT_TYPES[codebooks.dtype],
            FLOAT_TYPES[scales.dtype],
            0 if bias is None else FLOAT_TYPES[bias.dtype],
            0,
        )

    def is_of(self, tiles, codebooks, scales, channel_order, bias) -> bool:
        """Returns whether these are still the tensors, at the addresses, that were packed."""
        own = self.tensors
        if not (
            tiles is own[0]
            and codebooks is own[1]
            and scales is own[2]
            and channel_order is own[3]
            and bias is own[4]
            and library() is self._library
        ):
            return False
        addresses = tiles.data_ptr(), codebooks.data_ptr(), scales.data_ptr(), channel_order.data_ptr()
        return self.addresses == (addresses if bias is None else (*addresses, bias.data_ptr()))

    def __call__(self, x: Tensor) -> Tensor:
        """Applies the layer to `x`, `[..., K]`, on the CPU.

        Returns:
            `[..., N]` in the dtype of `x`.

        Raises:
            MemoryError: no memory for the tables.
            ValueError: `x` is of another shape or dtype, or `channel_order` names a channel that is not there.
        """
        shape, x_type = x.shape, FLOAT_TYPES.get(x.dtype)
        if x_type is None or not shape or shape[-1] != self.in_features:
            raise ValueError(
                f"x must be float and of shape [..., {self.in_features}], got {x.dtype} and {list(shape)}"
            )
        num_tokens = x.numel() // self.in_features
        if num_tokens != 1:
            if num_tokens == 0:
                return x.new_empty(*shape[:-1], self.out_features)
            if not uses_tables(num_tokens, self.out_features, self.nbits, x.dtype):
                y = x.new_empty(*shape[:-1], self.out_features)
                self._dequantize_and_multiply(x.reshape(num_tokens, -1), y.view(num_tokens, -1))
                return y
        if not x.is_contiguous():
            x = x.contiguous()
        dtype = x.dtype
        y = x.new_empty(*shape[:-1], self.out_features)
        places = address(x, dtype, num_tokens * self.in_features), address(y, dtype, num_tokens * self.out_features)
        numbers = (num_tokens, 0, 0, x_type, self._library.level, torch.get_num_threads(), 0)
        if status := self._library.linear(_CALL.pack(*places, *numbers) + self._constants):
            self._explain(status)
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[N, K]`, `dtype`, channels in original order."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device="cpu")
        for rows, some in self._dequantized_rows(permuted=False):
            weight[rows] = some
        return weight

    def _dequantize_and_multiply(self, x: Tensor, y: Tensor) -> None:
        """Writes the product of `x` (`[M, K]`) and the weight into `y` (`[M, N]`).

        A few rows are dequantized at a time, in fp32: bfloat16 only where the processor multiplies it.
        """
        _, _, _, channel_order, bias = self.tensors
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
        ordered = x.to(dtype).index_select(1, channel_order.int())
        bias = None if bias is None else bias.to(dtype)
        for rows, weight in self._dequantized_rows(permuted=True):
            y[:, rows] = F.linear(ordered, weight.to(dtype), None if bias is None else bias[rows])

    def _dequantized_rows(self, permuted: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of rows with their weights, fp32, about `_WEIGHTS_PER_STEP` at a time.

        Columns are in the order of `channel_order`, `permuted`, or in original order. All lie in the same memory, one
        after the other: fresh pages would take as long as what is written to them.
        """
        step = min(max(16, _WEIGHTS_PER_STEP // self.in_features // 16 * 16), self.out_features)
        memory = torch.empty(step, self.in_features, dtype=torch.float32, device="cpu")
        place = address(memory, torch.float32, step * self.in_features)
        for start in range(0, self.out_features, step):
            count = min(step, self.out_features - start)
            numbers = (0, start, count, 0, self._library.level, torch.get_num_threads(), int(permuted))
            if status := self._library.dequantize(_CALL.pack(0, place, *numbers) + self._constants):
                self._explain(status)
            yield slice(start, start + count), memory[:count]

    def _explain(self, status: int) -> None:
        if status == 1:
            raise MemoryError(f"no memory for the tables of a CRVQ layer of {self.in_features} channels")
        last = self.in_features - 1
        raise ValueError(f"channel_order must hold channels 0..{last}, found others; the layer is damaged")
