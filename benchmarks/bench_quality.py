"""Perplexity, stored bits and time of one `crvq quantize` run; appends a row to results/quality.csv.

    python benchmarks/bench_quality.py MODEL --calibration calib.txt --text wiki.test.raw --name "block" \
        --nsamples 64 --e2e-finetune-epochs 0

MODEL is the folder of a dense model; options it does not know go to `crvq quantize`. Quantizing and evaluating are
processes of their own, on one thread, so that CPU seconds can be compared between machines with different cores.
Where there is a GPU they run on it, unless `--device cpu` is given, and the row goes to results/gpu_quality.csv.
"""

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
WINDOWS, SEQLEN = 10, 2048


def main() -> None:
    """Runs the benchmark that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a dense model")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--text", required=True, help="text file, evaluation only")
    parser.add_argument("--name", required=True, help="what the row is called")
    parser.add_argument("--keep", help="keep the quantized model in this folder")
    parser.add_argument("--device", help="cuda or cpu; cuda if present, else cpu")
    args, options = parser.parse_known_args()
    gpu = gpu_name() if args.device != "cpu" else None
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
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
    append(RESULTS / ("gpu_quality.csv" if gpu else "quality.csv"), row)
    print(json.dumps(row))


def quantize_and_evaluate(
    model: str, out: str, text: str, options: list[str], device: str = "cpu"
) -> dict[str, float]:
    """Returns perplexity, stored bits, seconds and memory of one `crvq quantize` run with some options.

    Seconds are of the CPU, or on the clock where a GPU does the work.
    """
    clock, unit = (cpu_seconds, "cpu_seconds") if device == "cpu" else (time.monotonic, "seconds")
    before = clock()
    run("quantize", model, out, "--device", device, *options)
    seconds = clock() - before
    report = json.loads((Path(out) / "report.json").read_text())
    return {
        "perplexity": perplexity(out, text, device),
        "bits_per_weight": round(report["bits_per_weight"], 4),
        unit: round(seconds),
        "peak_memory_mb": round(report["peak_memory_bytes"] / 1e6),
        "activation_mb": round(report["activation_bytes"] / 1e6),
    }


def perplexity(model: str, text: str, device: str = "cpu") -> float:
    """Returns the perplexity of a model on the first windows of a text."""
    options = ["--text", text, "--seqlen", str(SEQLEN), "--windows", str(WINDOWS), "--device", device, "--json"]
    measured = run("eval", model, *options)
    return round(json.loads(measured.splitlines()[-1])["value"], 2)


def cpu_seconds() -> float:
    """Returns the user and system time of all processes started so far that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(*arguments: str) -> str:
    """Returns what a crvq command prints, run on one thread; its progress goes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "crvq_hf", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def commit() -> str:
    """Returns the short commit the code is at, with a + if it was changed since."""
    described = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def gpu_name() -> str | None:
    """Returns the name of the GPU that would be used, None if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_name() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def append(results: Path, row: dict[str, object]) -> None:
    """Appends a row to a CSV file, with a header if it is new."""
    results.parent.mkdir(exist_ok=True)
    is_new = not results.exists()
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
