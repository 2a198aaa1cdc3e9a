"""Instruction sets that this processor does not have: `check.c` with AVX-512 by SIMDe, and for Arm by QEMU.

Debian has all it takes: libsimde-dev; gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from test_sanitizers import KERNEL, SOURCE, c_compiler

HEADERS = Path(__file__).with_name("emulation")
OPTIONS = ["-O1", "-w", "-std=gnu11", "-pthread", f"-I{KERNEL}"]


def check(compiler: str, folder: Path, *options: str, start: tuple[str, ...] = (), forms: int = 6) -> None:
    program = folder / "check"
    command = [compiler, *OPTIONS, *options, "-o", program, SOURCE, *KERNEL.glob("*.c"), "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([*start, program, str(forms)], capture_output=True, text=True, timeout=240)
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_avx512(tmp_path):
    """No function may be compiled for more than AVX2, and all that there is is said to be there."""
    compiler, empty = c_compiler(), tmp_path / "empty.c"
    empty.write_text("#include <simde/x86/avx512.h>")
    if (
        platform.machine() not in ("x86_64", "AMD64")
        or subprocess.run([compiler, "-E", "-o", "/dev/null", empty], capture_output=True).returncode
    ):
        pytest.skip("SIMDe is not installed, or this is no x86 processor")
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    check(compiler, tmp_path, *avx2, "-isystem", HEADERS, "-Dtarget(x)=unused", "-D__builtin_cpu_supports(x)=1")


def test_arm(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("there is no compiler for Arm, or no QEMU")
    check(compiler, tmp_path, "-static", start=(emulator,), forms=1)
