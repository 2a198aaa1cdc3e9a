"""About how long a run takes: short pieces of the work are timed here, and multiplied by how much there is of each.

What it leaves out (attention, waiting for files, launches of small kernels) makes a run take longer, by more on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..algorithm.fit import fit_weight
from ..config import CRVQConfig
from ..modeling.linear import CRVQLinear
from ..quantized_weight import LayerShape, to_stored
from ..resources.device import mixed_precision
from ..tuning.tunable import TunableLinear
from .memory import Work
from .sizes import BlockSizes, ModelSizes

_OUTPUTS, _INPUTS = 128, (512, 2048)  # of the layers that are fitted for it


@dataclass(frozen=True)
class Rates:
    """Seconds of pieces of the work on one machine.

    Attributes:
        product: of a multiplication in a forward pass.
        fit: of fitting, per weight.
        fit_wide: of fitting, per weight and input channel.
        dense: of a step of tuning a dense layer, per weight and token.
        coded: of a step of tuning a layer of codes, per weight and token.
    """

    product: float
    fit: float
    fit_wide: float
    dense: float
    coded: float


def estimate(model: ModelSizes, work: Work, device: torch.device, config: CRVQConfig) -> dict[str, float]:
    """Returns seconds by phase, on one process.

    Args:
        model: its sizes.
        work: how much there is to do.
        device: to compute on; a few seconds of work are done there.
        config: how to quantize.
    """
    with torch.random.fork_rng():
        rates = measure(work, device, config)
    weights = sum(block.weights for block in model.blocks)
    seconds = {}
    if config.dataset == "self":
        everything = weights + model.outside + sum(block.others for block in model.blocks)
        seconds["writing its text"] = rates.product * everything * work.all
    if work.first:
        # The full-precision pass, the quantized one, and one for the Hessians of each stage.
        passes = sum(block.weights * (work.all + work.first * (1 + len(block.stages))) for block in model.blocks)
        squares = sum(g[0].in_features ** 2 for block in model.blocks for stage in block.stages for g in stage)
        seconds["running blocks"] = rates.product * passes
        seconds["Hessians"] = rates.product * work.first * squares / 2
    layers = [layer for block in model.blocks for layer in block.layers]
    seconds["fitting layers"] = sum(_size(x) * (rates.fit + rates.fit_wide * x.in_features) for x in layers)
    if work.first and work.tunes_blocks:
        steps = work.first * config.block_finetune_epochs
        seconds["block fine-tuning"] = steps * sum(_tuning(block, rates) for block in model.blocks)
    if work.first and work.tunes_end_to_end and model.vocabulary:
        each = rates.coded * weights + 3 * rates.product * model.hidden * model.vocabulary
        seconds["end-to-end fine-tuning"] = work.all * config.e2e_finetune_epochs * each
    return seconds


def _size(layer: LayerShape) -> int:
    return layer.in_features * layer.out_features


def _tuning(block: BlockSizes, rates: Rates) -> float:
    """Returns seconds per token of tuning a block after each of its stages."""
    done, total = 0, 0.0
    for stage in block.stages:
        done += sum(_size(layer) for group in stage for layer in group)
        total += rates.coded * done + rates.dense * (block.weights - done)
    return total


def measure(work: Work, device: torch.device, config: CRVQConfig) -> Rates:
    """Returns the rates of this machine, in some seconds."""
    times, fitted = [], None
    for k in _INPUTS:
        weight = torch.randn(_OUTPUTS, k, device=device)
        hessian = torch.eye(k, device=device) + 0.1
        shape = config.layer_shape(k, _OUTPUTS)

        def fit(weight=weight, hessian=hessian, shape=shape):
            return fit_weight(weight, hessian, **shape.fit_options, generator=torch.Generator().manual_seed(0))

        if not times:
            fit()  # what is compiled and allocated once
        seconds, fitted = _timed(fit, device)
        times.append(seconds / (_OUTPUTS * k))
    wide = max(0.0, (times[1] - times[0]) / (_INPUTS[1] - _INPUTS[0]))
    tokens, k = max(work.step, 1), _INPUTS[1]
    coded = TunableLinear(CRVQLinear.from_quantized(to_stored(fitted, shape.nbits, shape.codebook_bits), None))
    dense = nn.Linear(k, _OUTPUTS, bias=False, device=device)
    x = torch.randn(tokens, k, device=device, requires_grad=True)
    each = _OUTPUTS * k * tokens
    with mixed_precision(device, work.bfloat16):
        steps = [_timed(_step(layer.to(device), x), device, times=3)[0] / each for layer in (dense, coded)]
        with torch.no_grad():
            forward = _timed(lambda: dense(x), device, times=3)[0] / each
    return Rates(forward, max(0.0, times[0] - wide * _INPUTS[0]), wide, *steps)


def _step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Returns a function that takes one step of Adam."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(x).float().square().mean().backward()
        optimizer.step()

    step()
    return step


def _timed(work: Callable, device: torch.device, times: int = 1) -> tuple[float, object]:
    """Returns the fewest seconds of some runs, and what the last returned."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, result
