r"""Perplexity, stored bits and time of one `crvq quantize` run; appends a row to results/quality.csv.

    python -m benchmarks perplexity MODEL --calibration calib.txt --text wiki.test.raw --name "block" \
        --nsamples 64 --e2e-finetune-epochs 0

MODEL is the folder of a dense model; options it does not know go to `crvq quantize`. Quantizing and evaluating are
processes of their own, on one thread, so that CPU seconds can be compared between machines with different cores.
Where there is a GPU they run on it, unless `--device cpu` is given, and the row goes to results/gpu_quality.csv.
"""

import json
import resource
import tempfile
import time
from pathlib import Path

from ..common.commands import WINDOWS, add_inputs, command_line, crvq, perplexity
from ..common.rows import append, commit, cpu_name, gpu_name, versions


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the command line describes."""
    parser = command_line(__name__)
    add_inputs(parser)
    parser.add_argument("--name", required=True, help="what the row is called")
    parser.add_argument("--keep", metavar="DIR", help="keep the quantized model in this folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda if present, else cpu")
    args, options = parser.parse_known_args(arguments)
    gpu = gpu_name() if args.device != "cpu" else None
    if args.device == "cuda" and not gpu:
        parser.error("there is no GPU to use; leave --device out")
    device = "cuda" if gpu else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = args.keep or f"{folder}/quantized"
        row = {
            "name": args.name,
            **quantize_and_evaluate(args.model, out, args.text, ["--dataset", args.calibration, *options], device),
            "windows": WINDOWS,
            "options": " ".join(options),
            "commit": commit(),
            **({"gpu": gpu} if gpu else {"cpu": cpu_name()}),
            **versions("torch", "transformers"),
        }
    print(json.dumps(row))
    append(args.output / ("gpu_quality.csv" if gpu else "quality.csv"), [row])


def quantize_and_evaluate(
    model: str, out: str, text: str, options: list[str], device: str = "cpu"
) -> dict[str, float]:
    """Returns perplexity, stored bits, seconds and memory of one `crvq quantize` run with some options.

    Seconds are of the CPU, or on the clock where a GPU does the work.
    """
    clock, unit = (cpu_seconds, "cpu_seconds") if device == "cpu" else (time.monotonic, "seconds")
    before = clock()
    crvq("quantize", model, out, "--device", device, *options)
    seconds = clock() - before
    report = json.loads((Path(out) / "report.json").read_text())
    return {
        "perplexity": round(perplexity(out, text, device), 2),
        "bits_per_weight": round(report["bits_per_weight"], 4),
        unit: round(seconds),
        "peak_memory_mb": round(report["peak_memory_bytes"] / 1e6),
        "activation_mb": round(report["activation_bytes"] / 1e6),
    }


def cpu_seconds() -> float:
    """Returns the user and system time of all processes started so far that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
