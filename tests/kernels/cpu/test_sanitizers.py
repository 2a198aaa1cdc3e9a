"""The CPU kernel under the compiler's sanitizers: no data race, no access out of bounds, nothing undefined."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[3] / "kernels/crvq_kernels/cpu"
SOURCE = Path(__file__).with_name("sanitize.c")


def build(folder: Path, sanitizer: str, kernel: Path = KERNEL) -> Path:
    """Returns the program built with a sanitizer; skips the test where that is not possible."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = folder / "sanitize"
    options = ["-O1", "-g", "-std=gnu11", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [compiler, *options, "-o", program]
    (folder / "nothing.c").write_text("int main(void) { return 0; }")
    result = subprocess.run([*command, folder / "nothing.c"], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer: {result.stderr[-300:]}")
    subprocess.run([*command, f"-I{kernel}", SOURCE, *kernel.glob("*.c")], check=True)
    return program


def run(program: Path) -> subprocess.CompletedProcess:
    """Runs it at fixed addresses where that can be had: the thread sanitizer needs them on some systems."""
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, program], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_nothing_is_found(tmp_path, sanitizer):
    result = run(build(tmp_path, sanitizer))
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
    result = run(build(tmp_path, "thread", kernel=tmp_path / "cpu"))
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("the thread sanitizer does not work on this system")
    assert result.returncode != 0 and "data race" in result.stderr
