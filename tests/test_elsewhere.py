"""The tests of the kernels and of the algorithm once more, in other global states of PyTorch (`elsewhere.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SUITES = ("kernels/test_reference.py", "kernels/test_packing.py", "kernels/test_ops.py", "kernels/cpu/test_cpu.py")
SUITES += ("kernels/cpu/test_address.py", "kernels/test_code_search.py", "modeling/test_linear.py", "algorithm")
LEFT_OUT = {
    "need gradients": ("gradient", "compiles_into_one_graph", "test_float64", "changed_in_place"),
    "start processes of their own": ("importing", "test_code_paths", "forked"),
    "take long, and not because of allocations": ("opcheck", "threads", "little_endian", "rounding"),
}


@pytest.mark.parametrize(
    ("dtype", "grad"),
    [("bfloat16", "no_grad"), pytest.param("float64", "inference_mode", marks=pytest.mark.slow)],
)
def test_suites_pass_under(dtype, grad):
    left_out = " or ".join(name for names in LEFT_OUT.values() for name in names)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "elsewhere", "-p", "no:cacheprovider", *SUITES]
    result = subprocess.run(
        [*command, "-k", f"not ({left_out})"],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS), "CRVQ_DEFAULT_DTYPE": dtype, "CRVQ_GRAD": grad},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and " failed" not in result.stdout


def test_a_forgotten_dtype_is_seen(tmp_path):
    """What a test allocates stays float32, what other code does follows the default."""
    (tmp_path / "other.py").write_text("import torch\n\n\ndef allocate():\n    return torch.empty(3)\n")
    code = "import elsewhere, torch, other; elsewhere.pytest_configure(); print(other.allocate().dtype)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{tmp_path}", "CRVQ_DEFAULT_DTYPE": "float64"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "torch.float64"
