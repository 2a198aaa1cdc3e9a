"""What the installed package costs a program that does not use it, a start of Python too; writes results/import.csv.

    python -m benchmarks imports [--pairs 15]

The package is installed into a folder; processes that read that folder as Python reads site-packages at its start, and
processes that do not, take turns, the environment's own install hidden from both. The reading is part of every time.
Prints medians over the pairs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ..common.commands import command_line, copy_source, without_crvq
from ..common.rows import cpu_name, replace

STATEMENTS = ("pass", "import torch", "import transformers.modeling_utils")
# Times one statement: wall and processor time, in milliseconds.
PROGRAM = """
import json, site, sys, time
sys.path.append({others!r})
wall, cpu = time.perf_counter(), time.process_time()
for folder in {ours!r}:
    site.addsitedir(folder)
{statement}
times = [1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)]
print(json.dumps([*times, "crvq_autoload" in sys.modules, "crvq_hf" in sys.modules]))
"""


def milliseconds(statement: str, others: Path, ours: list[Path]) -> list[float]:
    """Returns wall and processor time of `statement` in a new process with `others` and, if any, `ours`.

    Raises:
        RuntimeError: what a start of Python is to load was not loaded, or more was.
    """
    program = PROGRAM.format(statement=statement, others=str(others), ours=[str(folder) for folder in ours])
    environment = {**os.environ, "CRVQ_AUTOLOAD": "1"}
    command = [sys.executable, "-E", "-S", "-c", program]
    # In a folder of its own: what lies in the one this was started from could be imported as well.
    options = {"env": environment, "cwd": others.parent, "stdout": subprocess.PIPE, "text": True}
    *times, started, imported = json.loads(subprocess.run(command, check=True, **options).stdout.splitlines()[-1])
    if imported or started != bool(ours):
        raise RuntimeError(f"{statement!r}: crvq_autoload is loaded: {started}, crvq_hf is: {imported}, with {ours}.")
    return times


def compare(statement: str, pairs: int, others: Path, ours: Path) -> dict[str, str | int]:
    """Returns one row: medians with and without the package, and of the difference within a pair."""
    for installed in ([], [ours]):  # files are read into memory once
        milliseconds(statement, others, installed)
    without, with_it = [], []
    for pair in range(pairs):
        turns = [(without, []), (with_it, [ours])]
        for times, installed in turns if pair % 2 else reversed(turns):
            times.append(milliseconds(statement, others, installed))
    row: dict[str, str | int] = {"statement": statement, "pairs": pairs, "cpu": cpu_name()}
    for column, name in enumerate(("wall", "cpu")):
        a, b = [times[column] for times in without], [times[column] for times in with_it]
        difference = [y - x for x, y in zip(a, b, strict=True)]
        low, middle, high = statistics.quantiles(difference, n=4)
        row[f"{name}_without_ms"] = f"{statistics.median(a):.2f}"
        row[f"{name}_with_ms"] = f"{statistics.median(b):.2f}"
        row[f"{name}_difference_ms"] = f"{middle:.2f}"
        row[f"{name}_quartiles_ms"] = f"{low:.2f} to {high:.2f}"
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
