"""What the installed package costs a program that does not use it: `import torch` with and without it.

    python benchmarks/bench_import.py [--pairs 15]

The package is installed into a folder; processes with that folder on their path and processes without it take turns,
the environment's own install hidden from both. Prints medians over the pairs and writes results/import.csv.
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

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "import.csv"
STATEMENTS = ("import torch", "import transformers.modeling_utils")
# Times one statement: wall and processor time, in milliseconds.
PROGRAM = """
import json, sys, time
sys.path += {path!r}
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(json.dumps([1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu), "crvq_hf" in sys.modules]))
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


def milliseconds(statement: str, path: list[Path]) -> list[float]:
    """Returns wall and processor time of `statement` in a new process with `path`."""
    program = PROGRAM.format(statement=statement, path=[str(folder) for folder in path])
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", "CRVQ_AUTOLOAD": "1"}
    command = [sys.executable, "-E", "-S", "-c", program]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    *times, imported = json.loads(printed.splitlines()[-1])
    assert not imported, f"crvq_hf was imported by {statement!r}"
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
