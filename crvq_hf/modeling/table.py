"""What is stored of an embedding or a head in fewer than 8 bits: what rows have in common, codes, and further codes.

A table `[V, K]` is the sum of three parts: a matrix of rank 2, which has most of the energy, as rows point the same
way; a quantized weight (see `quantized_weight`) of what is left of all rows; and another of what is still left of the
rows of frequent tokens, which most of a text consists of. Few rows with many bits cost little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ROW_BITS
from ..quantized_weight import TENSOR_NAMES, LayerShape, QuantizedWeight

ROW_SCALE = "weight_row_scale"
FACTOR, BASIS = "weight_row_factor", "weight_row_basis"
ROWS = "weight_frequent_rows"
RANK = 2
# Names of the stored tensors, each in the order of `TENSOR_NAMES`. Scales come first where parameters are registered.
EVERY = ("weight", "weight_row_codebooks", ROW_SCALE, "weight_row_order")
FREQUENT = ("weight_frequent", "weight_frequent_codebooks", "weight_frequent_scale", "weight_frequent_order")
TABLE_NAMES = (*EVERY, FACTOR, BASIS, *FREQUENT, ROWS)
GROUP = 4  # channels per code
_ROWS_AT_ONCE = 8192  # that are dense in fp32
# By bits per weight: bits per code of all rows, and how many codes more a frequent row has for each of its groups.
# Part of the checkpoint format, as `TableShape` is.
_CODES = {6: (8, 2), 4: (8, 2), 3.5: (8, 2), 3: (8, 2), 2.5: (8, 2), 2: (7, 1)}


@dataclass(frozen=True)
class TableShape:
    """All numbers that fix the tensors of a table; the one place where they are derived.

    Attributes:
        num_rows: V.
        num_channels: K, a multiple of 4.
        bits: `embedding_bits`, fewer than 8. All tensors take no more per weight, but in toys, where codebooks do.
    """

    num_rows: int
    num_channels: int
    bits: float

    @property
    def every(self) -> LayerShape:
        """Shape of the codes of all rows."""
        return self._layer(self.num_rows, _CODES[self.bits][0], 1)

    @property
    def frequent(self) -> LayerShape:
        """Shape of the further codes of frequent rows."""
        return self._layer(self.num_frequent, 8, _CODES[self.bits][1])

    @property
    def num_frequent(self) -> int:
        """How many rows have further codes: as many as the bits allow, and at least one."""
        most = self._layer(self.num_rows, 8, _CODES[self.bits][1])
        row = most.tensors()["weight"][0][1] + torch.float16.itemsize + torch.int32.itemsize
        shared = most.nbytes - self.num_rows * (row - torch.int32.itemsize)
        common = RANK * (self.num_rows + self.num_channels) * torch.float16.itemsize
        budget = self.bits * self.num_rows * self.num_channels / 8 - self.every.nbytes - common - shared
        return min(self.num_rows, max(1, math.floor(budget / row)))

    def _layer(self, num_rows: int, nbits: int, num_codebooks: int) -> LayerShape:
        codebook_size = min(2**nbits, num_rows * self.num_channels // GROUP)
        nbits, critical = _constants(num_codebooks, codebook_size, self.num_channels)
        return LayerShape(
            in_features=self.num_channels,
            out_features=num_rows,
            in_group_size=GROUP,
            nbits=nbits,
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            num_critical_groups=critical,
            codebook_bits=8,
        )

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of every stored tensor by its name in `TABLE_NAMES`."""
        every, frequent = self.every.tensors(), self.frequent.tensors()
        named = {name: every[key] for name, key in zip(EVERY, TENSOR_NAMES, strict=True)}
        named |= {name: frequent[key] for name, key in zip(FREQUENT, TENSOR_NAMES, strict=True)}
        named |= {FACTOR: ((self.num_rows, RANK), torch.float16), BASIS: ((RANK, self.num_channels), torch.float16)}
        return named | {ROWS: ((self.num_frequent,), torch.int32)}


def _constants(num_codebooks: int, codebook_size: int, num_channels: int) -> tuple[int, int]:
    """Returns bits per code and critical groups of a part of a table, which follow from its codebooks."""
    return 7 if codebook_size <= 128 else 8, num_channels // GROUP if num_codebooks > 1 else 0


def stored_tensors(num_rows: int, num_channels: int, bits: float) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns shape and dtype of what is stored of an embedding or head `[V, K]`, by name; a tied one is stored once.

    Args:
        num_rows: V, tokens.
        num_channels: K.
        bits: `embedding_bits`, at most 8.
    """
    if bits < ROW_BITS:
        return TableShape(num_rows, num_channels, bits).tensors()
    return {"weight": ((num_rows, num_channels), torch.int8), ROW_SCALE: ((num_rows,), torch.float16)}


def stored_bytes(num_rows: int, num_channels: int, bits: float) -> int:
    """Returns the bytes of `stored_tensors`."""
    tensors = stored_tensors(num_rows, num_channels, bits).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)


@dataclass(frozen=True, eq=False)
class Table:
    """A table as it is stored.

    Attributes:
        factor: `[V, 2]`, float16: how much of each basis vector is in a row.
        basis: `[2, K]`, float16.
        every: codes of what these leave of all rows, `[V, K]`.
        frequent: codes of what these leave of frequent rows, `[F, K]`.
        rows: `[F]`, int32, which rows these are, ascending.
    """

    factor: Tensor
    basis: Tensor
    every: QuantizedWeight
    frequent: QuantizedWeight
    rows: Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Table:
        """Returns the table made of `tensors`, by `TABLE_NAMES`; floating ones may be of any such dtype."""
        parts = []
        for names in (EVERY, FREQUENT):
            codes, codebooks, scales, order = (tensors[name] for name in names)
            constants = _constants(*codebooks.shape[:2], len(order))
            parts.append(QuantizedWeight(codes, codebooks, scales, order, *constants))
        return cls(tensors[FACTOR], tensors[BASIS], *parts, tensors[ROWS])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors by their names in `TABLE_NAMES`."""
        parts = zip((EVERY, FREQUENT), (self.every, self.frequent), strict=True)
        named = [zip(names, part.tensors().values(), strict=True) for names, part in parts]
        others = {FACTOR: self.factor, BASIS: self.basis, ROWS: self.rows}
        return {name: tensor for part in named for name, tensor in part} | others

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[V, K]` in `dtype`, made a part at a time."""
        dense = torch.empty(self.every.out_features, self.every.in_features, dtype=dtype, device=self.rows.device)
        for rows in torch.arange(len(dense), device=dense.device).split(_ROWS_AT_ONCE):
            dense[rows] = self.lookup(rows, dtype)
        return dense

    def lookup(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns dense rows `[..., K]` in `dtype`, summed in fp32, for token numbers `[...]`."""
        flat = tokens.reshape(-1)
        place, is_frequent = self.places(flat)
        dense = _rows_of(self.every, flat) + _rows_of(self.frequent, place) * is_frequent
        dense = dense + (self.factor[flat].float().unsqueeze(-1) * self.basis.float()).sum(-2)
        return dense.to(dtype).view(*tokens.shape, dense.shape[-1])

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where among the frequent rows those of token numbers `[R]` are, `[R]`, and whether, `[R, 1]`."""
        place = torch.searchsorted(self.rows, tokens.to(self.rows.dtype)).clamp(max=len(self.rows) - 1)
        return place, (self.rows[place] == tokens).unsqueeze(-1)

    def check(self, name: str) -> None:
        """Checks the values of all tensors.

        Args:
            name: of the embedding or head, for messages.

        Raises:
            ValueError: one holds what cannot be.
        """
        for part, kind in ((self.every, "rows"), (self.frequent, "frequent rows")):
            replace(part, scales=part.scales.half()).check(f"{name} ({kind})")
        for key, tensor in ((FACTOR, self.factor), (BASIS, self.basis)):
            if not tensor.isfinite().all():
                raise ValueError(f"{name}.{key} holds NaN or infinite values; the checkpoint is damaged.")
        rows = self.rows
        if rows[0] < 0 or rows[-1] >= self.every.out_features or not (rows[1:] > rows[:-1]).all():
            raise ValueError(
                f"{name}.{ROWS} must hold rising numbers of rows, from 0 to {self.every.out_features - 1}; the "
                "checkpoint is damaged."
            )


def _rows_of(weight: QuantizedWeight, rows: Tensor) -> Tensor:
    """Returns the dense rows `[R, K]`, fp32, of a quantized weight, those of numbers `rows` `[R]`."""
    part = replace(weight, codes=weight.codes[rows], scales=weight.scales[rows])
    return part.dequantize(torch.float32)
