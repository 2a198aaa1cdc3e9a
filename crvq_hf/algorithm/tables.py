"""Weights of very many rows, as embeddings have: what rows have in common, and codebooks made on some of them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .codebook import group_metrics, nearest_codes
from .fit import DAMPING, LayerCodes, fit_weight, row_scales
from .hessian import damped
from .search import LayerFit, update_codes_, update_scales_

SAMPLED_ROWS = 16384  # that codebooks are made on; the other rows are encoded, as many at a time
ENCODING_ROUNDS = 3  # of scales and codes, where the codebooks are fixed


def common_part(weight: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns factor `[V, rank]` and basis `[rank, K]`, float16, whose product is nearest to a weight in a metric.

    Args:
        weight: `[V, K]`, fp32.
        metric: `[K, K]`, fp32, positive definite: an error e of a row counts `e @ metric @ e`.
        rank: at most K.

    Raises:
        ValueError: a row does not fit float16.
    """
    lower = torch.linalg.cholesky(metric.double())
    unit = weight / weight.abs().max().clamp_min(1e-30)
    energies = lower.T @ (unit.T @ unit).double() @ lower
    directions = torch.linalg.eigh(energies).eigenvectors[:, -rank:]
    basis = torch.linalg.solve(lower.T, directions)  # columns of unit size in the metric
    size = basis.norm(dim=0).clamp_min(1e-30)
    dual = lower @ directions * size
    factor, basis = (weight @ dual.float()).half(), (basis / size).T.float().half()
    if not factor.isfinite().all():
        raise ValueError("A row is too large for float16 (65504 at most).")
    return factor, basis


def fit_rows(weight: Tensor, hessian: Tensor, *, generator: torch.Generator, **shape: Any) -> LayerCodes:
    """Quantizes a weight as `fit_weight` does, codebooks made on some of its rows; rows of zeros stay zeros.

    Its `relative_error` is that of the rows which the codebooks were made on.

    Args:
        weight: `[N, K]`, fp32.
        hessian: `[K, K]`, fp32.
        generator: source of all randomness, on the CPU.
        shape: the other arguments of `fit_weight`.
    """
    order = torch.randperm(len(weight), generator=generator, device="cpu")
    picked = order[:SAMPLED_ROWS].sort().values.to(weight.device)
    fitted = fit_weight(weight[picked], hessian, generator=generator, **shape)
    if len(picked) < len(weight):
        parts = [_encode(rows, hessian, fitted) for rows in weight.split(SAMPLED_ROWS)]
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        fitted = replace(fitted, codes=codes, scales=scales)
    scales = torch.where(weight.abs().amax(1) > 0, fitted.scales, torch.zeros_like(fitted.scales))
    return replace(fitted, scales=scales)


def _encode(weight: Tensor, hessian: Tensor, fitted: LayerCodes) -> tuple[Tensor, Tensor]:
    """Returns codes `[N, V]` and scales `[N]` of other rows than a fit was made on, with its codebooks and order.

    Args:
        weight: `[N, K]`, fp32.
        hessian: `[K, K]`, fp32, as it was given to `fit_weight`.
        fitted: what that returned.
    """
    order, critical, d = fitted.channel_order, fitted.num_critical_groups, fitted.codebooks.shape[2]
    weight, hessian = weight[:, order], damped(hessian, DAMPING)[order][:, order]
    scales, metrics = row_scales(weight), group_metrics(hessian, d)
    rest = (weight / scales[:, None]).view(len(weight), -1, d)
    codes = []
    for book in fitted.codebooks:
        part = slice(critical) if codes else slice(None)
        codes.append(nearest_codes(rest[:, part], book, metrics[part]))
        rest = rest[:, part] - book[codes[-1]]
    fit = LayerFit.start(weight, hessian, scales, fitted.codebooks, torch.cat(codes, 1), critical)
    for _ in range(ENCODING_ROUNDS):
        update_scales_(fit)
        update_codes_(fit)
    update_scales_(fit)
    return fit.codes, fit.scales
