r"""Quantizes in one process and in several, and compares every tensor, the perplexity and the time.

    python -m benchmarks processes MODEL --calibration calib.txt --text wiki.test.raw \
        --nsamples 16 --e2e-nsamples 32

MODEL is the folder of a dense model; options it does not know go to `crvq quantize`. Each process has one thread.
"""

import tempfile
import time
from pathlib import Path

from ..common.commands import SEQLEN, WINDOWS, add_inputs, command_line, perplexity, python
from .kills import contents

CRVQ = ["-m", "crvq_hf"]


def main(arguments: list[str]) -> int:
    """Quantizes twice; returns 1 if the two differ."""
    parser = command_line(__name__, writes=False)
    add_inputs(parser)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", metavar="DIR", help="keep the quantized models in this folder")
    args, options = parser.parse_known_args(arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, start in (("one", CRVQ), ("several", launcher + CRVQ)):
            out = Path(args.keep or folder, name)
            begun = time.perf_counter()
            text = ["--dataset", args.calibration, "--device", "cpu"]
            python(*start, "quantize", args.model, str(out), *text, *options)
            seconds = time.perf_counter() - begun
            value = perplexity(str(out), args.text)
            print(f"{name}: {seconds:.0f} s, perplexity {value:.4f} ({WINDOWS} windows of {SEQLEN})", flush=True)
            found.append((contents(out), value))
    (one, before), (several, after) = found
    differing = sorted(key for key in one.keys() | several.keys() if one.get(key) != several.get(key))
    for key in differing:
        print(f"{key} differs")
    print(f"{len(one) - len(differing)} of {len(one)} things identical (tensors, config.json, metadata of files)")
    print(f"perplexity differs by {abs(after / before - 1):.2%}")
    return 1 if differing or abs(after / before - 1) > 0.01 else 0
