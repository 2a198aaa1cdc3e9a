"""Quantizes in one process and in several, and compares every tensor, the perplexity and the time.

    python benchmarks/check_processes.py MODEL --calibration calib.txt --text wiki.test.raw \
        --nsamples 16 --e2e-nsamples 32

MODEL is the folder of a dense model; options it does not know go to `crvq quantize`. Each process has one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from check_kills import contents

CRVQ = ["-m", "crvq_hf"]
WINDOWS, SEQLEN = 10, 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a dense model")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--text", required=True, help="text file, evaluation only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", help="keep the quantized models in this folder")
    args, options = parser.parse_known_args()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(args.keep or folder)
        found = []
        for name, start in (("one", CRVQ), ("several", launcher + CRVQ)):
            out = place / name
            begun = time.perf_counter()
            run(*start, "quantize", args.model, str(out), "--dataset", args.calibration, "--device", "cpu", *options)
            seconds = time.perf_counter() - begun
            evaluation = ["--text", args.text, "--seqlen", str(SEQLEN), "--windows", str(WINDOWS), "--json"]
            measured = run(*CRVQ, "eval", str(out), "--device", "cpu", *evaluation)
            perplexity = json.loads(measured.splitlines()[-1])["value"]
            print(f"{name}: {seconds:.0f} s, perplexity {perplexity:.4f} ({WINDOWS} windows of {SEQLEN})", flush=True)
            found.append((contents(out), perplexity))
    (one, before), (several, after) = found
    differing = sorted(key for key in one.keys() | several.keys() if one.get(key) != several.get(key))
    for key in differing:
        print(f"{key} differs")
    print(f"{len(one) - len(differing)} of {len(one)} things identical (tensors, config.json, metadata of files)")
    print(f"perplexity differs by {abs(after / before - 1):.2%}")
    return 1 if differing or abs(after / before - 1) > 0.01 else 0


def run(*arguments: str) -> str:
    """Returns what a Python process prints, run on one thread; its progress goes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    sys.exit(main())
