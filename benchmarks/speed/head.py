"""Time on the CPU of a head in 8 bits (`embedding_bits=8`) beside a dense one, for one to many tokens; medians.

    python -m benchmarks head

The two take turns. Exits with 1 where they differ by more than 8 bits explain.
"""

import sys
from functools import partial
from statistics import median

import torch
from crvq_kernels import rows_linear
from torch.nn import functional as F

from crvq_hf.modeling.rows import quantize_rows

from ..common.commands import command_line
from ..common.timing import paired, relative_error

TOLERANCE = 0.02  # twice what rounding gaussian rows to steps of a 127th of their largest entry does


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Prints a line for every dtype and number of tokens."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--channels", type=int, default=576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--times", type=int, default=45, help="repetitions (default: %(default)s)")
    args = parser.parse_args(arguments)
    print(f"{args.vocabulary} x {args.channels}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("dtype      tokens  dense ms   int8 ms")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(args.vocabulary, args.channels).to(dtype)
        numbers, scales = quantize_rows(weight)
        for tokens in args.tokens:
            x = torch.randn(tokens, args.channels).to(dtype)
            calls = {"dense": partial(F.linear, x, weight), "int8": partial(rows_linear, x, numbers, scales)}
            error = relative_error(calls["int8"](), calls["dense"]())
            if not error < TOLERANCE:
                sys.exit(f"{dtype}, {tokens} tokens: the relative error in 8 bits is {error:.3f}, above {TOLERANCE}.")
            dense, int8 = (1e3 * median(times) for times in paired(calls, args.times).values())
            print(f"{str(dtype).removeprefix('torch.'):9} {tokens:7} {dense:9.2f} {int8:9.2f}", flush=True)
