"""Finds a benchmark and runs it: `python -m benchmarks NAME [options]`, from the root of the repository."""

import ast
import importlib
import sys
from pathlib import Path

USAGE = "usage: python -m benchmarks NAME [options]\n\nNAME --help has the options."
# The folders and, by name, the scripts in them: each has `main(arguments)`, which returns the exit code or None for 0.
SCRIPTS = {
    "quality": ("embeddings", "inputs", "perplexity", "peers", "studies"),
    "speed": (
        "cpu",
        "cpu_model",
        "gpu",
        "gpu_head",
        "gpu_search",
        "gpu_tiles",
        "head",
        "imports",
        "memory",
        "plan",
        "vllm",
    ),
    "checks": ("corruption", "ecosystem", "kills", "processes"),
}
FOLDERS = {name: folder for folder, names in SCRIPTS.items() for name in names}


def main(arguments: list[str]) -> int | None:
    """Runs the benchmark that is named first with the other arguments."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(listing())
        return 0
    if name not in FOLDERS:
        print(f"There is no benchmark {name!r}; there are {', '.join(FOLDERS)}.", file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{FOLDERS[name]}.{name}").main(options)


def listing() -> str:
    """Returns a line for each benchmark; none of them is imported for it."""
    lines = [USAGE]
    for folder, names in SCRIPTS.items():
        lines += ["", f"{folder}: {first_line(f'{folder}/__init__.py')}"]
        lines += [f"  {name:12}{first_line(f'{folder}/{name}.py')}" for name in names]
    return "\n".join(lines)


def first_line(file: str) -> str:
    """Returns the first line of a file's docstring."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
