"""The CPU benchmark: what it measures is what it says, and its goals are read off the rows."""

import crvq_kernels
import pytest
import torch

from benchmarks.speed import cpu as bench
from benchmarks.speed.layers import random_layer


@pytest.mark.skipif(not crvq_kernels.prefers_tiles("cpu"), reason="no compiled kernel")
@torch.no_grad()
def test_contenders_compute_the_same():
    torch.manual_seed(0)
    layer = random_layer((128, 512))
    dense, kernel = layer.dense(), bench.packed(layer)
    x = bench.with_outliers(torch.randn(1, 512), layer)
    calls = bench.contenders(layer, dense, kernel, None, x)
    expected = calls.pop("fp32")()
    assert set(calls) == {"bf16", "crvq", "crvq_bf16", "nn_linear", "module"}
    for name, call in calls.items():
        bound = 2e-2 if "bf16" in name else 2e-4
        assert (call() - expected).norm() < bound * expected.norm(), name
    assert bench.relative_error(kernel(x), x @ dense.T) < 2e-4


def test_outliers():
    factors, counts = bench.with_outliers(torch.ones(1, 1536), random_layer((64, 1536))).unique(return_counts=True)
    assert dict(zip(factors.tolist(), counts.tolist(), strict=True)) == {1: 1536 - 24 - 4, 20: 24, 50: 4}


@pytest.mark.skipif(bench.cpu.library() is None, reason="no compiled kernel")
def test_goals(monkeypatch):
    monkeypatch.setattr(bench.cpu.library(), "level", bench.cpu.INSTRUCTIONS.index("vbmi"))
    row = {"n": 4096, "k": 4096, "m": 1, "over_fp32": 14.9, "over_aqlm": None, "error": 1e-5, "outlier_error": 3e-4}
    missed = [name for name, value, least, most in bench.layer_goals([row]) if not least <= value <= most]
    assert missed == ["4096 x 4096, M 1: over fp32", "largest outlier_error"]
    rows = [{"over_fp32": 17, "identical": "no"}, {"over_one_thread": 1.9, "identical": "no"}]
    missed = [name for name, value, least, most in bench.decode_goals(rows) if not least <= value <= most]
    assert missed == [bench.IDENTICAL]
