"""One layer from start to end: quality, determinism, small and degenerate layers, what is stored."""

import pytest
import torch
from crvq_kernels.reference import dequantize_ref

from crvq_hf import CRVQConfig
from crvq_hf.algorithm import fit as quantize
from crvq_hf.algorithm.codebook import group_metrics, nearest_codes
from crvq_hf.algorithm.fit import DAMPING, LayerCodes, fit_weight
from crvq_hf.algorithm.hessian import damped
from crvq_hf.algorithm.search import assemble
from crvq_hf.quantized_weight import decode_codebooks, to_stored


def layer(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a heavy-tailed weight `[n, k]` and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, n, k, generator=generator)
    weight = normal[0] * normal[1].abs().sqrt() * 0.02
    x = torch.randn(4 * k, k, generator=generator) @ (
        torch.eye(k) + 0.5 / k**0.5 * torch.randn(k, k, generator=generator)
    )
    return weight, x.T @ x / len(x)


def fit(weight, hessian, d=8, e=8, extended=3, critical=1, seed=0, **more) -> LayerCodes:
    groups = weight.shape[1] // d
    return fit_weight(
        weight,
        hessian,
        in_group_size=d,
        codebook_size=min(2**e, len(weight) * groups),
        num_extended_codebooks=extended,
        num_critical_groups=critical,
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


def dense(fitted: LayerCodes) -> torch.Tensor:
    """Returns the weight, fp64, channels in their original order."""
    unscaled = assemble(fitted.codebooks.double(), fitted.codes, fitted.num_critical_groups)
    return (unscaled * fitted.scales.double()[:, None])[:, fitted.channel_order.argsort()]


def error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    hessian = damped(hessian, DAMPING).double()
    difference = weight.double() - quantized.double()
    energy = torch.sum(weight.double() @ hessian * weight.double())
    return float(torch.sum(difference @ hessian * difference) / energy)


def plain_error(weight: torch.Tensor, hessian: torch.Tensor, d: int, e: int) -> float:
    """Returns the error with random vectors of the weight for a codebook and the nearest code for every vector."""
    scales = weight.square().mean(1).sqrt()[:, None]
    vectors = (weight / scales).view(len(weight), -1, d)
    flat = vectors.reshape(-1, d)
    book = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[: 2**e]]
    codes = nearest_codes(vectors, book, group_metrics(damped(hessian, DAMPING), d))
    return error(weight, book[codes].view_as(weight) * scales, hessian)


def assert_well_formed(fitted: LayerCodes, n: int, k: int, d: int, extended: int, critical: int, size: int) -> None:
    extended = extended if critical else 0
    assert fitted.codes.shape == (n, k // d + extended * critical) and fitted.codes.dtype == torch.int64
    assert 0 <= fitted.codes.min() and fitted.codes.max() < size
    assert fitted.codebooks.shape == (1 + extended, size, d) and fitted.codebooks.isfinite().all()
    assert fitted.scales.shape == (n,) and (fitted.scales > 0).all() and fitted.scales.isfinite().all()
    assert sorted(fitted.channel_order.tolist()) == list(range(k))
    assert fitted.num_critical_groups == critical


@pytest.mark.parametrize("extended", [0, 3, 7])
@pytest.mark.parametrize("e", [4, 8, 10])
@pytest.mark.parametrize("d", [4, 8, 16])
def test_quality_over_all_settings(d, e, extended):
    n, k, critical = 48, 128, 1 if extended else 0
    weight, hessian = layer(n, k)
    fitted = fit(weight, hessian, d, e, extended, critical)
    assert_well_formed(fitted, n, k, d, extended, critical, min(2**e, n * k // d))
    assert fitted.relative_error == pytest.approx(error(weight, dense(fitted), hessian), rel=1e-3, abs=1e-6)
    plain = plain_error(weight, hessian, d, e)
    # With as many codewords as vectors there is nothing left to gain.
    assert fitted.relative_error < (0.85 * plain if plain > 1e-3 else 1e-3)


def test_more_bits_help():
    weight, hessian = layer(64, 128)
    errors = [fit(weight, hessian, 8, e, 0, 0).relative_error for e in (4, 6, 8)]
    assert errors[0] > 1.15 * errors[1] and errors[1] > 1.15 * errors[2]


def test_nothing_critical_is_one_codebook():
    weight, hessian = layer(16, 32)
    assert_well_formed(fit(weight, hessian, e=4, extended=3, critical=0), 16, 32, 8, 3, 0, 16)


def test_every_group_can_be_critical():
    weight, hessian = layer(24, 32)
    fitted = fit(weight, hessian, e=4, extended=2, critical=4)
    assert_well_formed(fitted, 24, 32, 8, 2, 4, 16)
    assert fitted.relative_error < 0.5 * fit(weight, hessian, e=4, extended=0, critical=0).relative_error


@pytest.mark.parametrize("d", [4, 8, 16])
def test_critical_channels_rescue_outlier_channels(d):
    weight, _ = layer(384, 128)
    size = torch.ones(128)
    size[torch.randperm(128, generator=torch.Generator().manual_seed(1))[:d]] = 30.0
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(2)) * size
    hessian = x.T @ x / len(x)
    plain = fit(weight, hessian, d, 6, 0, 0).relative_error
    one, three = (fit(weight, hessian, d, 6, extended, 1).relative_error for extended in (1, 3))
    assert one < 0.6 * plain and three < 0.9 * one


def test_every_extended_codebook_fits_what_the_ones_before_leave(monkeypatch):
    monkeypatch.setattr(quantize, "ROUNDS", 0)  # as they come from k-means
    weight, _ = layer(384, 32)
    errors = [fit(weight, torch.eye(32), 8, 6, extended, 4).relative_error for extended in (1, 2, 3)]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


def test_rounds_go_on_while_they_gain(monkeypatch):
    weight, hessian = layer(256, 128)
    errors = []
    for rounds in (0, 1, 8):
        monkeypatch.setattr(quantize, "ROUNDS", rounds)
        errors.append(fit(weight, hessian, 8, 6, 3, 1).relative_error)
    assert errors[1] < 0.97 * errors[0] and errors[2] < 0.97 * errors[1]


def test_importance_beats_chance():
    weight, _ = layer(384, 128)
    size = torch.ones(128)
    size[[3, 40, 41, 77, 90, 101, 102, 127]] = 20.0
    hessian = torch.diag(size.square())
    ranked = fit(weight, hessian, 8, 6, 3, 1).relative_error
    by_chance = fit(weight, hessian, 8, 6, 3, 1, importance="random").relative_error
    assert ranked < 0.8 * by_chance


def test_same_seed_same_bits():
    weight, hessian = layer(32, 64)
    first, again, other = (fit(weight, hessian, e=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.codebooks, again.codebooks)
    assert torch.equal(first.scales, again.scales) and torch.equal(first.channel_order, again.channel_order)
    assert first.relative_error == again.relative_error
    assert not torch.equal(first.codebooks, other.codebooks)


def test_the_arguments_are_left_alone():
    weight, hessian = layer(16, 32)
    copies = weight.clone(), hessian.clone()
    fit(weight, hessian, e=4)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


def test_a_transposed_view_gives_the_same():
    weight, hessian = layer(32, 64)
    first, strided = fit(weight, hessian, e=5), fit(weight.T.contiguous().T, hessian, e=5)
    assert torch.equal(first.channel_order, strided.channel_order)
    assert strided.relative_error == pytest.approx(first.relative_error, rel=0.02)


def test_powers_of_two_change_only_the_scales():
    weight, hessian = layer(32, 64)
    first, scaled = fit(weight, hessian, e=5), fit(weight * 2.0**-6, hessian * 2.0**10, e=5)
    assert torch.equal(first.codes, scaled.codes) and torch.equal(first.channel_order, scaled.channel_order)
    torch.testing.assert_close(scaled.scales * 2.0**6, first.scales)
    assert scaled.relative_error == pytest.approx(first.relative_error, rel=1e-4)


@pytest.mark.parametrize("size", [8, 256])
def test_fewer_vectors_than_codewords(size):
    weight, hessian = layer(4, 16)  # 8 vectors
    fitted = fit_weight(
        weight,
        hessian,
        codebook_size=size,
        num_extended_codebooks=3,
        num_critical_groups=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert_well_formed(fitted, 4, 16, 8, 3, 1, size)
    assert fitted.relative_error < 1e-4


@pytest.mark.parametrize(
    "case", ["zero row", "zero weight", "zero hessian", "duplicate rows", "dead channels", "huge"]
)
def test_degenerate_layers(case):
    weight, hessian = layer(16, 32)
    if case == "zero row":
        weight[3] = 0
    elif case == "zero weight":
        weight.zero_()
    elif case == "zero hessian":
        hessian.zero_()
    elif case == "duplicate rows":
        weight[:] = weight[0]
    elif case == "dead channels":
        hessian[:20], hessian[:, :20] = 0, 0
    else:
        weight, hessian = weight * 1e5, hessian * 1e8
    fitted = fit(weight, hessian, e=4)
    assert_well_formed(fitted, 16, 32, 8, 3, 1, 16)
    assert fitted.relative_error < 0.6


@pytest.mark.parametrize("count", [1, 16])
def test_rows_of_zeros_stay_small_and_cost_the_others_nothing(count):
    weight, hessian = layer(128, 64)
    weight[:count] = 0
    with_zeros = dense(fit(weight, hessian, e=6))
    assert with_zeros[:count].norm(dim=1).max() < 0.05 * with_zeros.norm(dim=1).median()
    without = fit(weight[count:], hessian, e=6).relative_error
    assert error(weight[count:], with_zeros[count:], hessian) < 1.05 * without


def test_identity_hessian_is_plain_least_squares():
    weight, _ = layer(48, 64)
    fitted = fit(weight, torch.eye(64), e=6)
    wanted = (weight - dense(fitted)).square().sum() / weight.square().sum()
    assert fitted.relative_error == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(("d", "e", "extended"), [(8, 8, 3), (4, 6, 1), (16, 10, 0), (8, 5, 7)])
@pytest.mark.parametrize("codebook_bits", [8, 16])
def test_what_is_stored_is_what_was_fitted(d, e, extended, codebook_bits):
    weight, hessian = layer(48, 128)
    fitted = fit(weight, hessian, d, e, extended, 1 if extended else 0)
    stored = to_stored(fitted, e, codebook_bits)
    stored.check()
    config = CRVQConfig(
        in_group_size=d, nbits_per_codebook=e, num_extended_codebooks=extended, codebook_bits=codebook_bits
    )
    assert stored.shape == config.layer_shape(128, 48)
    restored = dequantize_ref(
        stored.codes,
        decode_codebooks(stored.codebooks),
        stored.scales,
        stored.channel_order,
        stored.nbits,
        stored.num_critical_groups,
    )
    # int8: steps of a largest entry / 127, so errors of step / sqrt(12) from each codebook
    assert (restored - dense(fitted)).norm() < (1e-3 if codebook_bits == 16 else 0.05) * weight.norm()
    assert torch.equal(restored, stored.dequantize(torch.float32))


@pytest.mark.parametrize("codebook_bits", [8, 16])
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_weights_of_unusual_size_survive_float16(size, codebook_bits):
    weight, hessian = layer(32, 64)
    weight = weight / weight.square().mean().sqrt() * size
    fitted = fit(weight, hessian, e=5)
    stored = to_stored(fitted, 5, codebook_bits)
    stored.check()
    assert (stored.dequantize(torch.float32) - dense(fitted)).norm() < 0.03 * weight.norm()


def test_a_scale_that_float16_cannot_hold_is_refused():
    weight, hessian = layer(32, 64)
    with pytest.raises(ValueError, match=r"row scale of .* does not fit float16 .* modules_to_not_convert"):
        to_stored(fit(weight * 1e7, hessian, e=5), 5, 8)


def test_an_indefinite_hessian_is_refused():
    """Along a negative eigenvalue the error has no bottom, and a fit that looks perfect is none."""
    weight, hessian = layer(64, 128)
    assert fit(weight, hessian).relative_error > 0
    hessian -= 0.5 * hessian.diagonal().mean()  # a direction in which it is far below zero, damped or not
    assert torch.linalg.eigvalsh(damped(hessian, DAMPING))[0] < 0
    with pytest.raises(ValueError, match="64 x 128 came out as -.*negative eigenvalues; sum X.T X in float32"):
        fit(weight, hessian)
