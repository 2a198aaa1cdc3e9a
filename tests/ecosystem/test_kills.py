"""Three kills at random moments; `benchmarks/check_kills.py --kills 50` is the long version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/check_kills.py"


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one():
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--seed", str(os.getpid())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0 and "3 of 3 identical" in run.stdout, run.stdout + run.stderr
