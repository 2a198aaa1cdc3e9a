"""Stands in for `nvrtc`: compiles CUDA C++ for the CPU with `emulator.h`, and runs it there."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILER = shutil.which("g++") or shutil.which("c++")
SHARED_BYTES = 227 * 1024  # of an H100


class Kernel:
    """A kernel on the CPU, with the interface of `nvrtc.Kernel`."""

    def __init__(self, function, programs: int):
        self._function, self._programs = function, programs
        function.restype = ctypes.c_char_p

    def programs(self, threads: int, shared_bytes: int) -> int:
        return self._programs

    def launch(self, grid, threads, shared_bytes, arguments, stream, dependent=False):
        problem = self._function(*grid, threads, shared_bytes, ctypes.byref(arguments))
        assert problem is None, problem.decode()


def load(path: Path, macros: tuple[tuple[str, int], ...], names: tuple[str, ...], programs: int) -> tuple[Kernel, ...]:
    """Compiles a file for the CPU and returns its functions `names`.

    Args:
        programs: how many of them a processor is to run at the same time.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
        defined = [f"-D{name}={value}" for name, value in macros]
        files = ["-x", "c++", Path(__file__).with_name("emulator.h"), "-o", library]
        subprocess.run([COMPILER, *options, *defined, f'-DKERNELS="{path}"', *files], check=True)
        loaded = ctypes.CDLL(str(library))
    return tuple(Kernel(getattr(loaded, f"emulate_{name}"), programs) for name in names)
