"""Times one-token to few-token forwards of a head in 8 bits against dense ones on the CPU: median, best of the rounds.

python benchmarks/bench_head.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from crvq_hf.modeling.embedding import int8_linear, quantize_rows


def milliseconds(call: Callable[[], object], times: int) -> float:
    """Returns the median time of `call` after two calls that do not count."""
    call(), call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--channels", type=int, default=576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args()
    print(f"{args.vocabulary} x {args.channels}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("dtype      tokens  dense ms   int8 ms")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(args.vocabulary, args.channels).to(dtype)
        numbers, scales = quantize_rows(weight)
        for tokens in args.tokens:
            x = torch.randn(tokens, args.channels).to(dtype)
            # Dense and int8 in turn, three times: other work on the machine then hits both.
            calls = (partial(F.linear, x, weight), partial(int8_linear, x, numbers, scales))
            rounds = [[milliseconds(call, args.times) for call in calls] for _ in range(3)]
            dense, int8 = (min(column) for column in zip(*rounds, strict=True))
            print(f"{str(dtype).removeprefix('torch.'):9} {tokens:7} {dense:9.2f} {int8:9.2f}", flush=True)


if __name__ == "__main__":
    main()
