"""The prefill stage of `gpu`: is the wgmma kernel right, and which of its blocks are fastest from 32 tokens on?

Rows go to results/gpu_prefill.csv after every shape. Beside the kernel run today's matrix kernel, dequantization with
a dense product, and a dense layer, all in CUDA graphs that take turns, over as many layers as do not fit the L2 cache.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rows import aligned, append
from ..common.timing import relative_error
from . import gpu_kernels as kernels
from .layers import DEFAULT, PAPER, Form, Layer

TOKENS = (32, 64, 128, 256, 512, 2048)
# Output and input features, form: one layer as large as those of a model, and no even sizes.
CHECKED = (
    ((4096, 4096), DEFAULT),
    ((100, 72), DEFAULT),
    ((300, 520), Form(0, 0.0, 8)),
    ((300, 520), Form(2, 0.1, 8)),
    ((1000, 1032), replace(PAPER, codebook_bits=8)),
    ((1000, 1032), PAPER),
)
CHECKED_TOKENS = (17, 33, 64, 100, 128, 300)
REPETITIONS, REPEATS = 100, 5
LONG_TOKENS = 2048  # from here on today's matrix kernel is slow anyway


def run(blocks) -> Callable[[Tensor, Layer], Tensor]:
    from crvq_kernels.hopper.wgmma import wgmma

    return lambda x, layer: wgmma(x, *layer.tensors, None, *layer.constants, blocks=blocks)


def candidates(layer: Layer, tokens: int) -> tuple:
    """Returns the blocks to try for a layer, those that are chosen first."""
    from crvq_kernels.gpu.tuning import num_processors
    from crvq_kernels.hopper.tuning import wgmma_blocks
    from crvq_kernels.packing import num_virtual_groups

    _, codebooks, scales, order = layer.tensors
    num_codes = num_virtual_groups(order.numel(), 8, codebooks.shape[0], layer.constants[1])
    int8 = codebooks.dtype == torch.int8
    return wgmma_blocks(tokens, scales.numel(), num_codes, num_processors(scales.device), int8)


def name_of(blocks) -> str:
    """Returns for example "64x32x4x2x4, 8 splits, int8": rows, tokens, warps, fours of groups, stages."""
    sizes = (blocks.rows, blocks.tokens, blocks.warps, blocks.quads, blocks.stages)
    return f"{'x'.join(map(str, sizes))}, {blocks.splits} splits, {'int8' if blocks.int8 else 'fp16'}"


def check_piece(shape: tuple[int, int], form: Form, dtype: torch.dtype, tokens: int) -> tuple[int, float, list[str]]:
    """Compares the kernel with the reference; for a process, as nearly all of the time Triton compiles.

    Returns:
        How many results were compared, their largest relative error, what is wrong.
    """
    torch.manual_seed(0)
    layer = kernels.as_in_a_model(kernels.random_layer(shape, "cuda", form=form))
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    expected = F.linear(x.float(), layer.dense())
    blocks = candidates(layer, tokens)[: None if all_blocks(shape, dtype) else 1]
    if all_blocks(shape, dtype):  # whole and in splits, so that Triton's cache has what is timed later
        blocks = [replace(some, splits=splits) for some in blocks for splits in {1, 2, some.splits}]
    count, worst, found = 0, 0.0, []
    for some in blocks:
        name = f"{shape[0]}x{shape[1]}, {form}, {dtype}, {tokens} tokens, {name_of(some)}"
        try:
            y = run(some)(x, layer)
            again = [torch.equal(run(some)(x, layer), y) for _ in range(3)]
        except Exception as error:  # of Triton too: one that does not compile must not end the run
            found.append(f"{name}: {type(error).__name__}: {error}"[:400])
            continue
        count, error = count + 1, relative_error(y, expected)
        worst = max(worst, error)
        if not error < kernels.TOLERANCE[dtype]:
            found.append(f"{name}: relative error {error:.1e}")
        if not all(again):
            found.append(f"{name}: another run has other bits")
    return count, worst, found


def all_blocks(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Returns whether all blocks are checked and not only the first."""
    return dtype == torch.float16 and shape == CHECKED[0][0]


def check(jobs: int, deadline: float) -> list[str]:
    """Does what `check_piece` does for all, in `jobs` processes; returns what is wrong."""
    start = time.perf_counter()
    dtypes = (torch.float16, torch.bfloat16)
    pieces = [(*case, dtype, tokens) for case in CHECKED for dtype in dtypes for tokens in CHECKED_TOKENS]
    count, worst, found = 0, dict.fromkeys(dtypes, 0.0), []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(check_piece, *piece): piece for piece in pieces}
        try:
            for future in as_completed(futures, timeout=max(1.0, deadline - start)):
                dtype = futures[future][2]
                some, error, wrong = future.result()
                count, worst[dtype] = count + some, max(worst[dtype], error)
                found += wrong
        except TimeoutError:
            found.append("there was no time to check everything")
        except BrokenProcessPool as error:
            found.append(f"a process that checks has ended: {error}")
        pool.shutdown(wait=True, cancel_futures=True)
    print(f"{count} runs in {time.perf_counter() - start:.0f} s, largest relative errors {worst}", flush=True)
    return found


def repeat_often() -> list[str]:
    """Returns which numbers of tokens have another result when they are multiplied again and again."""
    layer, found = kernels.as_in_a_model(kernels.random_layer((4096, 4096), "cuda", form=DEFAULT)), []
    for tokens in TOKENS[:4]:
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
        try:
            first = run(None)(x, layer)
            same = [torch.equal(run(None)(x, layer), first) for _ in range(REPETITIONS)]
        except Exception as error:
            found.append(f"{tokens} tokens: {type(error).__name__}: {error}"[:400])
            continue
        if not all(same):
            found.append(f"{tokens} tokens: {same.count(False)} of {REPETITIONS} results are others")
    print(f"{REPETITIONS} repetitions at {TOKENS[:4]} tokens: {'not ' if found else ''}bit-equal", flush=True)
    return found


def time_shape(shape: tuple[int, int], stamp: dict, deadline: float) -> list[dict]:
    """Times all blocks of the kernel, today's ways and a dense layer; prints and returns rows."""
    layers = [kernels.as_in_a_model(layer) for layer in kernels.rotated_layers(shape, DEFAULT)]
    dtype, rows = torch.float16, []
    dense = layers[0].dense().to(dtype)
    count = kernels.num_layers(dense.nbytes)
    dense_layers = [dense, *(torch.randn_like(dense) for _ in range(count - 1))]
    lines = [kernels.HEAD]
    for tokens in TOKENS:
        if time.perf_counter() > deadline:
            break
        # What takes a millisecond a layer is known well enough after a few of them.
        some = layers[: max(2, min(len(layers), 2**32 // (tokens * dense.numel() // 64)))]
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        ways = {("gemm", ""): kernels.run_gemm} if tokens < LONG_TOKENS else {}
        ways["dequantize + matmul", ""] = kernels.run_dequantize
        ways |= {("wgmma", name_of(blocks)): run(blocks) for blocks in candidates(layers[0], tokens)}
        graphs = {kernels.DENSE: kernels.capture(kernels.Way(F.linear), x, dense_layers)}
        expected = F.linear(x, dense)
        for name, way in ways.items():
            try:
                error = relative_error(way(x, layers[0]), expected)
                if not error < 2 * kernels.TOLERANCE[dtype]:
                    raise ValueError(f"relative error {error:.1e}")
                graphs[name] = kernels.capture(kernels.Way(way), x, some)
            except Exception as error:
                print(f"{shape[0]}x{shape[1]}, {tokens} tokens, {name}: {error!r:.300}", flush=True)
        seconds = kernels.time_graphs(graphs, REPEATS)
        graphs.clear()
        times = {
            name: statistics.median(values) / (count if name == kernels.DENSE else len(some)) * 1e6
            for name, values in seconds.items()
        }
        columns = stamp | {"form": "default", **kernels.layer_columns(shape, dtype, tokens)}
        more = kernels.rows_and_lines(times, columns, ("gemm", "dequantize + matmul"))
        rows, lines = rows + more[0], lines + more[1]
    print(f"\n{shape[0]} x {shape[1]}, {len(layers)} layers\n{aligned(lines)}", flush=True)
    return rows


def measure(shapes: tuple[tuple[int, int], ...], minutes: float, output: Path) -> int:
    """Checks and times the kernel; returns 1 if it is wrong, after timing it all the same."""
    start = time.perf_counter()
    deadline = start + 60 * minutes
    torch.manual_seed(0)
    stamp = kernels.gpu_stamp()
    problems = check(min(14, os.cpu_count()), start + 0.5 * 60 * minutes) + repeat_often()
    print("\n".join(problems) if problems else "all right", flush=True)
    for shape in shapes:
        if time.perf_counter() < deadline:
            append(output / "gpu_prefill.csv", time_shape(shape, stamp, deadline))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return int(bool(problems))
