"""Embeddings and heads in fewer than 8 bits: those of `row_modules` whose rows are a `Table`."""

from __future__ import annotations

from typing import Any

import crvq_kernels
import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantized_weight import QuantizedWeight
from .frozen import as_traced
from .linear import CRVQLinear, brings_tensors
from .row_modules import RowEmbedding, RowHead, Rows
from .table import BASIS, FACTOR, FREQUENT, ROW_SCALE, TABLE_NAMES, Table


class _CodedRows(Rows):
    """What the two modules below have in common."""

    companions = (ROW_SCALE, *(name for name in TABLE_NAMES if name not in (ROW_SCALE, "weight")))
    halves = (ROW_SCALE, FACTOR, BASIS, FREQUENT[2])
    numbers = torch.uint8

    @staticmethod
    def dense_shape(tensors: dict[str, Tensor]) -> tuple[int, int]:
        """Returns `[V, K]` of the tensors of such a module."""
        return tensors["weight"].shape[0], tensors[BASIS].shape[1]

    @staticmethod
    def dense_rows(tensors: dict[str, Tensor], rows: Any, dtype: torch.dtype) -> Tensor:
        """Returns the rows that `rows`, any index, names, dense in `dtype`."""
        tokens = torch.arange(len(tensors["weight"]), device=tensors["weight"].device)
        return Table.from_tensors(tensors).lookup(tokens[rows], dtype)

    def table(self) -> Table:
        """Returns the tensors as they are in memory: scales, factor and basis in the dtype of the model."""
        tensors = {name: self._parameters[name] for name in self.companions}
        return Table.from_tensors(tensors | {"weight": as_traced(self.packed).detach()})

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[V, K]` in `dtype`, as the module that this one stands for would hold it."""
        return self.table().dequantize(dtype)


class CodedEmbedding(_CodedRows, RowEmbedding):
    """Looks up rows of a table and makes them dense; see `TableShape` for its tensors."""

    def lookup(self, input: Tensor) -> Tensor:
        """Returns dense rows `[..., K]`, in the dtype of the model, for token numbers `[...]`."""
        if crvq_kernels.is_transformed():  # by torch.func, whose transforms know the lookup of an embedding
            return F.embedding(input, self.dequantize(self.compute_dtype))
        return self.table().lookup(input, self.compute_dtype)


class CodedHead(_CodedRows, RowHead):
    """A linear layer onto the vocabulary, from a table; see `TableShape` for its tensors.

    Kernels read codes in a layout of their own, which is made once and kept beside those that are stored.
    """

    def product(self, input: Tensor) -> Tensor:
        """Returns `[..., V]` in the dtype of `input`, `[..., K]`, without the bias."""
        table = self.table()
        every, frequent = (part(input) for part in self._layers(table, input))
        common = (input @ table.basis.to(input.dtype).T) @ table.factor.to(input.dtype).T
        return (every + common).index_add(-1, table.rows, frequent)

    def _layers(self, table: Table, input: Tensor) -> list[Any]:
        """Returns what multiplies with the codes of all rows, and of frequent ones."""
        parts = table.every, table.frequent
        kept = self.__dict__.get("_kept_layers")
        if torch.compiler.is_compiling():
            return [_Product(part) for part in parts] if kept is None else kept[1]
        if brings_tensors(getattr(self, "_hf_hook", None)) or not crvq_kernels.is_plain(input.detach()):
            return [_Product(part) for part in parts]
        key = [(id(self._parameters[name]), self._parameters[name].data_ptr()) for name in self.companions]
        key.append((self.packed.data_ptr(), self.packed.device))
        if kept is None or kept[0] != key:
            kept = key, [CRVQLinear.from_quantized(part, None).tile_() for part in parts]
            self.__dict__["_kept_layers"] = kept
        return kept[1]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__.pop("_kept_layers", None)
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is kept for the kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept_layers"}


class _Product:
    """Multiplies with codes as they are stored."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight
        layer = weight.codes, weight.codebooks, weight.scales, weight.channel_order
        exact = torch.float32 if x.dtype == torch.float64 else x.dtype
        y = crvq_kernels.linear(x.to(exact), *layer, None, weight.nbits, weight.num_critical_groups)
        return y.to(x.dtype)
