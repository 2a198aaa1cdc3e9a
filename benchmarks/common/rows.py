"""Rows: what they say of the code and the machine, the CSV files they lie in, and tables of them."""

import csv
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parents[1]
ROOT, RESULTS, FIGURES = FOLDER.parent, FOLDER / "results", FOLDER / "figures"


def commit() -> str:
    """Returns the short commit the code is at, with a + if it was changed since; what benchmarks write is no code."""
    code = ["--", ".", *(f":!{folder.relative_to(ROOT)}" for folder in (RESULTS, FIGURES))]
    at = _git("rev-parse", "--short", "HEAD")
    return at + ("+" if _git("status", "--porcelain", "--untracked-files=no", *code) else "") if at else "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def gpu_name() -> str | None:
    """Returns the name of the GPU that would be used, None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of packages by name, "" for one that is not installed."""
    found = dict.fromkeys(packages, "")
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict]) -> None:
    """Appends rows to a CSV file, with a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is not None and header != list(rows[0]):
            raise ValueError(f"{path} has the columns {header}, the rows {list(rows[0])}; choose another --output.")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerows(rows)


def pictures(output: Path) -> Path:
    """Returns the folder for pictures of the rows in `output`: those of other rows leave the committed ones alone."""
    return FIGURES if output == RESULTS else output


def replace(path: Path, rows: list[dict]) -> None:
    """Writes rows to a CSV file that has no others."""
    path.unlink(missing_ok=True)
    append(path, rows)


def markdown(rows: list[dict]) -> str:
    """Returns rows as a markdown table."""
    cells = [["" if value is None else f"{value}" for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def aligned(lines: Iterable[list[str]]) -> str:
    """Returns lines of cells as a table whose columns end below each other."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
