"""benchmarks/speed/gpu_search.py, as far as no GPU is needed: what it times is a search that has work to do."""

import pytest
import torch

from benchmarks.speed import gpu_search
from crvq_hf.algorithm.search import update_codes_


def test_a_sweep_of_a_random_fit_lowers_its_error():
    fit = gpu_search.random_fit((40, 256), "cpu")
    before = fit.relative_error()
    update_codes_(fit)
    assert fit.relative_error() < before / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu():
    with pytest.raises(SystemExit, match="found no GPU to use"):
        gpu_search.main([])
