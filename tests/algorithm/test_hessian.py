"""The Hessian of a layer's inputs: against one product in double precision, and its corner cases."""

import pytest
import torch

from crvq_hf.algorithm.hessian import HessianAccumulator, damped

# Small integers are exact in every float dtype, so that the accumulation is tested and not the rounding of inputs.
INPUTS = torch.randint(-8, 9, (300, 24), generator=torch.Generator().manual_seed(1))
ENERGY = 300 * 24.0


def expected(inputs: torch.Tensor) -> torch.Tensor:
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    return x.T @ x / len(x)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 24), (3, 100, 24), (5, 6, 10, 24)], ids=str)
def test_one_batch_is_one_product(dtype, shape):
    accumulator = HessianAccumulator(24, ENERGY)
    accumulator.add(INPUTS.to(dtype).view(shape))
    hessian = accumulator.hessian()
    assert hessian.dtype == torch.float32 and hessian.shape == (24, 24) and accumulator.rows == 300
    assert relative_error(hessian, expected(INPUTS)) < 1e-6


@pytest.mark.parametrize("sizes", [[1] * 300, [299, 1], [0, 7, 0, 293], [100, 100, 100]], ids=["1s", "2", "0s", "3"])
def test_split_batches_give_the_same(sizes):
    accumulator = HessianAccumulator(24, ENERGY)
    for batch in INPUTS.float().split(sizes):
        accumulator.add(batch)
    assert accumulator.rows == 300
    assert relative_error(accumulator.hessian(), expected(INPUTS)) < 1e-5


def test_rounding_of_inputs_stays_below_the_damping():
    x = torch.randn(500, 16) * torch.logspace(-2, 2, 16)
    accumulator = HessianAccumulator(16, ENERGY)
    accumulator.add(x)
    assert relative_error(accumulator.hessian(), expected(x)) < 0.01


def test_autocast_does_not_round_the_sums():
    """Layers are run under it; rounded to bfloat16, a Hessian that one direction dominates is indefinite."""
    x = torch.randn(256, 32) + 30 * torch.randn(256, 1)
    energy = float(x.square().sum(0).max())
    plain, cast = HessianAccumulator(32, energy), HessianAccumulator(32, energy)
    plain.add(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x)
        assert (x.T @ x).dtype == torch.bfloat16
    assert torch.equal(plain.hessian(), cast.hessian())
    assert torch.linalg.eigvalsh(damped(cast.hessian(), 0.01).double())[0] > 0


def test_a_long_run_does_not_drift():
    accumulator = HessianAccumulator(24, ENERGY)
    for _ in range(200):
        for batch in INPUTS.float().split(50):
            accumulator.add(batch)
    assert accumulator.rows == 60000
    assert relative_error(accumulator.hessian(), expected(INPUTS)) < 1e-4


@pytest.mark.parametrize("energy", [0.0, 1e2, 1e5, 1e8])
def test_any_order_and_any_partial_sums_give_the_same_bits(energy):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 600, generator=generator) * torch.logspace(-3, 1, 600)
    batches = x.split([1, 99, 150, 20, 130])
    whole = HessianAccumulator(600, energy)
    for batch in batches:
        whole.add(batch)
    for grouping in ([[4, 3, 2, 1, 0]], [[0, 2, 4], [3, 1]], [[1], [], [4, 0], [2, 3]]):
        parts = [HessianAccumulator(600, energy) for _ in grouping]
        for part, members in zip(parts, grouping, strict=True):
            for member in members:
                part.add(batches[member])
        parts[0].quanta = sum(part.quanta for part in parts)
        parts[0].rows = sum(part.rows for part in parts)
        assert parts[0].is_exact and torch.equal(parts[0].hessian(), whole.hessian())
    assert relative_error(whole.hessian(), expected(x)) < 0.01
    assert (whole.hessian() - whole.hessian().T).abs().max() <= 1e-6 * whole.hessian().max()


def test_inputs_that_outgrow_the_quanta_still_count():
    accumulator = HessianAccumulator(24, 0.01)
    accumulator.add(INPUTS.float())
    assert accumulator.is_exact
    accumulator.add(1e4 * INPUTS.float())
    assert not accumulator.is_exact
    assert relative_error(accumulator.hessian(), expected(1e4 * INPUTS.double()) / 2) < 1e-6


@pytest.mark.parametrize("size", [1e-20, 1e-18, 1e15])
def test_tiny_and_huge_inputs_stay_finite(size):
    x = size * INPUTS.float()
    accumulator = HessianAccumulator(24, float(x.square().sum(0).max()))
    accumulator.add(x)
    assert accumulator.hessian().isfinite().all()


def test_strided_inputs():
    accumulator = HessianAccumulator(24, ENERGY)
    accumulator.add(INPUTS.float().repeat(1, 2)[:, :24][::2])
    assert relative_error(accumulator.hessian(), expected(INPUTS[::2])) < 1e-6


def test_without_rows_it_is_the_identity():
    accumulator = HessianAccumulator(5, ENERGY)
    assert torch.equal(accumulator.hessian(), torch.eye(5))
    accumulator.add(torch.zeros(0, 5))
    assert torch.equal(accumulator.hessian(), torch.eye(5))


def test_inputs_that_are_zero_are_not_the_identity():
    accumulator = HessianAccumulator(5, ENERGY)
    accumulator.add(torch.zeros(4, 5))
    assert torch.equal(accumulator.hessian(), torch.zeros(5, 5))


def test_no_graph_is_kept():
    accumulator = HessianAccumulator(24, ENERGY)
    accumulator.add(INPUTS.float().requires_grad_(True))
    assert not accumulator.hessian().requires_grad


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_precision_of_other_products_is_left_as_it_was(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        HessianAccumulator(24, ENERGY).add(INPUTS.float())
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError):
            HessianAccumulator(23, ENERGY).add(INPUTS.float())
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("share", [0.0, 0.1, 2.0])
def test_damping_adds_to_the_diagonal_only(share):
    hessian = expected(INPUTS).float()
    before = hessian.clone()
    result = damped(hessian, share)
    assert torch.equal(hessian, before)
    added = result - hessian
    assert torch.allclose(added.diagonal(), share * hessian.diagonal().mean() * torch.ones(24), rtol=1e-4)
    added.diagonal().zero_()
    assert not added.any()


def test_damping_makes_a_rank_one_hessian_definite():
    x = torch.randn(1, 24)
    assert torch.linalg.eigvalsh(damped(x.T @ x, 0.1)).min() > 0.05 * x.square().mean()


def test_a_zero_hessian_becomes_the_identity():
    assert torch.equal(damped(torch.zeros(6, 6), 0.1), torch.eye(6))
