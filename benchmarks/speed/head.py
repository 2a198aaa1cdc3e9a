"""Time on the CPU of a head in 8 bits and in fewer (`embedding_bits`) beside a dense one, one to many tokens; medians.

    python -m benchmarks head

They take turns. Exits with 1 where one differs from the dense product by more than its bits explain.
"""

import sys
from functools import partial
from statistics import median

import torch
from crvq_kernels import pack_codes, rows_linear
from torch import nn
from torch.nn import functional as F

from crvq_hf.modeling.coded import CodedHead
from crvq_hf.modeling.rows import quantize_rows
from crvq_hf.modeling.table import EVERY, FREQUENT, ROWS, TableShape

from ..common.commands import command_line
from ..common.timing import paired, relative_error

TOLERANCE = 0.02  # twice what rounding gaussian rows to steps of a 127th of their largest entry does


def random_head(vocabulary: int, channels: int, bits: float, dtype: torch.dtype) -> CodedHead:
    """Returns a head of random codes."""
    shape, tensors = TableShape(vocabulary, channels, bits), {}
    for name, (size, kind) in shape.tensors().items():
        numbers = torch.rand(size) if kind.is_floating_point else torch.randint(-127, 128, size)
        tensors[name] = numbers.to(dtype if kind.is_floating_point else kind)
    for names, part in ((EVERY, shape.every), (FREQUENT, shape.frequent)):
        codes = torch.randint(part.codebook_size, (part.out_features, part.num_virtual_groups))
        tensors[names[0]] = pack_codes(codes, part.nbits)
        tensors[names[3]] = torch.randperm(channels).to(tensors[names[3]].dtype)
    tensors[ROWS] = torch.randperm(vocabulary)[: shape.num_frequent].sort().values.int()
    return CodedHead(nn.Linear(channels, vocabulary, bias=False, device="meta"), tensors)


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Prints a line for every dtype and number of tokens."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--channels", type=int, default=576)
    parser.add_argument("--bits", type=float, default=2.5, help="of the codes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--times", type=int, default=45, help="repetitions (default: %(default)s)")
    args = parser.parse_args(arguments)
    print(f"{args.vocabulary} x {args.channels}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"dtype      tokens  dense ms   int8 ms  {args.bits:g} bits ms")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        head = random_head(args.vocabulary, args.channels, args.bits, dtype)
        weight = head.dequantize(dtype)
        numbers, scales = quantize_rows(weight)
        for tokens in args.tokens:
            x = torch.randn(tokens, args.channels).to(dtype)
            calls = {"dense": partial(F.linear, x, weight), "int8": partial(rows_linear, x, numbers, scales)}
            calls["coded"] = partial(head, x)
            for name in ("int8", "coded"):
                error = relative_error(calls[name](), calls["dense"]())
                if not error < TOLERANCE:
                    sys.exit(
                        f"{dtype}, {tokens} tokens: the relative error of {name} is {error:.3f}, above {TOLERANCE}."
                    )
            dense, int8, coded = (1e3 * median(times) for times in paired(calls, args.times).values())
            name = str(dtype).removeprefix("torch.")
            print(f"{name:9} {tokens:7} {dense:9.2f} {int8:9.2f} {coded:9.2f}", flush=True)
