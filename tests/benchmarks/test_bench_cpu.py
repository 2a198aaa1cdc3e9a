"""The CPU benchmark: what it measures is what it says, and its goals are read off the rows."""

import functools
import itertools
import sys
from pathlib import Path

import crvq_kernels
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The benchmark as a module; like every script it imports from the folder it is in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bench_cpu

        yield bench_cpu
        for name in ("bench_cpu", "bench_quality"):
            sys.modules.pop(name, None)


@pytest.mark.skipif(not crvq_kernels.prefers_tiles("cpu"), reason="no compiled kernel")
@torch.no_grad()
def test_contenders_compute_the_same(bench):
    torch.manual_seed(0)
    weight = bench.random_weight(128, 512)
    dense, layer = weight.dequantize(torch.float32), bench.packed(weight)
    x = bench.with_outliers(torch.randn(1, 512), weight)
    calls = bench.contenders(weight, dense, layer, None, x)
    expected = calls.pop("fp32")()
    assert set(calls) == {"bf16", "crvq", "crvq_bf16", "nn_linear", "module"}
    for name, call in calls.items():
        bound = 2e-2 if "bf16" in name else 2e-4
        assert (call() - expected).norm() < bound * expected.norm(), name
    assert bench.relative_error(layer, dense, x) < 2e-4


def test_outliers(bench):
    weight = bench.random_weight(64, 1536)
    factors, counts = bench.with_outliers(torch.ones(1, 1536), weight).unique(return_counts=True)
    assert dict(zip(factors.tolist(), counts.tolist(), strict=True)) == {1: 1536 - 24 - 4, 20: 24, 50: 4}


@pytest.mark.parametrize(("warm", "turns"), [(False, "abab"), (True, "aabbaabb")])
def test_calls_take_turns(bench, warm, turns):
    called, clock = [], itertools.count()
    calls = {name: functools.partial(called.append, name) for name in "ab"}
    assert bench.paired(calls, 2, lambda: next(clock), warm) == {"a": [1, 1], "b": [1, 1]}
    assert "".join(called) == "aabb" + turns


def test_ratio_is_the_median_of_pairs(bench):
    times = {"slow": [10.0, 100.0, 40.0], "fast": [1.0, 20.0, 2.0]}
    assert bench.ratio(times, "slow", "fast") == 10
    assert bench.ratio(times, "slow", "other") is None


def test_goals(bench):
    row = {"n": 4096, "k": 4096, "m": 1, "over_fp32": 14.9, "over_aqlm": None, "error": 1e-5, "outlier_error": 3e-4}
    missed = [name for name, value, least, most in bench.layer_goals([row]) if not least <= value <= most]
    assert missed == ["4096 x 4096, M 1: over fp32", "largest outlier_error"]
    rows = [{"over_fp32": 17, "identical": "no"}, {"over_one_thread": 1.9, "identical": "no"}]
    missed = [name for name, value, least, most in bench.decode_goals(rows) if not least <= value <= most]
    assert missed == [bench.IDENTICAL]
