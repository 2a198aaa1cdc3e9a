"""Random layers and the ways to multiply by them on a GPU: checked, and timed in CUDA graphs that take turns."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from crvq_kernels import linear
from torch import Tensor

from ..common.rows import commit, gpu_name, versions
from ..common.timing import relative_error
from .layers import PAPER, Form, Layer, random_layer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Relative error that rounding explains: of the result, and, where the dense weight is written, of the weight.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
ROTATED_BYTES = 200e6  # four times the L2 cache of an H100
MAX_LAYERS = 128  # of a small model all layers fit the cache, so there is no need for more


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


def wrong(way: Way, x: Tensor, layer: Layer, expected: Tensor) -> str | None:
    """Returns what is wrong with the product of `x` and `layer`, None if nothing is."""
    y = way.run(x, layer)
    if y.dtype != x.dtype or y.shape != expected.shape:
        return f"result is {y.dtype} of shape {list(y.shape)}, not {x.dtype} of shape {list(expected.shape)}"
    error = relative_error(y, expected)
    if not error < TOLERANCE[x.dtype]:
        return f"relative error is {error:.1e}, not below {TOLERANCE[x.dtype]:.0e}"
    return None if torch.equal(y, way.run(x, layer)) else "a second run has another result"


def num_layers(nbytes: int) -> int:
    """Returns how many layers of `nbytes` bytes to go through so that none is left in the L2 cache."""
    return max(2, min(MAX_LAYERS, int(-(-ROTATED_BYTES // nbytes))))


def rotated_layers(shape: tuple[int, int], form: Form = PAPER) -> list[Layer]:
    """Returns different layers on the GPU, as many as `num_layers` says."""
    layers = [random_layer(shape, "cuda", form=form)]
    return layers + [random_layer(shape, "cuda", form=form) for _ in range(num_layers(layers[0].nbytes) - 1)]


def as_in_a_model(layer: Layer) -> Layer:
    """Returns the layer with its order as `CRVQLinear` keeps it on a GPU."""
    *others, order = layer.tensors
    return replace(layer, tensors=(*others, order.int() if order.dtype == torch.int16 else order))


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


def shape_of(text: str) -> tuple[int, int]:
    """Returns output and input features of "4096x11008"."""
    out_features, in_features = map(int, text.split("x"))
    return out_features, in_features


def layer_columns(shape: tuple[int, int], dtype: torch.dtype, num_tokens: int) -> dict[str, int | str]:
    """Returns what a row says of the layer and the tokens."""
    name = str(dtype).removeprefix("torch.")
    return {"out_features": shape[0], "in_features": shape[1], "dtype": name, "tokens": num_tokens}


HEAD = ["tokens", "way", "blocks", "us", "dense / it", "today / it"]


def rows_and_lines(
    times: dict, columns: dict[str, int | str], today: tuple[str, ...]
) -> tuple[list[dict[str, int | str | float]], list[list[str]]]:
    """Returns a row of a file and a line under `HEAD` for every way, the fastest first.

    Args:
        times: microseconds by way and blocks; those of the dense layer under `DENSE`.
        columns: what a row begins with.
        today: the ways that the fastest of is compared with.
    """
    rows, lines = [], []
    before = min(time for name, time in times.items() if name[0] in today)
    for name, time in sorted(times.items(), key=lambda item: item[1]):
        way, blocks = (name, "") if name == DENSE else name
        rows.append(columns | {"way": way, "blocks": blocks, "microseconds": round(time, 2)})
        ratios = [f"{times[DENSE] / time:.2f}", f"{before / time:.2f}"]
        lines.append([str(columns["tokens"]), way, blocks, f"{time:.2f}", *ratios])
    return rows, lines


def gpu_stamp() -> dict[str, str]:
    """Returns what every row says of the machine and the code."""
    return {"gpu": gpu_name(), **versions("torch", "triton"), "commit": commit()}
