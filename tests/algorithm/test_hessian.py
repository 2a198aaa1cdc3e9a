"""The Hessian of a layer's inputs: against one product in double precision, and its corner cases."""

import pytest
import torch

from crvq_hf.hessian import HessianAccumulator, damped

# Small integers are exact in every float dtype, so that the accumulation is tested and not the rounding of inputs.
INPUTS = torch.randint(-8, 9, (300, 24), generator=torch.Generator().manual_seed(1))


def expected(inputs: torch.Tensor) -> torch.Tensor:
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    return x.T @ x / len(x)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 24), (3, 100, 24), (5, 6, 10, 24)], ids=str)
def test_one_batch_is_one_product(dtype, shape):
    accumulator = HessianAccumulator(24)
    accumulator.add(INPUTS.to(dtype).view(shape))
    hessian = accumulator.hessian()
    assert hessian.dtype == torch.float32 and hessian.shape == (24, 24) and accumulator.rows == 300
    assert relative_error(hessian, expected(INPUTS)) < 1e-6


@pytest.mark.parametrize("sizes", [[1] * 300, [299, 1], [0, 7, 0, 293], [100, 100, 100]], ids=["1s", "2", "0s", "3"])
def test_split_batches_give_the_same(sizes):
    accumulator = HessianAccumulator(24)
    for batch in INPUTS.float().split(sizes):
        accumulator.add(batch)
    assert accumulator.rows == 300
    assert relative_error(accumulator.hessian(), expected(INPUTS)) < 1e-5


def test_rounding_of_inputs_stays_below_the_damping():
    x = torch.randn(500, 16) * torch.logspace(-2, 2, 16)
    accumulator = HessianAccumulator(16)
    accumulator.add(x)
    assert relative_error(accumulator.hessian(), expected(x)) < 0.01


def test_a_long_run_does_not_drift():
    accumulator = HessianAccumulator(24)
    for _ in range(200):
        for batch in INPUTS.float().split(50):
            accumulator.add(batch)
    assert accumulator.rows == 60000
    assert relative_error(accumulator.hessian(), expected(INPUTS)) < 1e-4


def test_strided_inputs():
    accumulator = HessianAccumulator(24)
    accumulator.add(INPUTS.float().repeat(1, 2)[:, :24][::2])
    assert relative_error(accumulator.hessian(), expected(INPUTS[::2])) < 1e-6


def test_without_rows_it_is_the_identity():
    accumulator = HessianAccumulator(5)
    assert torch.equal(accumulator.hessian(), torch.eye(5))
    accumulator.add(torch.zeros(0, 5))
    assert torch.equal(accumulator.hessian(), torch.eye(5))


def test_inputs_that_are_zero_are_not_the_identity():
    accumulator = HessianAccumulator(5)
    accumulator.add(torch.zeros(4, 5))
    assert torch.equal(accumulator.hessian(), torch.zeros(5, 5))


def test_no_graph_is_kept():
    accumulator = HessianAccumulator(24)
    accumulator.add(INPUTS.float().requires_grad_(True))
    assert not accumulator.hessian().requires_grad


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_precision_of_other_products_is_left_as_it_was(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        HessianAccumulator(24).add(INPUTS.float())
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError):
            HessianAccumulator(23).add(INPUTS.float())
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
