"""Correctness and speed of the Triton kernels on a GPU; appends to results/gpu_kernels.csv and results/gpu_model.csv.

    python benchmarks/bench_gpu.py                    # correctness, then kernels, then a model
    python benchmarks/bench_gpu.py --stage kernels --shapes 4096x4096 --dtypes fp16

Exits with 1 if a kernel is wrong; what is wrong is not timed. Where time per command is limited, run the stages, and
the kernels shape by shape, one at a time. `--dry-run` checks the kernels on tiny shapes without a GPU.
"""

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_quality import commit
from crvq_kernels import dequantize_ref, linear, num_virtual_groups, pack_codes, tile_codes, untile_codes
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
STAGES = ("correctness", "kernels", "model")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Relative error that rounding explains: of the result, and, where the dense weight is written, of the weight.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
ROTATED_BYTES = 200e6  # four times the L2 cache of an H100
MAX_LAYERS = 128  # of a small model all layers fit the cache, so there is no need for more


@dataclass(frozen=True)
class Plan:
    """What to run: output and input features, group size and bits of further layers to check, tokens, repetitions."""

    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (11008, 4096),
        (4096, 11008),
        (8192, 28672),
        (576, 576),
        (1536, 576),
    )
    formats: tuple[tuple[int, int], ...] = tuple((size, nbits) for size in (4, 8, 16) for nbits in range(4, 13))
    format_tokens: tuple[int, ...] = (2, 40)
    checked_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 2048)
    timed_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
    repeats: int = 21
    new_tokens: int = 256


FULL = Plan()
QUICK = Plan(
    shapes=((4096, 4096), (576, 576)),
    checked_tokens=(1, 3, 16, 256),
    timed_tokens=(1, 4, 16, 64, 256),
    repeats=7,
    new_tokens=64,
)
TINY = Plan(shapes=((72, 80),), formats=((16, 11),), format_tokens=(2,), checked_tokens=(1, 17))


@dataclass(frozen=True)
class Layer:
    """A random CRVQ layer: `tensors` are tiled codes, codebooks, scales and channel order."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    constants: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(self) -> Tensor:
        """Returns the weight by the reference, `[N, K]`, fp32."""
        tiles, codebooks, scales, order = self.tensors
        nbits, num_critical_groups = self.constants
        num_codes = num_virtual_groups(order.numel(), codebooks.shape[2], codebooks.shape[0], num_critical_groups)
        codes = untile_codes(tiles, nbits, scales.numel(), num_codes)
        return dequantize_ref(codes, codebooks, scales, order, *self.constants)


def random_layer(shape: tuple[int, int], device: str, in_group_size: int = 8, nbits: int = 8) -> Layer:
    """Returns a layer with three extended codebooks whose outputs have about the size of its inputs."""
    out_features, in_features = shape
    num_critical_groups = max(1, in_features // in_group_size // 50)
    num_codes = num_virtual_groups(in_features, in_group_size, 4, num_critical_groups)
    codes = torch.randint(0, 2**nbits, (out_features, num_codes), dtype=torch.int16, device=device)
    tensors = (
        tile_codes(pack_codes(codes, nbits), nbits, num_codes),
        torch.randn(4, 2**nbits, in_group_size, device=device).half(),
        (torch.rand(out_features, device=device) + 0.5).div(in_features**0.5).half(),
        torch.randperm(in_features, device=device).to(torch.int16),
    )
    return Layer(tensors, (nbits, num_critical_groups))


@dataclass(frozen=True)
class Way:
    """A way to multiply: `run(x, layer)`, for at most `max_tokens` tokens, `layer` as from `prepare(layer, dtype)`."""

    run: Callable[[Tensor, object], Tensor]
    max_tokens: int = 2**31
    prepare: Callable[[Layer, torch.dtype], object] = lambda layer, dtype: layer


def run_gemv(x: Tensor, layer: Layer) -> Tensor:
    from crvq_kernels.gpu.gemv import gemv

    return gemv(x, *layer.tensors, None, *layer.constants)


def run_gemm(x: Tensor, layer: Layer) -> Tensor:
    from crvq_kernels.gpu.gemm import gemm

    return gemm(x, *layer.tensors, None, *layer.constants)


def run_dequantize(x: Tensor, layer: Layer) -> Tensor:
    from crvq_kernels.gpu.dequant import dequantize_weight
    from crvq_kernels.gpu.reorder import reorder

    weight = dequantize_weight(*layer.tensors, *layer.constants, x.dtype, permuted=True)
    return F.linear(reorder(x, layer.tensors[3]), weight)


def run_linear(x: Tensor, layer: Layer) -> Tensor:
    return linear(x, *layer.tensors, None, *layer.constants)


OURS = {
    "gemv": Way(run_gemv, max_tokens=16),
    "gemm": Way(run_gemm),
    "dequantize + matmul": Way(run_dequantize),
}
DENSE = "dense"


def others(dtype: torch.dtype) -> dict[str, Way]:
    """Returns what to compare with: F.linear, and AQLM's kernel for one codebook of 8 bits where it is installed."""
    found = {DENSE: Way(F.linear, prepare=lambda layer, dtype: layer.dense().to(dtype))}
    try:
        from aqlm.inference_kernels import get_forward_pass_kernel
    except ImportError:
        return found

    def prepare(layer: Layer, dtype: torch.dtype) -> tuple:
        tiles, codebooks, scales, order = layer.tensors
        num_groups = order.numel() // 8
        codes = torch.randint(-128, 128, (scales.numel(), num_groups, 1), dtype=torch.int8, device=tiles.device)
        books = codebooks[:1, :, None].to(dtype).contiguous()
        return get_forward_pass_kernel(books, False), codes, books, scales.to(dtype).view(-1, 1, 1, 1)

    aqlm = Way(lambda x, layer: layer[0](x, *layer[1:], None), max_tokens=16, prepare=prepare)
    return found | ({"aqlm 1x8": aqlm} if dtype == torch.float16 else {})


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the error over that of the expected values."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def wrong(way: Way, x: Tensor, layer: Layer, expected: Tensor) -> str | None:
    """Returns what is wrong with the product of `x` and `layer`, None if nothing is."""
    y = way.run(x, layer)
    if y.dtype != x.dtype or y.shape != expected.shape:
        return f"result is {y.dtype} of shape {list(y.shape)}, not {x.dtype} of shape {list(expected.shape)}"
    error = relative_error(y, expected)
    if not error < TOLERANCE[x.dtype]:
        return f"relative error is {error:.1e}, not below {TOLERANCE[x.dtype]:.0e}"
    return None if torch.equal(y, way.run(x, layer)) else "a second run has another result"


def check(plan: Plan, dtypes: list[torch.dtype], device: str) -> list[str]:
    """Compares every kernel with the reference; returns what is wrong, and prints a line per layer."""
    torch.manual_seed(0)  # here, so that a piece has the same numbers in whichever process
    ways = OURS | ({"crvq::linear": Way(run_linear)} if device == "cuda" else {})
    layers = [(shape, 8, 8, dtypes, plan.checked_tokens) for shape in plan.shapes]
    # All formats, of no even size; every one is compiled anew, so not with all dtypes and tokens.
    layers += [((100, 16 * 37), *form, dtypes[:1], plan.format_tokens) for form in plan.formats]
    found = []
    for shape, in_group_size, nbits, layer_dtypes, tokens in layers:
        layer = random_layer(shape, device, in_group_size, nbits)
        dense = layer.dense()
        name = f"{shape[0]}x{shape[1]} d{in_group_size} e{nbits}"
        failures = []
        for dtype in layer_dtypes:
            for num_tokens in tokens:
                x = torch.randn(num_tokens, shape[1], device=device).to(dtype)
                expected = F.linear(x.float(), dense)
                for way_name, way in ways.items():
                    if way_name == "gemv" and nbits > 8 or num_tokens > way.max_tokens:
                        continue
                    problem = wrong(way, x, layer, expected)
                    if problem:
                        failures.append(f"{name}, {dtype}, {num_tokens} tokens, {way_name}: {problem}")
        print(f"{name}: {'wrong' if failures else 'ok'}", flush=True)
        found += failures
    return found


def check_in_processes(plan: Plan, dtypes: list[torch.dtype], device: str, jobs: int) -> list[str]:
    """Does what `check` does, in `jobs` processes: nearly all of its time Triton compiles."""
    pieces = [(replace(plan, shapes=(shape,), formats=()), [dtype]) for shape in plan.shapes for dtype in dtypes]
    pieces += [(replace(plan, shapes=(), formats=(form,)), dtypes) for form in plan.formats]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        found = pool.map(check, *zip(*pieces, strict=True), repeat(device))
        return [problem for some in found for problem in some]


def num_layers(nbytes: int) -> int:
    """Returns how many layers of `nbytes` bytes to go through so that none is left in the L2 cache."""
    return max(2, min(MAX_LAYERS, int(-(-ROTATED_BYTES // nbytes))))


def capture(way: Way, x: Tensor, layers: list) -> torch.cuda.CUDAGraph:
    """Returns a graph that multiplies `x` with every layer."""
    way.run(x, layers[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            way.run(x, layer)
    return graph


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of every replay, the graphs taking turns."""
    seconds = {name: [] for name in graphs}
    for _ in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: values[1:] for name, values in seconds.items()}  # the first one warms up


def time_kernels(plan: Plan, dtypes: list[torch.dtype], stamp: dict) -> list[dict]:
    """Times every way at every number of tokens; prints a table per shape and dtype and returns the rows."""
    from crvq_kernels.gpu.tuning import kernel_for

    rows = []
    for shape in plan.shapes:
        ours = [random_layer(shape, "cuda")]
        ours += [random_layer(shape, "cuda") for _ in range(num_layers(ours[0].nbytes) - 1)]
        for dtype in dtypes:
            count = num_layers(shape[0] * shape[1] * dtype.itemsize)
            ways = {name: (way, ours) for name, way in OURS.items()}
            for name, way in others(dtype).items():
                enough = len(ours) if name != DENSE else count
                ways[name] = way, [way.prepare(ours[i % len(ours)], dtype) for i in range(enough)]
            dense = ours[0].dense()
            table = []
            for num_tokens in plan.timed_tokens:
                x = torch.randn(num_tokens, shape[1], device="cuda").to(dtype)
                expected = F.linear(x.float(), dense)
                graphs = {}
                for name, (way, layers) in ways.items():
                    if num_tokens <= way.max_tokens:
                        problem = wrong(way, x, layers[0], expected) if name in OURS else None
                        if problem:
                            sys.exit(f"{shape[0]}x{shape[1]}, {dtype}, {num_tokens} tokens, {name}: {problem}.")
                        graphs[name] = capture(way, x, layers)
                for name, values in time_graphs(graphs, plan.repeats).items():
                    layers = ways[name][1]
                    table.append(kernel_row(stamp, shape, dtype, num_tokens, name, [v / len(layers) for v in values]))
                graphs.clear()
            chosen = {num_tokens: kernel_for(num_tokens, *shape, 256) for num_tokens in plan.timed_tokens}
            print(f"\n{shape[0]} x {shape[1]}, {dtype}, microseconds\n{as_table(table, chosen)}", flush=True)
            rows += table
    return rows


def kernel_row(
    stamp: dict, shape: tuple[int, int], dtype: torch.dtype, num_tokens: int, way: str, seconds: list[float]
) -> dict:
    """Returns a row of gpu_kernels.csv from the seconds that one layer took, repetition by repetition."""
    ordered = sorted(seconds)
    return stamp | {
        "out_features": shape[0],
        "in_features": shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": num_tokens,
        "way": way,
        "microseconds": round(statistics.median(ordered) * 1e6, 2),
        "fastest": round(ordered[0] * 1e6, 2),
        "slowest": round(ordered[-1] * 1e6, 2),
    }


def as_table(rows: list[dict], chosen: dict[int, str]) -> str:
    """Returns rows of one shape and dtype as a table: a line per number of tokens, a column per way.

    The last columns are the way that `kernel_for` chooses, our fastest way, and how it compares with the dense layer.
    """
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [["tokens", *ways, "chosen", "fastest", "dense / fastest"]]
    for num_tokens, choice in chosen.items():
        times = {row["way"]: row["microseconds"] for row in rows if row["tokens"] == num_tokens}
        best = min((way for way in times if way in OURS), key=times.get)
        cells = [f"{times[way]:.1f}" if way in times else "" for way in ways]
        lines.append([str(num_tokens), *cells, choice, best, f"{times[DENSE] / times[best]:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def gpu_stamp() -> dict[str, str]:
    """Returns what every row says of the machine and the code."""
    stamp = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": installed("triton")}
    return stamp | {"commit": commit()}


def append(path: Path, rows: list[dict]) -> None:
    """Appends rows to a csv file, with a header if it is new."""
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--quick", action="store_true", help="few shapes, numbers of tokens and repetitions")
    parser.add_argument(
        "--shapes", nargs="+", help="only these, e.g. 4096x11008 for 4096 output and 11008 input features"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--jobs", type=int, help="processes that check the kernels; as many as there are CPUs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dry-run", action="store_true", help="the first stage in Triton's interpreter; no GPU needed"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Runs what the command line asks for."""
    args = parse(arguments)
    plan = TINY if args.dry_run else QUICK if args.quick else FULL
    if args.shapes:
        plan = replace(plan, shapes=tuple(tuple(map(int, shape.split("x"))) for shape in args.shapes))
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        stages, device = ["correctness"], "cpu"
    else:
        if args.device != "cuda" or not torch.cuda.is_available():
            sys.exit("This benchmark times GPU kernels and found no GPU to use; without one there is only --dry-run.")
        stages, device = [args.stage] if args.stage else list(STAGES), "cuda"
    dtypes = [DTYPES[name] for name in args.dtypes or DTYPES]
    if "correctness" in stages:
        jobs = args.jobs or (1 if args.dry_run else os.cpu_count())
        found = check(plan, dtypes, device) if jobs == 1 else check_in_processes(plan, dtypes, device, jobs)
        if found:
            sys.exit("\n".join([*found, f"{len(found)} results are wrong; nothing is timed."]))
    if stages == ["correctness"]:
        return
    torch.manual_seed(0)
    stamp = gpu_stamp()
    if "kernels" in stages:
        halves = [dtype for dtype in dtypes if dtype != torch.float32]
        for shape in plan.shapes:  # what is measured is kept, should a later one fail
            append(RESULTS / "gpu_kernels.csv", time_kernels(replace(plan, shapes=(shape,)), halves, stamp))
    if "model" in stages:
        from gpu_model import time_models

        append(RESULTS / "gpu_model.csv", time_models(False, plan.new_tokens, stamp, device))


if __name__ == "__main__":
    main(sys.argv[1:])
