"""Stored bits and perplexity of other quantizers on the same model, calibration text and evaluation.

    python -m venv peers && . peers/bin/activate
    pip install torch==2.13.0                               # first, and by its exact version
    pip install -c constraints.txt '.[gguf,report]'         # crvq_hf and what it needs
    pip install --no-deps hqq==0.2.8.post1 optimum-quanto==0.2.7 einops termcolor ninja
    pip install --no-deps llama-cpp-python==0.3.36 diskcache typing_extensions    # compiles for some minutes
    pip install --no-deps auto-round==0.16.1 py-cpuinfo && pip install -c constraints.txt datasets pydantic requests
    pip install 'setuptools>=84.2.1,<85'
    BUILD_CUDA_EXT=0 pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    pip install --no-deps pypcre tokenicer logbar defuser device-smi threadpoolctl dill protobuf torchao==0.18.0

    python -m benchmarks peers MODEL --calibration calib.txt --text wiki.test.raw        # all that are missing
    python -m benchmarks peers MODEL --calibration calib.txt --text wiki.test.raw --only "HQQ 2 bit"
    python -m benchmarks peers --plot                                                   # figures/peers.png

`--no-deps` keeps a package whose own list wants another torch from fetching it. MODEL is the folder of a dense Llama
model with tied embeddings. Every row is measured in a process of its own, on one thread, and appended to
results/peers.csv; rows that are there are skipped. A peer that fails is reported and the next one begins.

Bits are the bytes a checkpoint must keep for the quantized layers (codes, scales, zero points, codebooks, orders),
over their weights; all peers and `crvq quantize` quantize the same layers, and everything else stays in fp32.
Perplexity is that of the dense model with the dequantized weights put in, in fp32, by `crvq_hf.evaluation`. CPU
seconds are those of the whole process up to the dequantized weights, imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..common.commands import ONE_THREAD, SEQLEN, WINDOWS, add_inputs, again, command_line
from ..common.rows import append, commit, cpu_name, pictures, read, versions
from .perplexity import cpu_seconds

LLAMA_CPP = ("llama-cpp-python", "gguf")

HQQ = [(1, 128), (1, 64), (1, 16), (2, 64), (2, 16), (3, 64), (4, 64)]  # bits and group size

# name of a row: function of peer_methods, its arguments, packages whose versions matter
PEERS: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    **{f"HQQ {bits} bit, groups of {group}": ("hqq", {"bits": bits, "group": group}, ("hqq",)) for bits, group in HQQ},
    "quanto int2": ("quanto", {"bits": 2}, ("optimum-quanto",)),
    "quanto int4": ("quanto", {"bits": 4}, ("optimum-quanto",)),
    **{
        f"llama.cpp {kind}": ("llama_cpp", {"kind": kind}, LLAMA_CPP)
        for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "Q3_K_M")
    },
    "GPTQ 2 bit, groups of 64": ("gptq", {"bits": 2, "group": 64}, ("gptqmodel",)),
    "GPTQ 3 bit, groups of 64": ("gptq", {"bits": 3, "group": 64}, ("gptqmodel",)),
    "AutoRound 2 bit, groups of 64": (
        "auto_round",
        {"bits": 2, "group": 64, "iters": 50, "batch": 2},
        ("auto-round", "gptqmodel"),
    ),
}


def main(arguments: list[str]) -> None:
    """Measures what the command line asks for."""
    parser = command_line(__name__)
    add_inputs(parser, required=False)
    parser.add_argument("--only", help="names of rows that begin with this", default="")
    parser.add_argument("--work", metavar="DIR", help="keep checkpoints and the importance matrix in this folder")
    parser.add_argument("--plot", action="store_true", help="draw figures/peers.png from the results and leave")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args(arguments)
    results = args.output / "peers.csv"
    if args.plot:
        from .peer_figure import draw

        draw(pictures(args.output) / "peers.png", read(results), read(args.output / "quality.csv"))
        return
    if not (args.model and args.calibration and args.text):
        parser.error("MODEL, --calibration and --text are needed, or --plot.")
    if args.row:
        append(results, [measure(args.row, args.model, args.calibration, args.text, Path(args.work))])
        return
    names = [name for name in PEERS if name.startswith(args.only)]
    if not names:
        parser.error(f"No row begins with {args.only!r}; there are: {'; '.join(PEERS)}.")
    done = {row["name"] for row in read(results)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(args.work or folder)
        work.mkdir(parents=True, exist_ok=True)
        failed = [name for name in names if name not in done and not run(name, arguments, work)]
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}")


def run(name: str, arguments: list[str], work: Path) -> bool:
    """Measures one row in a process of its own and returns whether that went well."""
    workers = {"GPTQMODEL_CPU_WORKERS": "2"}  # it demands two, but makes only one itself where there are few cores
    command = again("peers", *arguments, "--work", str(work), "--row", name)
    return not subprocess.run(command, env={**os.environ, **ONE_THREAD, **workers}).returncode


def measure(name: str, model_folder: str, calibration: str, text: str, work: Path) -> dict[str, object]:
    """Quantizes and evaluates; prints the row and returns it."""
    import torch
    from transformers import AutoTokenizer

    from crvq_hf.evaluation.perplexity import perplexity, read_text_tokens

    from . import peer_methods

    method, arguments, packages = PEERS[name]
    shared = peer_methods.Work(model_folder, calibration, work)
    result = getattr(peer_methods, method)(shared, **arguments)
    seconds = time.process_time() + cpu_seconds() + result.earlier_seconds
    model = shared.dense()
    layers = peer_methods.block_linears(model)
    assert layers.keys() == result.weights.keys(), "a method must return every layer and no other"
    with torch.no_grad():
        for layer_name, layer in layers.items():
            layer.weight.copy_(result.weights[layer_name])
    tokens = read_text_tokens(AutoTokenizer.from_pretrained(model_folder), text)
    found = versions(*packages, "transformers", "torch")
    row = {
        "name": name,
        "bits_per_weight": round(8 * result.stored_bytes / sum(layer.weight.numel() for layer in layers.values()), 4),
        "perplexity": float(f"{perplexity(model, tokens, SEQLEN, WINDOWS).value:.5g}"),
        "cpu_seconds": round(seconds),
        "options": result.note,
        "versions": ", ".join(f"{package} {number}" for package, number in found.items()),
        "commit": commit(),
        "cpu": cpu_name(),
    }
    print(json.dumps(row))
    return row
