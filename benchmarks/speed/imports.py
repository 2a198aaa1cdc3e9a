"""What the installed package costs a program that does not use it; writes results/import.csv.

    python -m benchmarks imports [--pairs 15]

The package is installed into a folder; processes with that folder on their path and processes without it take turns,
the environment's own install hidden from both. Prints medians over the pairs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ..common.commands import command_line, copy_source, without_crvq
from ..common.rows import replace

STATEMENTS = ("import torch", "import transformers.modeling_utils")
# Times one statement: wall and processor time, in milliseconds.
PROGRAM = """
import json, sys, time
sys.path += {path!r}
wall, cpu = time.perf_counter(), time.process_time()
{statement}
times = [1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)]
import importlib.util
print(json.dumps([*times, "crvq_hf" in sys.modules, importlib.util.find_spec("crvq_hf") is not None]))
"""


def milliseconds(statement: str, path: list[Path]) -> list[float]:
    """Returns wall and processor time of `statement` in a new process with `path`, the package in the last of several.

    Raises:
        RuntimeError: the package was imported, or is where it should not be, or is not where it should be.
    """
    program = PROGRAM.format(statement=statement, path=[str(folder) for folder in path])
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", "CRVQ_AUTOLOAD": "1"}
    command = [sys.executable, "-E", "-S", "-c", program]
    # In a folder of its own: what lies in the one this was started from could be imported as well.
    options = {"env": environment, "cwd": path[0].parent, "stdout": subprocess.PIPE, "text": True}
    *times, imported, found = json.loads(subprocess.run(command, check=True, **options).stdout.splitlines()[-1])
    if imported or found != (len(path) > 1):
        raise RuntimeError(f"{statement!r}: crvq_hf is imported: {imported}, is installed: {found}, path {path}.")
    return times


def compare(statement: str, pairs: int, others: Path, ours: Path) -> dict[str, str | int]:
    """Returns one row: medians with and without the package, and of the difference within a pair."""
    for path in ([others], [others, ours]):  # files are read into memory once
        milliseconds(statement, path)
    without, with_it = [], []
    for pair in range(pairs):
        turns = [(without, [others]), (with_it, [others, ours])]
        for times, path in turns if pair % 2 else reversed(turns):
            times.append(milliseconds(statement, path))
    row: dict[str, str | int] = {"statement": statement, "pairs": pairs}
    for column, name in enumerate(("wall", "cpu")):
        a, b = [times[column] for times in without], [times[column] for times in with_it]
        difference = [y - x for x, y in zip(a, b, strict=True)]
        low, middle, high = statistics.quantiles(difference, n=4)
        row[f"{name}_without_ms"] = f"{statistics.median(a):.1f}"
        row[f"{name}_with_ms"] = f"{statistics.median(b):.1f}"
        row[f"{name}_difference_ms"] = f"{middle:.1f}"
        row[f"{name}_quartiles_ms"] = f"{low:.1f} to {high:.1f}"
    return row


def main(arguments: list[str]) -> None:
    """Measures all statements."""
    parser = command_line(__name__)
    parser.add_argument("--pairs", type=int, default=15, help="at least 2 (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.pairs < 2:
        parser.error(f"--pairs is {args.pairs}; quartiles need at least 2")
    with tempfile.TemporaryDirectory() as folder:
        others = without_crvq(Path(folder, "others"))
        ours, source = Path(folder, "ours"), copy_source(Path(folder, "source"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", "--target", str(ours), str(source)], check=True)
        rows = [compare(statement, args.pairs, others, ours) for statement in STATEMENTS]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    replace(args.output / "import.csv", rows)
