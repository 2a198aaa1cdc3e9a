"""Codes, codebooks and scales: invariants, steps that never lose, and optima against brute force."""

from collections import Counter

import pytest
import torch
from crvq_kernels import code_search, pack_codes
from crvq_kernels.reference import dequantize_ref
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crvq_hf.algorithm import search
from crvq_hf.algorithm.fit import refine_
from crvq_hf.algorithm.search import LayerFit, assemble, scatter, update_codebooks_, update_codes_, update_scales_

STEPS = {
    "codes": update_codes_,
    "scales": update_scales_,
    "codebooks": update_codebooks_,
}


def make(n, num_groups, d, size, extended, critical, seed) -> tuple[LayerFit, torch.Tensor]:
    """Returns a fit from random scales, codebooks and codes, and its weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    k = num_groups * d
    x = normal(2 * k, k) @ normal(k, k).mul(0.3 / k**0.5).add(torch.eye(k))
    weight = normal(n, k)
    fit = LayerFit.start(
        weight,
        x.T @ x / len(x),
        torch.rand(n, generator=generator) + 0.5,
        normal(1 + extended, size, d) * torch.tensor([1.0] + extended * [0.3])[:, None, None],
        torch.randint(size, (n, num_groups + extended * critical), generator=generator),
        critical,
    )
    return fit, weight


def objective(fit: LayerFit, weight: torch.Tensor) -> float:
    """Returns `tr((W - Wq) H (W - Wq)^T)` from scales, codebooks and codes, in double precision."""
    dense = assemble(fit.codebooks.double(), fit.codes, fit.num_critical_groups) * fit.scales.double()[:, None]
    difference = weight.double() - dense
    return float(torch.sum(difference @ fit.hessian.double() * difference))


def assert_consistent(fit: LayerFit, weight: torch.Tensor) -> None:
    """Checks that what a fit keeps up to date is what follows from its scales, codebooks and codes."""
    dense = assemble(fit.codebooks.double(), fit.codes, fit.num_critical_groups) * fit.scales.double()[:, None]
    gradient = (weight.double() - dense) @ fit.hessian.double()
    size = max(float(dense.norm()), float(weight.norm()))
    assert float((fit.quantized - dense).norm()) <= 1e-5 * size
    assert float((fit.gradient - gradient).norm()) <= 1e-5 * size * float(fit.hessian.double().norm())
    assert fit.relative_error() == pytest.approx(max(0.0, objective(fit, weight) / fit.energy), rel=1e-3, abs=1e-5)


@st.composite
def shapes(draw):
    num_groups = draw(st.integers(1, 20))
    extended = draw(st.integers(0, 3))
    return {
        "n": draw(st.integers(1, 12)),
        "num_groups": num_groups,
        "d": draw(st.sampled_from([4, 8, 16])),
        "size": draw(st.integers(1, 16)),
        "extended": extended,
        "critical": draw(st.integers(1, min(num_groups, 3))) if extended else 0,
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=60)
@given(shape=shapes(), steps=st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=6))
def test_every_step_keeps_the_books_and_never_loses(shape, steps):
    fit, weight = make(**shape)
    assert_consistent(fit, weight)
    last = objective(fit, weight)
    for step in steps:
        STEPS[step](fit)
        assert_consistent(fit, weight)
        now = objective(fit, weight)
        assert now <= last + 1e-5 * (last + fit.energy), step
        last = now
    assert fit.codes.min() >= 0 and fit.codes.max() < shape["size"]


@pytest.mark.parametrize(("d", "extended"), [(4, 0), (8, 1), (8, 3), (16, 2)])
def test_refining_gains_a_lot(d, extended):
    fit, weight = make(40, 8, d, 16, extended, 2 if extended else 0, 1)
    before = objective(fit, weight)
    refine_(fit)
    assert_consistent(fit, weight)
    assert objective(fit, weight) < 0.6 * before


@pytest.mark.parametrize("d", [4, 8, 16])
def test_codes_of_a_single_group_are_the_best_by_brute_force(d):
    fit, weight = make(30, 1, d, 20, 0, 0, d)
    update_codes_(fit)
    candidates = fit.codebooks[0].double() * fit.scales.double()[:, None, None]  # [N, C, d]
    difference = weight.double()[:, None] - candidates
    errors = torch.einsum("ncd,de,nce->nc", difference, fit.hessian.double(), difference)
    assert torch.equal(fit.codes[:, 0], errors.argmin(1))


def best_code(fit: LayerFit, weight: torch.Tensor, virtual: int) -> torch.Tensor:
    """Returns the best codes `[N]` of one virtual group with all other codes as they are, trying each."""
    errors = []
    for code in range(fit.codebooks.shape[1]):
        codes = fit.codes.clone()
        codes[:, virtual] = code
        dense = assemble(fit.codebooks.double(), codes, fit.num_critical_groups) * fit.scales.double()[:, None]
        difference = weight.double() - dense
        errors.append(torch.sum(difference @ fit.hessian.double() * difference, 1))
    return torch.stack(errors).argmin(0)


@pytest.mark.parametrize("extended", [0, 1, 3])
def test_one_sweep_is_brute_force_group_by_group(extended):
    critical = 2 if extended else 0
    fit, weight = make(6, 20, 4, 5, extended, critical, 7)  # 80 channels: more than one lazy block
    swept, _ = make(6, 20, 4, 5, extended, critical, 7)
    update_codes_(swept)
    for group in range(20):
        for book in range(1 + extended if group < critical else 1):
            virtual = group if book == 0 else 20 + (book - 1) * critical + group
            fit.codes[:, virtual] = best_code(fit, weight, virtual)
    assert torch.equal(swept.codes, fit.codes)


def test_the_lazy_block_does_not_change_the_codes(monkeypatch):
    found = []
    for columns in (1, 16, 64, 1000):
        monkeypatch.setattr(search, "_BLOCK_COLUMNS", columns)
        fit, _ = make(20, 20, 8, 16, 2, 3, 3)
        update_codes_(fit)
        found.append(fit.codes)
    assert all(torch.equal(codes, found[0]) for codes in found)


@given(shape=shapes())
def test_scales_are_optimal(shape):
    fit, weight = make(**shape)
    before = fit.scales.clone()
    update_scales_(fit)
    changed = fit.scales != before
    # The derivative of a row's error in its scale is -2 <gradient, quantized> / scale.
    slope = (fit.gradient.double() * fit.quantized.double()).sum(1).abs()
    reference = (fit.target.double() * fit.quantized.double()).abs().sum(1)
    assert (slope <= 1e-4 * reference)[changed].all()
    assert (fit.scales > 0).all()


def test_a_row_that_would_need_a_negative_scale_keeps_it():
    hessian = torch.eye(4)
    codebooks = torch.tensor([[[1.0, 1.0, 1.0, 1.0]]])
    weight = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    fit = LayerFit.start(weight, hessian, torch.ones(2), codebooks, torch.zeros(2, 1, dtype=torch.int64), 0)
    update_scales_(fit)
    assert fit.scales.tolist() == [1.0, 2.0]
    assert_consistent(fit, weight)


@given(shape=shapes())
def test_scatter_is_the_adjoint_of_assemble(shape):
    fit, _ = make(**shape)
    generator = torch.Generator().manual_seed(shape["seed"])
    codebooks = torch.randn(fit.codebooks.shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(fit.quantized.shape, generator=generator, dtype=torch.float64)
    forward = (assemble(codebooks, fit.codes, fit.num_critical_groups) * gradient).sum()
    adjoint = (codebooks * scatter(gradient, fit.codes, codebooks.shape, fit.num_critical_groups)).sum()
    torch.testing.assert_close(forward, adjoint, rtol=1e-10, atol=1e-9)


@given(shape=shapes())
def test_assemble_is_the_definition(shape):
    fit, _ = make(**shape)
    k = fit.quantized.shape[1]
    reference = dequantize_ref(
        pack_codes(fit.codes, 4), fit.codebooks, fit.scales, torch.arange(k), 4, fit.num_critical_groups
    )
    torch.testing.assert_close(fit.quantized, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("extended", "critical"), [(0, 0), (1, 2), (2, 1)])
def test_many_steps_reach_the_least_squares_optimum(extended, critical):
    fit, weight = make(20, 4, 4, 3, extended, critical, 11)
    root = torch.linalg.cholesky(fit.hessian.double())
    columns = []
    for unit in torch.eye(fit.codebooks.numel(), dtype=torch.float64):
        dense = assemble(unit.view(fit.codebooks.shape), fit.codes, critical) * fit.scales.double()[:, None]
        columns.append((dense @ root).flatten())
    design, wanted = torch.stack(columns, 1), (weight.double() @ root).flatten()
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    optimum = float((design @ solution - wanted).square().sum())
    start = objective(fit, weight)
    assert start > 1.5 * optimum
    update_codebooks_(fit)
    assert objective(fit, weight) < start
    for _ in range(60):
        update_codebooks_(fit)
    assert objective(fit, weight) == pytest.approx(optimum, rel=1e-4)
    assert_consistent(fit, weight)


def test_a_codeword_in_no_use_stays():
    fit, _ = make(5, 3, 8, 16, 1, 1, 2)
    fit.codes.clamp_(max=2)
    fit = LayerFit.start(torch.randn(5, 24), fit.hessian, fit.scales, fit.codebooks, fit.codes, 1)
    before = fit.codebooks.clone()
    update_codebooks_(fit)
    assert torch.equal(fit.codebooks[:, 3:], before[:, 3:])
    assert not torch.equal(fit.codebooks[:, :3], before[:, :3])


def all_finite(fit: LayerFit) -> bool:
    tensors = (fit.scales, fit.codebooks, fit.quantized, fit.gradient)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize(
    "case",
    ["zero row", "zero weight", "zero hessian", "duplicate rows", "zero scale", "rank one hessian", "equal codewords"],
)
def test_degenerate_layers_stay_finite(case):
    made, weight = make(6, 5, 8, 8, 2, 2, 4)
    hessian, scales, codebooks = made.hessian, made.scales, made.codebooks
    if case == "zero row":
        weight[2] = 0
    elif case == "zero weight":
        weight.zero_()
    elif case == "zero hessian":
        hessian = torch.zeros_like(hessian)
    elif case == "duplicate rows":
        weight[:] = weight[0]
        scales = torch.ones(6)
    elif case == "zero scale":
        scales = scales.clone()
        scales[1] = 0
    elif case == "rank one hessian":
        x = torch.randn(1, 40)
        hessian = x.T @ x
    else:
        codebooks = codebooks[:, :1].expand(3, 8, 8).contiguous()
    fit = LayerFit.start(weight, hessian, scales, codebooks, made.codes, 2)
    before = objective(fit, weight)
    refine_(fit)
    assert all_finite(fit)
    assert objective(fit, weight) <= before + 1e-5 * (before + fit.energy)
    assert -1e-3 < fit.relative_error() < float("inf")  # so little below zero is rounding


@pytest.mark.parametrize("draw", range(8))
def test_codewords_do_not_grow_where_the_hessian_is_blind(draw):
    made, weight = make(6, 5, 8, 8, 2, 2, 4)
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(draw))
    fit = LayerFit.start(weight, x.T @ x, made.scales, made.codebooks, made.codes, 2)
    before = objective(fit, weight)
    refine_(fit)
    assert fit.quantized.norm() < 1000 * weight.norm()
    assert objective(fit, weight) < 1e-3 * before  # one number a row is to be met
    assert fit.relative_error() > -1e-3


def test_duplicate_rows_get_the_same_codes():
    made, weight = make(6, 5, 8, 8, 2, 2, 4)
    weight[:] = weight[0]
    codes = made.codes[:1].repeat(6, 1)
    fit = LayerFit.start(weight, made.hessian, torch.ones(6), made.codebooks, codes, 2)
    refine_(fit)
    assert torch.equal(fit.codes, fit.codes[:1].repeat(6, 1))


class Launches(TorchDispatchMode):
    """Counts the operators that would be kernel launches on a GPU, and those that would wait for it."""

    VIEWS = {"view", "t", "transpose", "expand", "select", "slice", "permute", "unsqueeze", "empty_like", "detach"}
    WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in self.VIEWS:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def launches_of_a_sweep(num_groups: int) -> Launches:
    fit, _ = make(5, num_groups, 8, 16, 1, 2, 0)
    with Launches() as counted:
        update_codes_(fit)
    return counted


def test_a_sweep_by_the_kernel_takes_few_launches(monkeypatch):
    """Six for 64 columns, of which one is the kernel's; in PyTorch it is more than ten times as many."""
    pytest.importorskip("triton")
    from crvq_kernels.gpu import code_search as kernel

    def launched(*args):
        with torch._C._DisableTorchDispatch():  # what the interpreter does is one launch
            change = choose(*args)
        return change.clone()

    choose = kernel.choose_codes_
    monkeypatch.setattr(code_search.compiled, "can_search", lambda *args: False)
    monkeypatch.setattr(code_search, "first_largest", lambda scores: scores.argmax(-1))
    in_pytorch = launches_of_a_sweep(24).names.total() - launches_of_a_sweep(16).names.total()
    monkeypatch.setattr(code_search, "by_kernel", lambda device: True)
    monkeypatch.setattr(kernel, "choose_codes_", launched)
    more, fewer = launches_of_a_sweep(24).names, launches_of_a_sweep(16).names
    assert more.total() - fewer.total() <= 6 and in_pytorch > 60
    assert not more.keys() & Launches.WAITS
