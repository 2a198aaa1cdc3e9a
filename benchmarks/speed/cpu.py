"""Speed and accuracy of CRVQ layers on a CPU, against dense ones; appends rows to results/cpu_*.csv.

    python -m benchmarks cpu --check                       # layers and decode, and their goals

The contenders take turns in one process; a time is the median of its repetitions, a ratio the median of the ratios
within repetitions. One thread, unless --threads says more, timed in CPU time, so that other work on the machine counts
little; more threads are timed in wall time.

layers: single layers, d 8, e 8, E 3, 2 % critical channels, random codes, no bias, by every instruction set that the
    processor has (CRVQ_CPU: by that one); what it lacks is said, and its goals are left out. Every turn begins with
    calls that are not timed, so weights that fit a cache are in it. `bf16` and `crvq_bf16` get bf16 `x` and are
    compared with each other; `nn_linear` and `module` are the modules of a model. `aqlm` is its 1x8 CPU kernel, if it
    is installed (pip install aqlm numba scipy): base codes only, which is less work, and one thread, as it is wrong
    with more.
tables: what `cpu.uses_tables` chooses from, for codes of 8 to 11 bits: tables, or rows made dense and multiplied.
decode: every linear layer of a Llama-2-7B decode step, each with memory of its own, so that weights come from memory
    and not from a cache: all 32 blocks of CRVQ, as many dense ones as 2.4 GB hold. One thread and two; the ratio of
    the two is in wall time. Also whether results are the same in every run. Takes 7 GB.
"""

import argparse
import functools
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import crvq_kernels
import torch
import torch.nn.functional as F
from crvq_kernels import cpu
from crvq_kernels.cpu import binding
from torch import Tensor, nn

from crvq_hf.modeling.linear import CRVQLinear
from crvq_hf.quantized_weight import QuantizedWeight

from ..common.commands import again, command_line
from ..common.rows import append, commit, cpu_name, markdown, versions
from ..common.timing import paired, ratio, relative_error, short
from .layers import Layer, random_layer

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008))  # N, K
TOKENS, AQLM_TOKENS = (1, 2, 4, 16, 64, 128, 512), (1, 16)
BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)  # of Llama-2-7B
BLOCKS = {"crvq": 32, "fp32": 3, "bf16": 6}
IDENTICAL = "identical results"

# What layers are to reach over fp32 by tokens: large ones (4096 features), small ones, and single shapes.
LEAST_OVER_FP32 = {
    "vbmi": {
        "large": {16: 0.8, 128: 1.0},
        "small": {16: 0.8, 128: 0.45},
        (576, 576): {1: 1.5},
        (1536, 576): {1: 4.0},
        (4096, 4096): {1: 15.0},
        (11008, 4096): {1: 20.0},
    },
    "avx512bw": {"large": {1: 10.0, 16: 5.0, 128: 1.5, 512: 1.5}, "small": dict.fromkeys(TOKENS, 1.0)},
    "avx2": {"large": {1: 6.0, 16: 5.0, 128: 1.5, 512: 1.5}, "small": dict.fromkeys(TOKENS, 1.0)},
}

Goal = tuple[str, float, float, float]  # name, value, least, most


def main(arguments: list[str]) -> None:
    """Runs the parts that the command line names."""
    args = parse(arguments)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    wanted = os.environ | dict.fromkeys(names, str(args.threads)) | {"NUMBA_NUM_THREADS": "1"}
    if wanted != dict(os.environ):  # read when torch and numba are loaded, so start again
        os.execve(sys.executable, again("cpu", *arguments), wanted)
    if cpu.library() is None:
        sys.exit(f"There is nothing to measure without the compiled kernel: {crvq_kernels.why_not_better()}.")
    goals = []
    for part in PARTS if args.part == "all" else (args.part,):
        for number in instruction_sets() if part == "layers" else [cpu.library().level]:
            before, cpu.library().level = cpu.library().level, number
            goals += run(part, args)
            cpu.library().level = before
    missed = [name for name, value, least, most in goals if not least <= value <= most]
    if args.check:
        header = ("goal", "found", "at least", "at most")
        print("\n" + markdown([dict(zip(header, goal, strict=True)) for goal in goals]))
    if missed and (args.check or IDENTICAL in missed):
        sys.exit(f"missed: {'; '.join(missed)}")


def instruction_sets() -> list[int]:
    """Returns the instruction sets to measure, as numbers: that of CRVQ_CPU, or all that there are."""
    library = cpu.library()
    if os.environ.get("CRVQ_CPU"):
        return [library.level]
    lacking = [name for number, name in enumerate(cpu.INSTRUCTIONS) if number not in library.supported]
    print(f"not measured, for this processor lacks them: {', '.join(lacking) or 'none'}", flush=True)
    return library.supported


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__name__)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--threads", type=int, default=1, help="of layers; decode takes 1 and 2")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--check", action="store_true", help="compare with the goals; exit 1 if one is missed")
    return parser.parse_args(arguments)


@torch.no_grad()
def run(part: str, args: argparse.Namespace) -> list[Goal]:
    """Measures a part, appends its rows and prints them; returns its goals."""
    measure, goals = PARTS[part]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = [{"threads": args.threads} | row for row in measure(args)]
    stamp = {"instructions": cpu.INSTRUCTIONS[cpu.library().level], "commit": commit(), "cpu": cpu_name()}
    stamp |= versions("torch", "transformers")
    print(f"\n{part}: {', '.join(f'{name} {value}' for name, value in stamp.items())}\n{markdown(rows)}", flush=True)
    append(args.output / f"cpu_{part}.csv", [row | stamp for row in rows])
    return list(goals(rows))


def measure_layers(args: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for every shape and number of tokens."""
    for shape in SHAPES:
        out_features, in_features = shape
        print(f"{out_features} x {in_features} ...", file=sys.stderr)
        layer = random_layer(shape)
        dense, kernel = layer.dense(), packed(layer)
        aqlm = aqlm_kernel(layer) if args.threads == 1 else None
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features)
            calls = contenders(layer, dense, kernel, aqlm, x)
            times = paired(calls, args.repetitions, clock(args.threads), warm=True)
            row = {"n": out_features, "k": in_features, "m": tokens}
            for name in ("fp32", "bf16", "crvq", "crvq_bf16", "nn_linear", "module", "aqlm"):
                row[f"{name}_us"] = short(median(times[name]) * 1e6) if name in times else None
            if aqlm is None:
                row["aqlm_us"] = "not installed" if args.threads == 1 else "one thread only"
            row["over_fp32"] = ratio(times, "fp32", "crvq")
            row["over_bf16"] = ratio(times, "bf16", "crvq_bf16")
            row["module_over_nn_linear"] = ratio(times, "nn_linear", "module")
            row["over_aqlm"] = ratio(times, "aqlm", "crvq")
            for name, inputs in (("error", x), ("outlier_error", with_outliers(x, layer))):
                row[name] = short(relative_error(kernel(inputs), inputs.double() @ dense.double().T))
            yield row


def contenders(layer: Layer, dense: Tensor, kernel: Callable, aqlm: Callable | None, x: Tensor) -> dict:
    """Returns what is to be timed on `x`, `[M, K]`."""
    x_bf16 = x.bfloat16()
    calls = {
        "fp32": functools.partial(F.linear, x, dense),
        "bf16": functools.partial(F.linear, x_bf16, dense.bfloat16()),
        "crvq": functools.partial(kernel, x),
        "crvq_bf16": functools.partial(kernel, x_bf16),
    }
    if len(x) == 1:
        linear = nn.Linear(*reversed(dense.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(dense, requires_grad=False)
        calls["nn_linear"] = functools.partial(linear, x)
        weight = QuantizedWeight(*layer.stored, *layer.constants)
        calls["module"] = functools.partial(CRVQLinear.from_quantized(weight, None).tile_(), x)
    if aqlm is not None and len(x) in AQLM_TOKENS:
        calls["aqlm"] = functools.partial(aqlm, x)
    return calls


def packed(layer: Layer) -> crvq_kernels.CPULayer:
    """Returns the layer as a model calls it."""
    return crvq_kernels.CPULayer(*layer.tensors, None, *layer.constants)


def aqlm_kernel(layer: Layer) -> Callable[[Tensor], Tensor] | None:
    """Returns aqlm's CPU kernel on the base codes of `layer`, channels as stored; None if it is not installed.

    Raises:
        RuntimeError: its result is wrong.
    """
    if importlib.util.find_spec("scipy") is None:  # numba multiplies matrices with it
        return None
    try:
        from aqlm.inference_kernels.numba_kernel import numba_gemm_lut
    except ImportError:
        return None
    codes, codebooks, scales, order = layer.stored
    codes, codebook, scales = codes[:, : len(order) // codebooks.shape[2]], codebooks[0].float(), scales.float()
    by_group = codes.T.contiguous()[..., None].view(torch.int8)
    tensors = (by_group, codebook[None, :, None], scales.view(-1, 1, 1, 1), None)
    x = torch.randn(1, len(order))
    expected = F.linear(x, codebook[codes.long()].flatten(1)) * scales
    if not relative_error(numba_gemm_lut(x, *tensors), expected) < 1e-5:
        raise RuntimeError("aqlm's kernel computes something else than it should")
    return lambda x: numba_gemm_lut(x, *tensors)


def with_outliers(x: Tensor, layer: Layer) -> Tensor:
    """Returns `x` with critical channels times 20 and four others times 50, as activations of language models are."""
    _, codebooks, _, order = layer.stored
    critical, others = order.long().tensor_split([layer.constants[1] * codebooks.shape[2]])
    factor = torch.ones(len(order))
    factor[critical] = 20
    factor[others[torch.randperm(len(others))[:4]]] = 50
    return x * factor


def layer_goals(rows: list[dict]) -> Iterator[Goal]:
    """Yields what single layers are to reach."""
    goals = LEAST_OVER_FP32.get(cpu.INSTRUCTIONS[cpu.library().level], {})
    for row in rows:
        shape, name = (row["n"], row["k"]), f"{row['n']} x {row['k']}, M {row['m']}"
        of_size = goals.get("large" if max(shape) >= 4096 else "small", {})
        least = goals.get(shape, {}).get(row["m"], of_size.get(row["m"]))
        if least is not None:
            yield f"{name}: over fp32", row["over_fp32"], least, float("inf")
        if row["m"] == 1 and row["over_aqlm"] is not None:
            yield f"{name}: over aqlm", row["over_aqlm"], 3.0, float("inf")
    for name in ("error", "outlier_error"):
        yield f"largest {name}", max(row[name] for row in rows), 0.0, 2e-4


def measure_decode(args: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for one thread and, where there are two processors, one for two."""
    identical = is_deterministic()
    steps = {kind: decode_step(kind) for kind in BLOCKS}
    counts = (1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,)
    wall = paired({threads: functools.partial(steps["crvq"][0], threads) for threads in counts}, args.repetitions)
    for threads in counts:
        calls = {kind: functools.partial(step, threads) for kind, (step, _) in steps.items()}
        times = paired(calls, args.repetitions, clock(threads))
        row = {"threads": threads}
        for kind, (_, gigabytes) in steps.items():
            seconds = median(times[kind])
            row[f"{kind}_ms_per_block"] = short(seconds * 1e3 / BLOCKS[kind])
            row[f"{kind}_gb_per_s"] = short(gigabytes / seconds)
        for kind in ("fp32", "bf16"):
            row[f"over_{kind}"] = short(ratio(times, kind, "crvq") * BLOCKS["crvq"] / BLOCKS[kind])
        row["over_one_thread"] = ratio(wall, 1, threads)
        yield row | {"identical": "yes" if identical else "no"}


def decode_step(kind: str) -> tuple[Callable[[int], None], float]:
    """Returns a call of every linear layer of `BLOCKS[kind]` blocks, which takes a number of threads, and their GB."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    dense = {shape: torch.empty(shape, dtype=dtype).uniform_(-1, 1) for shape in set(BLOCK)}
    calls, num_bytes = [], 0
    for shape in BLOCK * BLOCKS[kind]:
        if kind == "crvq":
            layer = packed(random_layer(shape))
            num_bytes += sum(tensor.nbytes for tensor in layer.tensors if tensor is not None)
        else:
            weight = dense[shape].clone()
            layer = functools.partial(F.linear, weight=weight)
            num_bytes += weight.nbytes
        calls.append(functools.partial(layer, torch.randn(1, shape[1], dtype=dtype)))

    def step(threads: int) -> None:
        torch.set_num_threads(threads)
        for call in calls:
            call()

    return step, num_bytes / 1e9


def is_deterministic() -> bool:
    """Returns whether 200 runs with one thread and with two, of one token and of eight, all give the same bits."""
    layer = packed(random_layer((4096, 4096)))
    for tokens in (1, 8):
        x = torch.randn(tokens, 4096)
        expected = layer(x)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            if not all(layer(x).equal(expected) for _ in range(200)):
                return False
    return True


def decode_goals(rows: list[dict]) -> Iterator[Goal]:
    """Yields what a decode step is to reach."""
    yield "decode over fp32", rows[0]["over_fp32"], 16.0, float("inf")
    if len(rows) > 1:
        yield "decode, two threads over one", rows[1]["over_one_thread"], 1.6, float("inf")
    yield IDENTICAL, float(rows[0]["identical"] == "yes"), 1.0, 1.0


def measure_tables(args: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for every shape, bits of a code and number of tokens: both ways, beside a dense layer."""
    for shape, bits in itertools.product(((576, 576), (1536, 576), (4096, 4096)), (8, 9, 10, 11)):
        layer = random_layer(shape, nbits=bits)
        dense, kernel = layer.dense(), packed(layer)
        for tokens in (16, 128):
            x = torch.randn(tokens, shape[1])
            calls = {"fp32": functools.partial(F.linear, x, dense)}
            calls |= {
                name: functools.partial(applied, kernel, x, name == "tables") for name in ("tables", "dequantize")
            }
            times = paired(calls, args.repetitions, clock(args.threads))
            row = {"n": shape[0], "k": shape[1], "bits": bits, "m": tokens}
            row |= {f"{name}_us": short(median(values) * 1e6) for name, values in times.items()}
            chosen = binding.uses_tables(tokens, shape[0], bits, x.dtype)
            yield row | {"chosen": "tables" if chosen else "dequantize"}


def applied(kernel: Callable[[Tensor], Tensor], x: Tensor, tables: bool) -> Tensor:
    """Returns `kernel(x)` by tables, or by dequantizing, whatever it would have chosen."""
    choice, binding.uses_tables = binding.uses_tables, lambda *_: tables
    try:
        return kernel(x)
    finally:
        binding.uses_tables = choice


def clock(threads: int) -> Callable[[], float]:
    """Returns the clock that times so many threads: CPU time leaves out what others do, but adds threads up."""
    return time.process_time if threads == 1 else time.perf_counter


PARTS = {
    "layers": (measure_layers, layer_goals),
    "decode": (measure_decode, decode_goals),
    "tables": (measure_tables, lambda rows: ()),
}
