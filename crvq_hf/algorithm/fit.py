"""One layer, start to end: `fit_weight(weight, hessian, ...)`, phases 1 to 3 of CRVQ, plain tensors in and out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .codebook import group_metrics, kmeans, nearest_codes
from .hessian import damped
from .importance import Importance, channel_importance, channel_order
from .search import LayerFit, update_codebooks_, update_codes_, update_scales_

# Found by measurement on SmolLM2-135M (benchmarks/LOG.md); none of them changes what is stored.
DAMPING = 0.1  # share of the mean diagonal of H
ROUNDS = 12  # rounds of codes, scales, codebooks
MIN_GAIN = 0.003  # stop when a round gains less than this share
KMEANS_ITERATIONS = 8
RANKING_KMEANS_ITERATIONS = 3  # for the plain quantization that only ranks channels
CRITICAL_BASE_WEIGHT = 0.1  # the base codebook leaves critical groups to the extended ones

_ROUNDING = 1e-3  # a relative error this little below zero may be float32's


@dataclass(frozen=True)
class LayerCodes:
    """A fitted layer: what will be stored, still in working precision.

    Attributes:
        codes: `[N, V]`, int64. codebooks: `[1 + E, C, d]`, fp32. scales: `[N]`, fp32. channel_order: `[K]`, int64.
        num_critical_groups: Gc.
        relative_error: squared relative error of the layer's output on its calibration tokens (damped Hessian).
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    channel_order: Tensor
    num_critical_groups: int
    relative_error: float


def fit_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    in_group_size: int = 8,
    codebook_size: int = 256,
    num_extended_codebooks: int = 3,
    num_critical_groups: int = 1,
    importance: Importance = "weight_activation",
    generator: torch.Generator,
) -> LayerCodes:
    """Quantizes one weight.

    Args:
        weight: `[N, K]`, fp32, K a multiple of `in_group_size`.
        hessian: `[K, K]`, fp32, `X^T X / rows`.
        in_group_size: d.
        codebook_size: C, at most `2**nbits`.
        num_extended_codebooks: E; ignored when `num_critical_groups` is 0.
        num_critical_groups: Gc.
        importance: see `channel_importance`.
        generator: source of all randomness, on the CPU.

    Raises:
        ValueError: the Hessian is so far from positive semi-definite that the fit went below an error of zero.
    """
    d, critical = in_group_size, num_critical_groups
    hessian = damped(hessian, DAMPING)
    order = _rank_channels(weight, hessian, d, codebook_size, importance, generator)
    weight, hessian = weight[:, order], hessian[order][:, order]
    scales = row_scales(weight)
    vectors = (weight / scales[:, None]).view(len(weight), -1, d)
    metrics, row_weight = group_metrics(hessian, d), scales.square()

    base_metrics = metrics.clone()
    base_metrics[:critical] *= CRITICAL_BASE_WEIGHT
    codebooks = [kmeans(vectors, base_metrics, row_weight, codebook_size, KMEANS_ITERATIONS, generator)]
    codes = [nearest_codes(vectors, codebooks[0], metrics)]
    if critical:
        rest = vectors[:, :critical] - codebooks[0][codes[0][:, :critical]]
        for _ in range(num_extended_codebooks):
            book = kmeans(rest, metrics[:critical], row_weight, codebook_size, KMEANS_ITERATIONS, generator)
            codes.append(nearest_codes(rest, book, metrics[:critical]))
            codebooks.append(book)
            rest = rest - book[codes[-1]]

    fit = LayerFit.start(weight, hessian, scales, torch.stack(codebooks), torch.cat(codes, 1), critical)
    refine_(fit)
    error = fit.relative_error()
    if error < -_ROUNDING:
        raise ValueError(
            f"The relative error of a layer of {len(weight)} x {weight.shape[1]} came out as {error:.3g}, below zero: "
            "its Hessian has negative eigenvalues; sum X^T X in float32 or better."
        )
    return LayerCodes(fit.codes, fit.codebooks, fit.scales, order, critical, max(0.0, error))


def refine_(fit: LayerFit) -> None:
    """Alternates codes, scales and codebooks until a round gains less than `MIN_GAIN` (CRVQ section 3.3)."""
    update_scales_(fit)
    error = fit.relative_error()
    for _ in range(ROUNDS):
        update_codes_(fit)
        update_scales_(fit)
        update_codebooks_(fit)
        last, error = error, fit.relative_error()
        if error > (1 - MIN_GAIN) * last:
            break


def row_scales(weight: Tensor) -> Tensor:
    """Returns `[N]`, the root mean square of every row; 1 for a row of zeros."""
    rms = weight.square().mean(1).sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def _rank_channels(
    weight: Tensor, hessian: Tensor, d: int, codebook_size: int, rule: Importance, generator: torch.Generator
) -> Tensor:
    """Returns the channel order by importance, from a quantization with one plain codebook (CRVQ section 3.1)."""
    residual = weight
    if rule == "weight_activation":
        scales = row_scales(weight)
        vectors = (weight / scales[:, None]).view(len(weight), -1, d)
        plain = torch.eye(d, dtype=weight.dtype, device=weight.device).expand(vectors.shape[1], d, d)
        book = kmeans(vectors, plain, scales.square(), codebook_size, RANKING_KMEANS_ITERATIONS, generator)
        residual = weight - (book[nearest_codes(vectors, book, plain)] * scales[:, None, None]).view_as(weight)
    return channel_order(channel_importance(rule, weight, residual, hessian, generator))
