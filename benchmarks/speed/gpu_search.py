"""Time of the search for codes on a GPU, operator by operator and as one kernel; appends to results/gpu_search.csv.

    python -m benchmarks gpu_search

A sweep over all codes of random layers of 7B shapes. Exits with 1 where a code that the kernel chose is not as good.
"""

import copy
import os
import statistics
import sys
from unittest import mock

import torch

from crvq_hf.algorithm.search import LayerFit, update_codes_

from ..common.commands import command_line
from ..common.rows import append
from . import gpu_kernels as kernels

SHAPES = "4096x4096 11008x4096 4096x11008"
WAYS = {"operators": "0", "kernel": "1"}  # by what CRVQ_GPU_SEARCH is
CRITICAL_RATIO, GROUP, CODEWORDS = 0.04, 8, 256
TOLERANCE = 1e-3  # of the relative error: where two codewords are equally good, rounding chooses
REPEATS = 3


def random_fit(shape: tuple[int, int], device: str) -> LayerFit:
    """Returns a fit of a random layer with one extended codebook, from random codes."""
    rows, channels = shape
    critical = max(1, int(CRITICAL_RATIO * channels / GROUP))
    inputs = torch.randn(channels, channels, device=device) * torch.rand(channels, device=device)
    weight = torch.randn(rows, channels, device=device)
    codebooks = torch.randn(2, CODEWORDS, GROUP, device=device)
    codebooks[1] *= 0.3
    codes = torch.randint(CODEWORDS, (rows, channels // GROUP + critical), device=device)
    scales = weight.square().mean(1).sqrt()
    return LayerFit.start(weight, inputs.T @ inputs / channels, scales, codebooks, codes, critical)


def sweep(start: LayerFit, way: str) -> tuple[float, float]:
    """Returns the milliseconds of a sweep from `start`, and the relative error that it leaves."""
    fit = copy.deepcopy(start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with mock.patch.dict(os.environ, {"CRVQ_GPU_SEARCH": WAYS[way]}):
        begin.record()
        update_codes_(fit)
        end.record()
    end.synchronize()
    return begin.elapsed_time(end), fit.relative_error()


def main(arguments: list[str]) -> None:
    """Times the layers that the command line names, the ways taking turns."""
    parser = command_line(__name__)
    shapes = [kernels.shape_of(shape) for shape in SHAPES.split()]
    parser.add_argument("--shapes", nargs="+", type=kernels.shape_of, default=shapes, help="rows x channels")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("This script times the search on a GPU and found no GPU to use.")
    torch.manual_seed(0)
    stamp = kernels.gpu_stamp()
    for rows, channels in args.shapes:
        start = random_fit((rows, channels), "cuda")
        runs = [{way: sweep(start, way) for way in WAYS} for _ in range(1 + REPEATS)][1:]  # the first compiles
        errors = [runs[0][way][1] for way in WAYS]
        if not abs(errors[1] / errors[0] - 1) < TOLERANCE:
            sys.exit(f"{rows}x{channels}: the kernel's codes leave an error of {errors[1]:.5f}, not {errors[0]:.5f}.")
        times = {way: round(statistics.median(run[way][0] for run in runs), 2) for way in WAYS}
        print(f"{rows}x{channels}: " + ", ".join(f"{way} {time:.1f} ms" for way, time in times.items()), flush=True)
        columns = stamp | {"rows": rows, "channels": channels}
        append(args.output / "gpu_search.csv", [columns | {"way": way, "ms": time} for way, time in times.items()])
