"""The CPU kernel under the compiler's sanitizers: no data race, no access out of bounds, nothing undefined.

It is called from C, alone, and from Python, in memory that PyTorch allocates: that shows what the binding hands over.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[3] / "kernels/crvq_kernels/cpu"
SOURCE, CALLS = Path(__file__).with_name("check.c"), Path(__file__).with_name("sanitize.py")


def c_compiler() -> str:
    """Returns the C compiler; skips the test where there is none."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    return compiler


def build(folder: Path, sanitizer: str, kernel: Path = KERNEL, library: bool = False) -> Path:
    """Returns the program, or the library alone, built with a sanitizer; skips the test where that is not possible."""
    compiler = c_compiler()
    target = folder / ("libcrvq_cpu.so" if library else "sanitize")
    options = ["-O1", "-g", "-std=gnu11", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [compiler, *options, *(["-shared", "-fPIC"] if library else []), "-o", target]
    (folder / "nothing.c").write_text("int main(void) { return 0; }")
    result = subprocess.run([*command, folder / "nothing.c"], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer: {result.stderr[-300:]}")
    subprocess.run([*command, f"-I{kernel}", *([] if library else [SOURCE]), *kernel.glob("*.c"), "-lm"], check=True)
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs it at fixed addresses where that can be had: the thread sanitizer needs them on some systems."""
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, program, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("sanitizer", "forms"), [("thread", "1"), ("address,undefined", "3")])
def test_nothing_is_found(tmp_path, sanitizer, forms):
    result = run(build(tmp_path, sanitizer), forms)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("the thread sanitizer does not work on this system")
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-3000:]


def test_a_race_is_found(tmp_path):
    """The thread sanitizer sees it when threads add to the same sums without waiting for each other."""
    shutil.copytree(KERNEL, tmp_path / "cpu")
    file = tmp_path / "cpu/call.c"
    text = file.read_text()
    wait = "memory_order_acquire) < l->threads; spins++) relax(spins);"
    assert text.count(wait) == 1
    file.write_text(text.replace(wait, "memory_order_acquire) < 0; spins++) relax(spins);"))
    result = run(build(tmp_path, "thread", kernel=tmp_path / "cpu"), "1")
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("the thread sanitizer does not work on this system")
    assert result.returncode != 0 and "data race" in result.stderr


def test_calls_from_python(tmp_path):
    """Whatever Python allocates is as large as C takes it to be; in the end it is not, and that is seen."""
    command = [c_compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer as a library of its own")
    library = build(tmp_path, "address", library=True)
    # Python and PyTorch keep what they have allocated until the end: no leaks are looked for.
    result = subprocess.run(
        [sys.executable, CALLS, library],
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.stdout.strip() == "done", result.stderr[-3000:]
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, result.stderr[-3000:]
