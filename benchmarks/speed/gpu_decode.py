"""The decode stage of `gpu`: is the CUDA kernel for few tokens right, and which of its blocks are fastest?

Rows go to results/gpu_decode.csv after every shape. Beside the kernel run today's Triton kernels and a dense layer,
all in CUDA graphs that take turns, over as many layers as do not fit the L2 cache.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from crvq_kernels.gpu import mma_gather as module
from crvq_kernels.gpu import nvrtc
from crvq_kernels.gpu.mma_gather import mma_gather
from crvq_kernels.gpu.tuning import MmaGatherBlocks, mma_gather_blocks
from torch import Tensor

from ..common.rows import aligned, append
from ..common.timing import relative_error
from . import gpu_kernels as kernels
from .layers import DEFAULT, PAPER, Form, Layer

TOKENS = (1, 2, 4, 8, 16)
CHECKED_TOKENS = (1, 2, 3, 5, 8, 9, 16)
CHECKED_DTYPES = (torch.float16, torch.bfloat16)
PAPER_INT8 = replace(PAPER, codebook_bits=8)  # it reads no others
# Output and input features, form: no even sizes, and one layer as large as those of a model.
CHECKED = (
    ((100, 72), DEFAULT),
    ((300, 520), DEFAULT),
    ((300, 520), Form(0, 0.0, 8)),
    ((300, 520), Form(2, 0.1, 8)),
    ((1000, 1032), PAPER_INT8),
    ((4096, 4096), DEFAULT),
    ((1024, 11008), DEFAULT),
)
FORMS = {"default": DEFAULT, "paper, int8": PAPER_INT8}
REPETITIONS, REPEATS = 100, 9


def random_layers(shape: tuple[int, int], form: Form) -> list[Layer]:
    return [kernels.as_in_a_model(layer) for layer in kernels.rotated_layers(shape, form)]


def run(blocks: MmaGatherBlocks | None) -> Callable[[Tensor, Layer], Tensor]:
    return lambda x, layer: mma_gather(x, *layer.tensors, None, *layer.constants, blocks=blocks)


def name_of(blocks: MmaGatherBlocks) -> str:
    """Returns for example "32x16x9x1 fused": rows, warps, steps ahead, programs."""
    kind = ("fused" if blocks.fused else "staged") + (" dependent" if blocks.dependent else "")
    return f"{'x'.join(map(str, astuple(blocks)[:4]))} {kind}"


def candidates(tokens: int) -> list[MmaGatherBlocks]:
    """Returns all blocks to time, the first of each shape also with programmatic dependent launch if there is that."""
    blocks = [replace(some, dependent=False) for some in mma_gather_blocks(tokens)]
    first = [
        mma_gather_blocks(tokens, *shape)[0] for shape in ((4096, 4096), (11008, 4096), (576, 576), (8192, 28672))
    ]
    can = torch.cuda.get_device_capability() >= (9, 0)
    return blocks + [replace(some, dependent=True) for some in dict.fromkeys(first) if can]


def compile_all(jobs: int) -> None:
    """Compiles at once what is measured, into the cache on the disk."""
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    wanted = {
        module.macros(blocks, tokens, form.num_extended + 1, 4, torch.float16)
        for form in FORMS.values()
        for tokens in TOKENS
        for blocks in candidates(tokens)
    }
    wanted |= {
        module.macros(mma_gather_blocks(tokens)[0], tokens, form.num_extended + 1, 1 if shape[1] <= 256 else 4, dtype)
        for shape, form in CHECKED
        for dtype in CHECKED_DTYPES
        for tokens in CHECKED_TOKENS
    }
    source, start = module.SOURCE.read_text(encoding="utf-8"), time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        sizes = list(pool.map(lambda macros: len(nvrtc.cubin(source, macros, architecture)), wanted))
    print(f"{len(sizes)} variants compiled in {time.perf_counter() - start:.1f} s", flush=True)


def check(deadline: float) -> list[str]:
    """Compares every choice of blocks with the reference and with each other; returns what is wrong."""
    found = []
    for (shape, form), dtype in product(CHECKED, CHECKED_DTYPES):
        if time.perf_counter() > deadline:
            return [*found, "there was no time to check everything"]
        layer = kernels.as_in_a_model(kernels.random_layer(shape, "cuda", form=form))
        dense, worst, count = layer.dense(), 0.0, 0
        # All blocks where they are compiled anyway; elsewhere the first.
        all_of_them = dtype == torch.float16 and form == DEFAULT and shape[1] > 256
        for tokens in CHECKED_TOKENS:
            x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
            expected, first = F.linear(x.float(), dense), None
            for blocks in mma_gather_blocks(tokens)[: None if all_of_them else 1]:
                name = (
                    f"{shape[0]}x{shape[1]}, {form.num_extended} extended, {dtype}, {tokens} tokens, {name_of(blocks)}"
                )
                try:
                    y = run(blocks)(x, layer)
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    if "shared memory that there are" not in str(error):
                        found.append(f"{name}: {error}")
                    continue
                count += 1
                first = y if first is None else first
                worst = max(worst, error := relative_error(y, expected))
                if not error < kernels.TOLERANCE[dtype]:
                    found.append(f"{name}: relative error {error:.1e}")
                if not torch.equal(y, first):
                    found.append(f"{name}: not the bits of the first blocks")
        print(f"{shape[0]}x{shape[1]}, {form}, {dtype}: {count} runs, largest relative error {worst:.1e}", flush=True)
    return found


def repeat_often() -> list[str]:
    """Returns which numbers of tokens have another result when they are multiplied again and again."""
    layer, found = kernels.as_in_a_model(kernels.random_layer((4096, 4096), "cuda", form=DEFAULT)), []
    for tokens in TOKENS:
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
        first = run(None)(x, layer)
        same = [torch.equal(run(None)(x, layer), first) for _ in range(REPETITIONS)]
        if not all(same):
            found.append(f"{tokens} tokens: {same.count(False)} of {REPETITIONS} results are others")
    print(f"{REPETITIONS} repetitions at {TOKENS} tokens: {'not ' if found else ''}bit-equal", flush=True)
    return found


def through_the_operator() -> list[str]:
    """Returns for which numbers of tokens `crvq::linear`, in a CUDA graph on a stream of its own, has other bits."""
    layer, found = kernels.as_in_a_model(kernels.random_layer((4096, 4096), "cuda", form=DEFAULT)), []
    with mock.patch.dict(os.environ, {"CRVQ_MMA_GATHER": str(max(TOKENS))}):
        for tokens in TOKENS:
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
            expected = run(None)(x, layer)
            y = torch.empty_like(expected)
            graph = kernels.capture(
                kernels.Way(lambda x, layer, y=y: y.copy_(kernels.run_linear(x, layer))), x, [layer]
            )
            x.copy_(x.flip(0).contiguous())
            graph.replay()
            torch.cuda.synchronize()
            if module.failure() or not torch.equal(y, expected.flip(0)):
                found.append(f"{tokens} tokens through crvq::linear: {module.failure() or 'other bits'}")
    print(f"crvq::linear in a graph: {'not ' if found else ''}the same bits", flush=True)
    return found


def time_shape(shape: tuple[int, int], form_name: str, stamp: dict, deadline: float) -> list[dict]:
    """Times all blocks of the kernel, Triton's kernels and a dense layer; prints and returns rows."""
    layers, dtype, rows = random_layers(shape, FORMS[form_name]), torch.float16, []
    dense = layers[0].dense().to(dtype)
    count = kernels.num_layers(dense.nbytes)
    dense_layers = [dense, *(torch.randn_like(dense) for _ in range(count - 1))]
    lines = [kernels.HEAD]
    for tokens in TOKENS:
        if time.perf_counter() > deadline:
            break
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        graphs = {kernels.DENSE: kernels.capture(kernels.Way(F.linear), x, dense_layers)}
        ways = {("gemm", ""): kernels.run_gemm} | ({("gemv", ""): kernels.run_gemv} if tokens <= 2 else {})
        ways |= {("mma_gather", name_of(blocks)): run(blocks) for blocks in candidates(tokens)}
        for name, way in ways.items():
            try:
                graphs[name] = kernels.capture(kernels.Way(way), x, layers)
            except RuntimeError as error:
                print(f"{shape[0]}x{shape[1]}, {tokens} tokens, {' '.join(name)}: {error}", flush=True)
        seconds = kernels.time_graphs(graphs, REPEATS)
        graphs.clear()
        times = {
            name: statistics.median(some) / (count if name == kernels.DENSE else len(layers)) * 1e6
            for name, some in seconds.items()
        }
        columns = stamp | {"form": form_name, **kernels.layer_columns(shape, dtype, tokens)}
        more = kernels.rows_and_lines(times, columns, ("gemm", "gemv"))
        rows, lines = rows + more[0], lines + more[1]
    print(f"\n{shape[0]} x {shape[1]}, {form_name}, {len(layers)} layers\n{aligned(lines)}", flush=True)
    return rows


def time_calls() -> None:
    """Prints what a call costs the host, which graphs leave out."""
    layer = kernels.as_in_a_model(kernels.random_layer((576, 576), "cuda", form=DEFAULT))
    x = torch.randn(1, 576, device="cuda", dtype=torch.float16)
    for name, way in (("mma_gather", run(None)), ("gemm", kernels.run_gemm)):
        way(x, layer)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            way(x, layer)
        torch.cuda.synchronize()
        print(f"a call of {name} takes {(time.perf_counter() - start) / 200 * 1e6:.1f} us without a graph", flush=True)


def measure(shapes: tuple[tuple[int, int], ...], minutes: float, output: Path) -> int:
    """Checks and times the kernel; returns 1 if it is wrong, after timing it all the same."""
    start = time.perf_counter()
    deadline = start + 60 * minutes
    torch.manual_seed(0)
    stamp = kernels.gpu_stamp()
    compile_all(8)
    problems = check(start + 0.4 * 60 * minutes) + repeat_often() + through_the_operator()
    print("\n".join(problems) if problems else "all right", flush=True)
    time_calls()
    for form in FORMS:
        for shape in shapes:
            if time.perf_counter() < deadline:
                append(output / "gpu_decode.csv", time_shape(shape, form, stamp, deadline))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return int(bool(problems))
