"""Time of a head in 8 bits beside a dense one on a GPU; appends to results/gpu_head.csv.

    python -m benchmarks gpu_head

Way "triton" reads the int8 rows, "in parts" makes them dense piece by piece. Exits with 1 where one is wrong.
"""

import statistics
import sys
from functools import partial

import torch
from torch.nn import functional as F

from crvq_hf.modeling.rows import quantize_rows

from ..common.commands import command_line
from ..common.rows import append
from . import gpu_kernels as kernels

SHAPES = "32000x4096 128256x4096 49152x576"
TOKENS = (1, 4, 16, 32, 64, 128, 256)
REPEATS = 9


def ways() -> dict[str, kernels.Way]:
    """Returns what is timed; a layer is a dense weight, its int8 rows and their scales."""
    from crvq_kernels import rows
    from crvq_kernels.gpu.rows import rows_gemm

    return {
        "dense": kernels.Way(lambda x, layer: F.linear(x, layer[0])),
        "triton": kernels.Way(lambda x, layer: rows_gemm(x, *layer[1:]), max_tokens=128),
        "in parts": kernels.Way(lambda x, layer: rows.in_parts(x, *layer[1:])),
    }


def time_head(shape: tuple[int, int], dtype: torch.dtype, stamp: dict) -> list[dict]:
    """Times all ways for a head; prints a line per number of tokens and returns the rows."""
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    layer = (weight, *quantize_rows(weight))
    dense, rows = layer[1].float() * layer[2].float()[:, None], []
    print(f"\n{shape[0]} x {shape[1]}, {dtype}, microseconds")
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        expected, graphs = F.linear(x.float(), dense), {}
        for name, way in ways().items():
            if tokens > way.max_tokens:
                continue
            problem = kernels.wrong(way, x, layer, expected) if name != "dense" else None
            if problem:
                sys.exit(f"{shape[0]}x{shape[1]}, {dtype}, {tokens} tokens, {name}: {problem}.")
            graphs[name] = kernels.capture(way, x, [layer] * 4)
        found = kernels.time_graphs(graphs, REPEATS)
        times = {name: round(statistics.median(values) / 4 * 1e6, 2) for name, values in found.items()}
        print(f"{tokens:5}  " + "  ".join(f"{name} {time:.1f}" for name, time in times.items()), flush=True)
        columns = stamp | kernels.layer_columns(shape, dtype, tokens)
        rows += [columns | {"way": name, "microseconds": time} for name, time in times.items()]
    return rows


def main(arguments: list[str]) -> None:
    """Times the heads that the command line names."""
    parser = command_line(__name__)
    shapes = [kernels.shape_of(shape) for shape in SHAPES.split()]
    parser.add_argument("--shapes", nargs="+", type=kernels.shape_of, default=shapes, help="vocabulary x channels")
    parser.add_argument("--dtypes", nargs="+", choices=("fp16", "bf16"), default=("fp16", "bf16"))
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("This script times GPU kernels and found no GPU to use.")
    torch.manual_seed(0)
    run = partial(time_head, stamp=kernels.gpu_stamp())
    for dtype in args.dtypes:
        for shape in args.shapes:
            append(args.output / "gpu_head.csv", run(shape, kernels.DTYPES[dtype]))
