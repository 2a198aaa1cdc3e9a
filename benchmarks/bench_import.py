"""What the installed package costs a program that does not use it: a start of Python and imports, with and without it.

    python benchmarks/bench_import.py [--pairs 15]

The package is installed into a folder; processes that read that folder as Python reads site-packages at its start, and
processes that do not, take turns, the environment's own install hidden from both. The reading is part of every time.
Prints medians over the pairs and writes results/import.csv.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_quality import cpu_name

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "import.csv"
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


def without_crvq(folder: Path) -> Path:
    """Fills `folder` with links to all installed packages but ours; returns it."""
    folder.mkdir()
    for path in reversed(sys.path):
        if Path(path).name in ("site-packages", "dist-packages"):
            for entry in Path(path).iterdir():
                if "crvq" not in entry.name:
                    link = folder / entry.name
                    link.unlink(missing_ok=True)
                    link.symlink_to(entry)
    return folder


def install(source: Path, folder: Path) -> Path:
    """Installs the package into `folder`, from a copy in `source`, so that nothing is left here; returns `folder`."""
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(folder), str(source)], check=True)
    return folder


def milliseconds(statement: str, others: Path, ours: list[Path]) -> list[float]:
    """Returns wall and processor time of `statement` in a new process with `others` and, if any, `ours`."""
    program = PROGRAM.format(statement=statement, others=str(others), ours=[str(folder) for folder in ours])
    environment = {**os.environ, "CRVQ_AUTOLOAD": "1"}
    command = [sys.executable, "-E", "-S", "-c", program]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    *times, started, imported = json.loads(printed.splitlines()[-1])
    assert started == bool(ours) and not imported, f"{statement!r}: started {started}, imported {imported}"
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


def main() -> None:
    """Measures all statements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="(default: %(default)s)")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        others = without_crvq(Path(folder, "others"))
        ours = install(Path(folder, "source"), Path(folder, "ours"))
        rows = [compare(statement, pairs, others, ours) for statement in STATEMENTS]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
