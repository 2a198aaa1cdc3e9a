"""Three kills at random moments; `python -m benchmarks kills --kills 50` is the long version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crvq_hf.resources.workfolder import FINGERPRINT, WorkFolder, is_work_folder, remove_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one():
    command = [sys.executable, "-m", "benchmarks", "kills", "--kills", "3", "--seed", str(os.getpid())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0 and "3 of 3 identical" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("removed", range(4))
def test_a_kill_while_the_work_folder_is_removed(tmp_path, removed, monkeypatch):
    """However far removing came, what is left is known as a work folder, and is removed by the next run."""
    folder = tmp_path / "out.work"
    with WorkFolder(folder, {"a": 1}) as work:
        work.save("precision", {})
        work.save("block_0000", {})
    count = 0

    def unlink(self, original=Path.unlink):
        nonlocal count
        if count == removed:
            raise KeyboardInterrupt
        count += 1
        original(self)

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", unlink)
        try:
            remove_folder(folder, last=FINGERPRINT)
        except KeyboardInterrupt:
            assert is_work_folder(folder)
    remove_folder(folder, last=FINGERPRINT)
    assert not folder.exists()
