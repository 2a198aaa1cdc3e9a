"""Correctness and speed of the Triton kernels on a GPU; appends to results/gpu_kernels.csv, gpu_generation.csv.

    python -m benchmarks gpu                    # correctness, then kernels, then a model
    python -m benchmarks gpu --stage decode     # the CUDA kernel for few tokens, results/gpu_decode.csv
    python -m benchmarks gpu --stage kernels --shapes 4096x4096 --dtypes fp16

Exits with 1 if a kernel is wrong; what is wrong is not timed. Where time per command is limited, run the stages, and
the kernels shape by shape, one at a time. `--dry-run` checks the kernels on tiny shapes without a GPU.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product, repeat

import torch
import torch.nn.functional as F

from ..common.commands import command_line
from ..common.rows import aligned, append
from . import gpu_kernels as kernels
from .layers import FORMS

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (576, 576), (1536, 576))
STAGES = ("correctness", "kernels", "model")
DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True)
class Plan:
    """What to run: output and input features, group size and bits of further layers to check, tokens, repetitions."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    formats: tuple[tuple[int, int], ...] = tuple((size, nbits) for size in (4, 8, 16) for nbits in range(4, 13))
    format_tokens: tuple[int, ...] = (2, 40)
    checked_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 2048)
    timed_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
    repeats: int = 21
    new_tokens: int = 256


FULL = Plan()
QUICK = Plan(
    ((4096, 4096), (576, 576)),
    checked_tokens=(1, 3, 16, 256),
    timed_tokens=(1, 4, 16, 64, 256),
    repeats=7,
    new_tokens=64,
)
TINY = Plan(shapes=((72, 80),), formats=((16, 11),), format_tokens=(2,), checked_tokens=(1, 17))


def check(plan: Plan, dtypes: list[torch.dtype], device: str) -> list[str]:
    """Compares every kernel with the reference; returns what is wrong, and prints a line per layer."""
    torch.manual_seed(0)  # here, so that a piece has the same numbers in whichever process
    ways = kernels.OURS | ({"crvq::linear": kernels.Way(kernels.run_linear)} if device == "cuda" else {})
    layers = [(shape, 8, 8, "default", dtypes, plan.checked_tokens) for shape in plan.shapes]
    layers += [(shape, 8, 8, "paper", dtypes, plan.format_tokens) for shape in plan.shapes]
    # All formats, of no even size; every one is compiled anew, so not with all dtypes and tokens.
    layers += [((100, 16 * 37), *sizes, "paper", dtypes[:1], plan.format_tokens) for sizes in plan.formats]
    found = []
    for shape, in_group_size, nbits, form, layer_dtypes, tokens in layers:
        layer = kernels.random_layer(shape, device, in_group_size, nbits, form=FORMS[form])
        dense = layer.dense()
        name = f"{shape[0]}x{shape[1]} d{in_group_size} e{nbits} {form}"
        failures = []
        for dtype in layer_dtypes:
            for num_tokens in tokens:
                x = torch.randn(num_tokens, shape[1], device=device).to(dtype)
                expected = F.linear(x.float(), dense)
                for way_name, way in ways.items():
                    if way_name == "gemv" and nbits > 8 or num_tokens > way.max_tokens:
                        continue
                    problem = kernels.wrong(way, x, layer, expected)
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


def time_kernels(plan: Plan, dtypes: list[torch.dtype], stamp: dict, form: str) -> list[dict]:
    """Times every way at every number of tokens; prints a table per shape and dtype and returns the rows.

    Args:
        form: of the layers, a name in `FORMS`.
    """
    from crvq_kernels.gpu.tuning import kernel_for

    rows = []
    for shape in plan.shapes:
        ours = kernels.rotated_layers(shape, FORMS[form])
        for dtype in dtypes:
            count = kernels.num_layers(shape[0] * shape[1] * dtype.itemsize)
            ways = {name: (way, ours) for name, way in kernels.OURS.items()}
            for name, way in kernels.others(dtype).items():
                enough = len(ours) if name != kernels.DENSE else count
                ways[name] = way, [way.prepare(ours[i % len(ours)], dtype) for i in range(enough)]
            dense = ours[0].dense()
            table = []
            for num_tokens in plan.timed_tokens:
                x = torch.randn(num_tokens, shape[1], device="cuda").to(dtype)
                expected = F.linear(x.float(), dense)
                graphs = {}
                for name, (way, layers) in ways.items():
                    if num_tokens <= way.max_tokens:
                        problem = kernels.wrong(way, x, layers[0], expected) if name in kernels.OURS else None
                        if problem:
                            sys.exit(f"{shape[0]}x{shape[1]}, {dtype}, {num_tokens} tokens, {name}: {problem}.")
                        graphs[name] = kernels.capture(way, x, layers)
                for name, values in kernels.time_graphs(graphs, plan.repeats).items():
                    layers = ways[name][1]
                    seconds = [value / len(layers) for value in values]
                    table.append(kernel_row(stamp | {"form": form}, shape, dtype, num_tokens, name, seconds))
                graphs.clear()
            chosen = {num_tokens: kernel_for(num_tokens, *shape, 256) for num_tokens in plan.timed_tokens}
            print(f"\n{shape[0]} x {shape[1]}, {form}, {dtype}, microseconds\n{as_table(table, chosen)}", flush=True)
            rows += table
    return rows


def kernel_row(
    stamp: dict, shape: tuple[int, int], dtype: torch.dtype, num_tokens: int, way: str, seconds: list[float]
) -> dict:
    """Returns a row of gpu_kernels.csv from the seconds that one layer took, repetition by repetition."""
    ordered = sorted(seconds)
    times = {"microseconds": statistics.median(ordered), "fastest": ordered[0], "slowest": ordered[-1]}
    row = stamp | kernels.layer_columns(shape, dtype, num_tokens) | {"way": way}
    return row | {name: round(value * 1e6, 2) for name, value in times.items()}


def as_table(rows: list[dict], chosen: dict[int, str]) -> str:
    """Returns rows of one shape and dtype as a table: a line per number of tokens, a column per way.

    The last columns are the way that `kernel_for` chooses, our fastest way, and how it compares with the dense layer.
    """
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [["tokens", *ways, "chosen", "fastest", "dense / fastest"]]
    for num_tokens, choice in chosen.items():
        times = {row["way"]: row["microseconds"] for row in rows if row["tokens"] == num_tokens}
        best = min((way for way in times if way in kernels.OURS), key=times.get)
        cells = [f"{times[way]:.1f}" if way in times else "" for way in ways]
        lines.append([str(num_tokens), *cells, choice, best, f"{times[kernels.DENSE] / times[best]:.2f}"])
    return aligned(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__name__)
    parser.add_argument("--stage", choices=(*STAGES, DECODE, PREFILL), help="only this one; the last two run only so")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of these and `model`: what one has not begun by then is left out"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, numbers of tokens and repetitions")
    text = "only these, e.g. 4096x11008 for 4096 output and 11008 input features"
    parser.add_argument("--shapes", nargs="+", type=kernels.shape_of, help=text)
    parser.add_argument("--dtypes", nargs="+", choices=kernels.DTYPES, help="only these")
    parser.add_argument("--jobs", type=int, help="processes that check the kernels; as many as there are CPUs")
    parser.add_argument("--device", default="cuda")
    text = "the first stage in Triton's interpreter; no GPU needed"
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int | None:
    """Runs what the command line asks for."""
    args = parse(arguments)
    plan = TINY if args.dry_run else QUICK if args.quick else FULL
    if args.shapes:
        plan = replace(plan, shapes=tuple(args.shapes))
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        stages, device = ["correctness"], "cpu"
    else:
        if args.device != "cuda" or not torch.cuda.is_available():
            sys.exit("This benchmark times GPU kernels and found no GPU to use; without one there is only --dry-run.")
        stages, device = [args.stage] if args.stage else list(STAGES), "cuda"
    if args.stage == DECODE:
        from .gpu_decode import measure

        return measure(plan.shapes, args.minutes, args.output)
    if args.stage == PREFILL:
        from .gpu_prefill import measure

        return measure(plan.shapes, args.minutes, args.output)
    dtypes = [kernels.DTYPES[name] for name in args.dtypes or kernels.DTYPES]
    if "correctness" in stages:
        jobs = args.jobs or (1 if args.dry_run else os.cpu_count())
        found = check(plan, dtypes, device) if jobs == 1 else check_in_processes(plan, dtypes, device, jobs)
        if found:
            sys.exit("\n".join([*found, f"{len(found)} results are wrong; nothing is timed."]))
    if stages == ["correctness"]:
        return
    torch.manual_seed(0)
    stamp = kernels.gpu_stamp()
    if "kernels" in stages:
        halves = [dtype for dtype in dtypes if dtype != torch.float32]
        for form, shape in product(FORMS, plan.shapes):  # what is measured is kept, should a later one fail
            rows = time_kernels(replace(plan, shapes=(shape,)), halves, stamp, form)
            append(args.output / "gpu_kernels.csv", rows)
    if "model" in stages:
        from .gpu_model import time_models

        for row in time_models(False, plan.new_tokens, stamp, device, args.minutes):  # what is measured is kept
            append(args.output / "gpu_generation.csv", [row])
