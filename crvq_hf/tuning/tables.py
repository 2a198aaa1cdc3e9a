"""Embeddings and heads of codes in training: as quantized layers are, an embedding and a head that are tied as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from ..algorithm.search import assemble
from ..modeling.coded import CodedEmbedding, CodedHead
from ..modeling.linear import CRVQLinear
from ..modeling.table import Table
from .tunable import TunableLinear


class TunableTable(nn.Module):
    """A `Table` whose codebooks and scales are trained; codes, and what its rows have in common, stay."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        parts = (replace(part, scales=part.scales.half()) for part in (table.every, table.frequent))
        self.every, self.frequent = (TunableLinear(CRVQLinear.from_quantized(part, None)) for part in parts)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns rows `[..., K]`, fp32, for token numbers `[...]`."""
        flat, table = tokens.flatten(), self.table
        place, is_frequent = table.places(flat)
        common = table.factor[flat].float() @ table.basis.float()
        rows = common + _rows(self.every, flat) + _rows(self.frequent, place) * is_frequent
        return rows.view(*tokens.shape, -1)

    def product(self, x: Tensor) -> Tensor:
        """Returns `[..., V]` for `x` `[..., K]`, in the dtype that the linears of the model compute in."""
        every, table = self.every(x), self.table
        basis, factor = table.basis.to(every.dtype), table.factor.to(every.dtype)
        return (every + (x.to(every.dtype) @ basis.T) @ factor.T).index_add(-1, table.rows, self.frequent(x))

    def tuned(self) -> Table:
        """Returns the table as it is stored."""
        every, frequent = (part.to_linear().quantized_weight() for part in (self.every, self.frequent))
        return replace(self.table, every=every, frequent=frequent)


def _rows(part: TunableLinear, rows: Tensor) -> Tensor:
    """Returns the dense rows `[R, K]`, fp32, of numbers `rows` `[R]`."""
    ordered = assemble(part.rounded(), part.codes[rows], part.num_critical_groups)
    scales = part.start_scales[rows] * part.relative_scales[rows]
    return (ordered * scales[:, None]).index_select(1, part.channel_order.argsort())


@contextmanager
def tunable_tables(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Makes the embedding and head of a model trainable while inside, where they are codes; yields the parameters."""
    parts: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (CodedEmbedding, CodedHead)):
            parts.setdefault(id(module.packed), []).append(module)
    tables = [(TunableTable(modules[0].table()), modules) for modules in parts.values()]
    for table, modules in tables:
        for module in modules:
            name = "lookup" if isinstance(module, CodedEmbedding) else "product"
            module.__dict__[name] = getattr(table, name)
    parameters = [parameter for table, _ in tables for parameter in table.parameters()]
    try:
        yield parameters
    finally:
        for table, modules in tables:
            for module in modules:
                module.__dict__.pop("lookup" if isinstance(module, CodedEmbedding) else "product")
            for name, tensor in table.tuned().tensors().items():
                if name != "weight":
                    parameter = modules[0].get_parameter(name)
                    parameter.data = tensor.to(parameter.dtype)
