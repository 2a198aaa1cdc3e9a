"""Virtual environments in which this package is installed as users have it."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
NO_COMPILER = {"CC": "/no/such/compiler"}
# What the package is built from.
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
MODULES = ("crvq_autoload.pth", "crvq_autoload.py", "crvq_import_hooks.py")
FOLDERS = ("crvq_hf", "kernels")
# All else is taken from the environment that runs the tests. Its folders are put on the path as they are, their .pth
# files are not read: an editable install of this package in there is not found.
PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def run(command: list, **options) -> str:
    """Returns what a command prints; it must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_source(folder: Path) -> Path:
    """Copies what the package is built from, so that building leaves nothing in the repository; returns `folder`."""
    folder.mkdir()
    for name in (*FILES, *MODULES):
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    """Builds a wheel from an sdist or a folder into `folder`; returns its path."""
    command = [*PIP, "wheel", "--quiet", "--no-cache-dir", "--no-deps", "--no-build-isolation", "-w", folder, source]
    run(command, env=os.environ | environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment.

    Attributes:
        folder: where it is.
        python: command that runs its Python, which looks at no PYTHONPATH and prints at once.
        site: folder of what is installed in it.
    """

    def __init__(self, folder: Path):
        """Makes one in `folder`, or takes the one that is there."""
        self.folder, self.python = folder, [str(folder / "bin/python"), "-E", "-u"]
        if not folder.exists():
            venv.create(folder, symlinks=True)
        (self.site,) = folder.glob("lib/python3*/site-packages")
        (self.site / "other_packages.pth").write_text("\n".join(PACKAGES))

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        """Runs pip for this environment."""
        run([*PIP, "--python", self.python[0], *arguments], env=os.environ | {"PYTHONPATH": ""} | environment)

    def copy(self, folder: Path) -> "Environment":
        """Returns a copy, to be changed."""
        return Environment(shutil.copytree(self.folder, folder, symlinks=True))

    def run(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Runs Python in `cwd`, a folder without modules if None; all output is in the result's `stdout`."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 250}
        command = [*self.python, *arguments]
        return subprocess.run(command, cwd=cwd or self.folder, env=os.environ | environment, **options)
