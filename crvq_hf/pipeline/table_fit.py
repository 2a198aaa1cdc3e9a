"""A `Table` made of a dense embedding or head; whoever only loads a model needs none of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm.tables import SAMPLED_ROWS, common_part, fit_rows
from ..modeling.table import RANK, Table, TableShape
from ..quantized_weight import LayerShape, QuantizedWeight, to_stored


def fit_table(
    weight: Tensor, metric: Tensor, counts: Tensor, shape: TableShape, generator: torch.Generator
) -> tuple[Table, float]:
    """Quantizes an embedding or a head.

    Args:
        weight: `[V, K]`, fp32.
        metric: `[K, K]`, fp32, positive definite: an error e of a row counts `e @ metric @ e`.
        counts: int64, how often each token comes, of as many tokens as it has.
        shape: of the table.
        generator: source of all randomness, on the CPU.

    Returns:
        The table and its relative error in the metric.

    Raises:
        ValueError: a row does not fit float16.
    """
    factor, basis = common_part(weight, metric, RANK)
    rest = weight - factor.float() @ basis.float()
    every = _fit_part(rest, metric, shape.every, generator)
    padded = torch.zeros(len(weight), dtype=torch.int64)
    padded[: len(counts)] = counts[: len(weight)]
    rows = padded.argsort(descending=True, stable=True)[: shape.num_frequent]  # of equal ones those with low numbers
    rows = rows.sort().values.to(weight.device)
    rest -= every.dequantize(torch.float32)
    frequent = _fit_part(rest[rows], metric, shape.frequent, generator)
    rest[rows] -= frequent.dequantize(torch.float32)
    error = _energy(rest, metric) / max(_energy(weight, metric), 1e-30)
    return Table(factor, basis, every, frequent, rows.int()), error


def _energy(weight: Tensor, metric: Tensor) -> float:
    """Returns what rows `[N, K]` count in a metric, some at a time: a vocabulary may have hundreds of thousands."""
    return float(sum((rows @ metric * rows).sum() for rows in weight.split(SAMPLED_ROWS)))


def _fit_part(weight: Tensor, metric: Tensor, shape: LayerShape, generator: torch.Generator) -> QuantizedWeight:
    """Returns the codes of rows `[N, K]`."""
    fitted = fit_rows(
        weight,
        metric,
        **shape.fit_options,
        generator=generator,
    )
    return to_stored(fitted, shape.nbits, shape.codebook_bits)
