"""What Windows has not: the module `resource`, folders that can be opened, files that can be removed while mapped."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crvq_hf.resources import device, workfolder
from crvq_hf.resources.workfolder import WorkFolder, flush

WITHOUT = """
import sys
import psutil, transformers.modeling_utils  # on this system they have parts that are not for Windows
sys.modules.update(dict.fromkeys(["resource", "fcntl", "pwd", "grp", "termios"]))  # None: cannot be imported
from crvq_hf.commands.cli import main
import crvq_hf.pipeline.quantize_model
sys.exit(main(["info", sys.argv[1]]))
"""


def test_the_command_line_needs_no_module_that_only_unix_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2 and "holds no model.safetensors" in run.stderr, run.stderr


def test_peak_memory_without_that_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert device.peak_memory_bytes() > 10**7
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=12, peak_wset=123))
    monkeypatch.setattr(device.psutil, "Process", lambda: process)
    assert device.peak_memory_bytes() == 123


@pytest.fixture
def windows(monkeypatch):
    """Opens no folders, and removes no file that is mapped."""
    open_, unlink = os.open, Path.unlink

    def checked_open(path, flags, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *args, **options)

    def checked_unlink(self, missing_ok=False):
        if self.name.startswith("scratch") and self.exists():
            raise PermissionError(32, "The process cannot access the file", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(workfolder.os, "open", checked_open)
    monkeypatch.setattr(Path, "unlink", checked_unlink)


def test_a_work_folder_where_folders_cannot_be_opened(windows, tmp_path):
    with WorkFolder(tmp_path / "work", {"a": 1}) as work:
        work.save("x", {"a": torch.arange(3)}, 1)
        assert work.load("x")[1] == 1
        assert work.scratch((2, 3), torch.float32).shape == (2, 3)
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")
