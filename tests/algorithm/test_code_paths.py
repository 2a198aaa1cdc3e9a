"""The algorithm's tests once more on other code paths of this machine, as other processors would take them.

Which instructions PyTorch and its matrix library use decides in which order they add, and so the last bits of a sum. A
path that leaves the bits as they are on this machine proves nothing, and is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATHS = {
    "oldest": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
}
TESTS = ["test_search.py", "test_codebook.py", "test_importance.py", "test_fit.py"]
NOT = "not quality_over_all_settings and not what_is_stored"  # long, and the same steps in every one
FINGERPRINT = """
import hashlib, torch
a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
results = a @ b, a @ b[0], a.view(30, 10, 300) @ b[:, :8], (a * b).sum(1), torch.linalg.inv(a[:8, :8])
print(hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest())
"""


def fingerprint(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", FINGERPRINT]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def usual() -> str:
    return fingerprint(dict(os.environ))


@pytest.mark.parametrize("path", ["oldest", pytest.param("AVX2", marks=pytest.mark.slow)])
def test_on_another_code_path(path, usual, tmp_path):
    environment = os.environ | PATHS[path]
    if fingerprint(environment) == usual:
        pytest.skip(f"{PATHS[path]} changes no bit on this machine")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NOT, *TESTS]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
