"""What comes from the command line, and what is started by it: other processes, an install, modules of the tests."""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .rows import RESULTS, ROOT

WINDOWS, SEQLEN = 10, 2048  # of every perplexity
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command_line(module: str, writes: bool = True) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark; the docstring of its module describes it.

    Args:
        module: `__name__` of the module.
        writes: whether the benchmark writes rows, so that it has the option `--output`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {module.rpartition('.')[2]}",
        description=sys.modules[module].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if writes:
        text = "folder of the csv files (default: benchmarks/results)"
        parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help=text)
    return parser


def add_inputs(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the model and the two texts that quantizing and evaluating take."""
    parser.add_argument("model", nargs=None if required else "?", help="folder of a dense model")
    parser.add_argument("--calibration", required=required, metavar="FILE", help="text file")
    parser.add_argument("--text", required=required, metavar="FILE", help="text file, evaluation only")


def again(name: str, *arguments: str) -> list[str]:
    """Returns the command that runs a benchmark in a process of its own."""
    return [sys.executable, "-m", "benchmarks", name, *arguments]


def python(*arguments: str) -> str:
    """Returns what a Python process prints, run on one thread; its progress goes to the terminal."""
    command, environment = [sys.executable, *arguments], {**os.environ, **ONE_THREAD}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def crvq(*arguments: str) -> str:
    """Returns what a crvq command prints, run on one thread."""
    return python("-m", "crvq_hf", *arguments)


def perplexity(model: str, text: str, device: str = "cpu") -> float:
    """Returns the perplexity of a model on the first windows of a text, by `crvq eval`."""
    windows = ["--seqlen", str(SEQLEN), "--windows", str(WINDOWS)]
    printed = crvq("eval", model, "--text", text, *windows, "--device", device, "--json")
    return json.loads(printed.splitlines()[-1])["value"]


def copy_source(folder: Path) -> Path:
    """Copies what the package is built from to `folder`, so that building leaves nothing here; returns it."""
    ignored = shutil.ignore_patterns(".*", "build", "tests", "__pycache__", "*.so")
    return shutil.copytree(ROOT, folder, ignore=ignored)


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


def from_tests(path: str) -> ModuleType:
    """Returns a module of the tests, given by its path below `tests/` without `.py`."""
    sys.path.append(str((ROOT / "tests" / path).parent))
    return importlib.import_module(Path(path).name)
