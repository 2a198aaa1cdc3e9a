"""Layers that the Hessian hardly sees, with products rounded as any processor might round them.

Each processor sums in its own order. Here products carry random errors of that size, over many seeds, so that a step
that takes rounding for a signal fails everywhere and not only where the rounding happens to be unkind.
"""

import pytest
import torch
from test_search import STEPS, all_finite, make, objective
from torch.utils._python_dispatch import TorchDispatchMode

from crvq_hf.codebook import kmeans
from crvq_hf.search import LayerFit

EPS = torch.finfo(torch.float32).eps
aten = torch.ops.aten


class Rounding(TorchDispatchMode):
    """Adds to fp32 products and sums what rounding could: eps times the root of the sum of the squared terms."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        squares = self.squares(operator.overloadpacket, args, **kwargs)
        result = operator(*args, **kwargs)
        if squares is not None and result.dtype == torch.float32:
            result += EPS * torch.randn(result.shape, generator=self.generator) * squares.sqrt()
        return result

    def squares(self, operator, args, alpha=1, beta=1, dtype=None, **_):
        """Returns the sum of the squares of what is summed, None for what is no sum in fp32."""
        if operator in (aten.mm, aten.bmm, aten.mv):
            return operator(*(factor.square() for factor in args))
        if operator in (aten.addmm, aten.addmm_, aten.baddbmm):
            start, left, right = (factor.square() for factor in args)
            return beta**2 * start + alpha**2 * (left @ right)
        if operator is aten.sum and dtype is None and args[0].is_floating_point():
            return operator(args[0].square(), *args[1:])
        return None


def hessian(kind: str, k: int, generator: torch.Generator) -> torch.Tensor:
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "rank one":
        x = normal(1, k)
    elif kind == "rank three":
        x = normal(3, k)
    elif kind == "half the rank":
        x = normal(k // 2, k)
    elif kind == "equal channels":
        x = normal(5, k // 4).repeat_interleave(4, 1)
    elif kind == "falling spectrum":
        x = normal(2 * k, k) * torch.logspace(0, -6, k) @ torch.linalg.qr(normal(k, k)).Q
    else:
        assert kind == "one massive direction"
        x = normal(2 * k, k) + 1000 * normal(2 * k, 1) * normal(1, k)
    return x.T @ x / len(x)


KINDS = (
    "rank one",
    "rank three",
    "half the rank",
    "equal channels",
    "falling spectrum",
    "one massive direction",
)


def size(fit: LayerFit, weight: torch.Tensor) -> float:
    """Returns what the rounding of the objective is relative to: what it would be without any cancellation."""
    channels = fit.hessian.diagonal().double()
    return float(((weight.double().square() + fit.quantized.double().square()) @ channels).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "num_groups", "extended", "n"), [(4, 5, 2, 6), (8, 5, 1, 30), (16, 2, 1, 6)])
def test_no_step_loses_whatever_the_rounding(kind, d, num_groups, extended, n):
    for seed in range(3):
        made, weight = make(n, num_groups, d, 8, extended, 2, seed)
        singular = hessian(kind, num_groups * d, torch.Generator().manual_seed(seed))
        with Rounding(seed) as rounding:
            fit = LayerFit.start(weight, singular, made.scales, made.codebooks, made.codes, 2)
        tolerance = 1e-5 * size(fit, weight)
        last = objective(fit, weight)
        for number, step in enumerate(3 * ("scales", "codes", "scales", "codebooks")):
            with rounding:
                STEPS[step](fit)
            now = objective(fit, weight)
            assert all_finite(fit)
            assert now <= last + tolerance, (seed, number, step)
            assert fit.relative_error() * fit.energy >= -tolerance, (seed, number, step)
            last = now


@pytest.mark.parametrize("d", [4, 8, 16])
def test_a_centroid_stays_where_its_metrics_see_nothing(d):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        vectors, x = torch.randn(6, 4, d, generator=generator), torch.randn(1, d, generator=generator)
        with Rounding(seed):
            book = kmeans(vectors, (x.T @ x).expand(4, d, d), torch.ones(6), 4, 5, generator)
        assert book.abs().max() < 5 * vectors.abs().max(), seed
