"""Times of the tiles that `tuning.py` chooses from, on a GPU; appends to results/gpu_tiles.csv.

    python -m benchmarks gpu_tiles
    python -m benchmarks gpu_tiles --shapes 4096x4096 --dtypes fp16

A row is a tile and a number of tokens; `chosen` says whether `tuning.py` would take it there. What is wrong is named,
and not timed. The printed table has the fastest tile beside the one chosen.
"""

import statistics
import sys
from dataclasses import astuple
from unittest import mock

import torch
import torch.nn.functional as F
from crvq_kernels import num_virtual_groups
from crvq_kernels.gpu import gemm as gemm_module
from crvq_kernels.gpu import gemv as gemv_module
from crvq_kernels.gpu.tuning import GemmBlocks, GemvBlocks
from crvq_kernels.packing import TILE_GROUPS
from torch import Tensor

from ..common.commands import command_line
from ..common.rows import append
from . import gpu_kernels as kernels

SHAPES = "4096x4096 1024x4096 14336x4096 4096x14336 8192x28672 2048x2048 576x576 1536x576"
GEMV_ROWS_AND_WARPS = ((128, 8), (256, 8), (256, 16), (512, 8), (512, 16))
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# Tokens, rows, ... of a program, by the numbers of tokens it is timed for.
GEMM = {
    (1, 2, 8): ((8, 32, 8, 8), (8, 32, 16, 16), (8, 64, 8, 8)),
    (16,): ((16, 32, 8, 8), (16, 32, 16, 16), (16, 64, 8, 8), (16, 64, 16, 16)),
    (32, 64, 128): ((32, 32, 8, 8), (32, 64, 4, 4), (32, 64, 8, 8)),
    (64, 128): ((64, 32, 8, 8), (64, 64, 4, 4), (64, 64, 8, 8)),
    (128,): ((128, 32, 8, 8),),
}
REPEATS = 5


def candidates(shape: tuple[int, int], dtype: torch.dtype, layer: kernels.Layer) -> dict[int, list]:
    """Returns the tiles to time by number of tokens, the one that `tuning.py` chooses first."""
    out_features, in_features = shape
    num_slices = -(-num_virtual_groups(in_features, 8, 4, layer.constants[1]) // TILE_GROUPS)
    slices = {-(-num_slices // min(splits, num_slices)) for splits in SPLITS}
    gemv = [
        GemvBlocks(rows, -(-num_slices // some), some, warps)
        for rows, warps in GEMV_ROWS_AND_WARPS
        for some in sorted(slices)
        if rows <= 2 * out_features
    ]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    factors = gemv_module.dot_factors(dtype, torch.float16)
    tiles = {1: [gemv_module.gemv_blocks(1, out_features, num_slices, processors, factors), *gemv]}
    for numbers, blocks in GEMM.items():
        for tokens in numbers:
            chosen = gemm_module.gemm_blocks(tokens, out_features, 8, False, False)
            tiles.setdefault(tokens, []).extend([chosen, *(GemmBlocks(*block) for block in blocks)])
    return {tokens: list(dict.fromkeys(blocks)) for tokens, blocks in tiles.items()}


def time_tile(
    blocks: GemvBlocks | GemmBlocks, x: Tensor, layers: list[kernels.Layer], expected: Tensor
) -> float | None:
    """Returns the microseconds a layer takes with these blocks, None after naming what is wrong."""
    module, name = (gemv_module, "gemv") if isinstance(blocks, GemvBlocks) else (gemm_module, "gemm")
    with mock.patch.object(module, f"{name}_blocks", lambda *args: blocks):  # what the launchers ask
        try:
            problem = kernels.wrong(kernels.OURS[name], x, layers[0], expected)
            if problem is None:
                seconds = kernels.time_graphs({name: kernels.capture(kernels.OURS[name], x, layers)}, REPEATS)[name]
                return statistics.median(seconds) / len(layers) * 1e6
        except RuntimeError as error:  # of Triton too: it takes more than the GPU has
            problem = f"{error}"
    print(f"{blocks}, {len(x)} tokens: {problem:.200}", flush=True)
    return None


def time_tiles(shape: tuple[int, int], dtype: torch.dtype, stamp: dict) -> list[dict]:
    """Times all tiles for a layer; prints a line per number of tokens and returns the rows."""
    layers = kernels.rotated_layers(shape)
    dense, rows = layers[0].dense(), []
    print(f"\n{shape[0]} x {shape[1]}, {dtype}: tokens, chosen and its microseconds, fastest and its")
    for tokens, tiles in candidates(shape, dtype, layers[0]).items():
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        timed = {blocks: time_tile(blocks, x, layers, F.linear(x.float(), dense)) for blocks in tiles}
        timed = {blocks: time for blocks, time in timed.items() if time is not None}
        chosen = {kind: next(blocks for blocks in tiles if type(blocks) is kind) for kind in map(type, tiles)}
        for kind, choice in chosen.items():
            own = {blocks: time for blocks, time in timed.items() if type(blocks) is kind}
            best = min(own, key=own.get, default=None)
            times = [own.get(blocks, float("nan")) for blocks in (choice, best)]
            print(f"{tokens:5}  {choice} {times[0]:.1f}  {best} {times[1]:.1f}", flush=True)
        rows += [
            stamp
            | kernels.layer_columns(shape, dtype, tokens)
            | {"kernel": type(blocks).__name__.removesuffix("Blocks").lower()}
            | {"tile": "x".join(map(str, astuple(blocks))), "microseconds": round(time, 2)}
            | {"chosen": int(blocks == chosen[type(blocks)])}
            for blocks, time in timed.items()
        ]
    return rows


def main(arguments: list[str]) -> None:
    """Times the tiles for the layers that the command line names."""
    parser = command_line(__name__)
    shapes = [kernels.shape_of(shape) for shape in SHAPES.split()]
    parser.add_argument("--shapes", nargs="+", type=kernels.shape_of, default=shapes, help="output x input features")
    parser.add_argument("--dtypes", nargs="+", choices=("fp16", "bf16"), default=("fp16", "bf16"))
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("This script times GPU kernels and found no GPU to use.")
    torch.manual_seed(0)
    for dtype in args.dtypes:
        for shape in args.shapes:
            rows = time_tiles(shape, kernels.DTYPES[dtype], kernels.gpu_stamp())
            append(args.output / "gpu_tiles.csv", rows)
