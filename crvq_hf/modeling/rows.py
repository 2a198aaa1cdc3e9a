"""Quantized rows made of dense ones: int8 numbers and a scale per row, or the codes of a `Table`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithm.fit import encode_rows, fit_weight
from ..quantized_weight import LayerShape, QuantizedWeight, to_stored
from .table import RANK, Table, TableShape

SAMPLED_ROWS = 16384  # that codebooks are made on; the other rows are encoded, as many at a time


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 numbers `[V, H]` and scales `[V]` in the dtype of `weight`; scales are also exact in float16.

    Args:
        weight: `[V, H]`, floating point.

    Raises:
        ValueError: `weight` holds NaN or infinite values, or a row is too large for a float16 scale.
    """
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for start in range(0, weight.shape[0], 8192):
        rows = weight[start : start + 8192].float()
        largest = rows.abs().amax(dim=1)
        scale = (largest / 127).half().to(weight.dtype).half().float()
        if not scale.isfinite().all():
            raise ValueError(
                f"A row with largest magnitude {float(largest.max()):.3g} does not fit 8 bits and a float16 scale; "
                "check the embeddings for NaN, or leave them with embedding_bits=16."
            )
        step = torch.where(scale > 0, scale, math.inf)[:, None]  # a row of zeros, or next to it
        numbers[start : start + 8192] = (rows / step).round_().clamp_(-127, 127).to(torch.int8)
        scales[start : start + 8192] = scale
    return numbers, scales


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
    factor, basis = _common(weight, metric)
    rest = weight - factor.float() @ basis.float()
    every = _fit_part(rest, metric, shape.every, generator)
    padded = torch.zeros(len(weight), dtype=torch.int64)
    padded[: len(counts)] = counts[: len(weight)]
    rows = padded.argsort(descending=True, stable=True)[: shape.num_frequent]  # of equal ones those with low numbers
    rows = rows.sort().values.to(weight.device)
    rest -= every.dequantize(torch.float32)
    frequent = _fit_part(rest[rows], metric, shape.frequent, generator)
    rest[rows] -= frequent.dequantize(torch.float32)
    error = float((rest @ metric * rest).sum() / (weight @ metric * weight).sum().clamp_min(1e-30))
    return Table(factor, basis, every, frequent, rows.int()), error


def _common(weight: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factor `[V, 2]` and basis `[2, K]`, float16, whose product is nearest to `weight` in the metric."""
    lower = torch.linalg.cholesky(metric.double())
    energies = lower.T @ (weight.T @ weight).double() @ lower
    directions = torch.linalg.eigh(energies).eigenvectors[:, -RANK:]
    basis = torch.linalg.solve(lower.T, directions)  # columns of unit size in the metric
    size = basis.norm(dim=0).clamp_min(1e-30)
    dual = lower @ directions * size
    factor, basis = (weight @ dual.float()).half(), (basis / size).T.float().half()
    if not factor.isfinite().all():
        raise ValueError("A row is too large for float16 (65504 at most).")
    return factor, basis


def _fit_part(weight: Tensor, metric: Tensor, shape: LayerShape, generator: torch.Generator) -> QuantizedWeight:
    """Returns the codes of rows `[N, K]`, codebooks made on some of them; rows of zeros stay zeros."""
    picked = torch.randperm(len(weight), generator=generator)[:SAMPLED_ROWS].sort().values.to(weight.device)
    fitted = fit_weight(
        weight[picked],
        metric,
        in_group_size=shape.in_group_size,
        codebook_size=shape.codebook_size,
        num_extended_codebooks=shape.num_codebooks - 1,
        num_critical_groups=shape.num_critical_groups,
        generator=generator,
    )
    if len(picked) < len(weight):
        parts = [encode_rows(rows, metric, fitted) for rows in weight.split(SAMPLED_ROWS)]
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        fitted = replace(fitted, codes=codes, scales=scales)
    scales = torch.where(weight.abs().amax(1) > 0, fitted.scales, torch.zeros_like(fitted.scales))
    return to_stored(replace(fitted, scales=scales), shape.nbits, shape.codebook_bits)
