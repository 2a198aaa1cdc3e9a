"""Channel importance and channel order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crvq_hf.algorithm.fit import fit_weight
from crvq_hf.algorithm.importance import channel_importance, channel_order


@pytest.fixture
def layer():
    weight, residual, x = torch.randn(6, 8), torch.randn(6, 8), torch.randn(50, 8)
    return weight, residual, x.T @ x / 50


def test_weight_activation(layer):
    weight, residual, hessian = layer
    found = channel_importance("weight_activation", weight, residual, hessian)
    for j in range(8):
        wanted = sum(float(residual[n, j]) ** 2 for n in range(6)) / 6 * float(hessian[j, j])
        assert float(found[j]) == pytest.approx(wanted, rel=1e-5)


def test_weight(layer):
    weight, residual, hessian = layer
    found = channel_importance("weight", weight, residual, hessian)
    for j in range(8):
        assert float(found[j]) == pytest.approx(sum(abs(float(weight[n, j])) for n in range(6)) / 6, rel=1e-5)


def test_random_depends_on_the_generator_alone(layer, generator):
    weight, residual, hessian = layer
    first = channel_importance("random", weight, residual, hessian, generator(3))
    again = channel_importance("random", 2 * weight, -residual, 3 * hessian, generator(3))
    assert first.shape == (8,) and torch.equal(first, again)
    assert not torch.equal(first, channel_importance("random", weight, residual, hessian, generator(4)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_order_is_a_stable_permutation_by_falling_importance(values):
    order = channel_order(torch.tensor(values, dtype=torch.float32))
    assert order.dtype == torch.int64
    assert order.tolist() == sorted(range(len(values)), key=lambda j: (-values[j], j))


def test_order_takes_the_largest_first():
    assert channel_order(torch.tensor([0.5, 3.0, 0.0, 3.0, 9.0])).tolist() == [4, 1, 3, 0, 2]


@pytest.mark.parametrize("extended", [1, 3, 7])
@pytest.mark.parametrize("d", [4, 8, 16])
def test_channels_with_massive_activations_become_critical(d, extended, generator):
    channels = torch.randperm(4 * d, generator=generator(1))[:d]
    size = torch.ones(4 * d)
    size[channels] = 100.0
    x = torch.randn(400, 4 * d, generator=generator(2)) * size
    fitted = fit_weight(
        torch.randn(12, 4 * d, generator=generator(3)),
        x.T @ x / 400,
        in_group_size=d,
        codebook_size=8,
        num_extended_codebooks=extended,
        num_critical_groups=1,
        generator=generator(),
    )
    assert sorted(fitted.channel_order[:d].tolist()) == sorted(channels.tolist())
    assert fitted.codes.shape == (12, 4 + extended)


def test_large_weights_become_critical_by_the_rule_weight(generator):
    weight = torch.randn(12, 32, generator=generator(1))
    weight[:, 20:28] *= 50
    fitted = fit_weight(
        weight,
        torch.eye(32),
        codebook_size=8,
        num_extended_codebooks=1,
        num_critical_groups=1,
        importance="weight",
        generator=generator(),
    )
    assert sorted(fitted.channel_order[:8].tolist()) == list(range(20, 28))
