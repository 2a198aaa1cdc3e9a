"""`crvq doctor` on what earlier runs left in the cache; and what any command prints where not all can be shown."""

import io
import re
import sys

import pytest
import torch
from crvq_kernels import linear

from crvq_hf.commands import cli, doctor
from crvq_hf.commands.cli import main
from crvq_hf.pipeline import fingerprint
from crvq_hf.resources.workfolder import WorkFolder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with a finished work folder, an unfinished one, and something else."""
    monkeypatch.setattr(fingerprint, "WORK_FOLDERS", tmp_path)
    for name in ("done", "half"):
        with WorkFolder(tmp_path / name, {"name": name}) as work:
            work.save("block", {"a": torch.zeros(250_000)})
            if name == "done":
                work.finish()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    return tmp_path


def test_doctor_lists_work_folders(cache, capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"1\.0 MB, finished: {cache / 'done'}", printed), printed
    assert re.search(rf"1\.0 MB, unfinished: {cache / 'half'}", printed), printed
    assert "crvq doctor --clean removes those that are finished" in printed and "thesis" not in printed


def test_doctor_removes_finished_ones_only(cache, capsys):
    with WorkFolder(cache / "used", {}) as work:
        work.finish()
        assert main(["doctor", "--clean"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"removed: 1\.0 MB, finished: {cache / 'done'}", printed), printed
    assert re.search(rf"left: 1\.0 MB, unfinished: {cache / 'half'}", printed) and ", in use: " in printed
    assert sorted(path.name for path in cache.iterdir()) == ["half", "thesis", "used"]
    assert main(["doctor", "--clean"]) == 0 and "left: " in capsys.readouterr().out


def test_doctor_tries_int8_codebooks(monkeypatch):
    tried = []
    monkeypatch.setattr(doctor, "linear", lambda *args: tried.append(args[2].dtype) or linear(*args))
    assert doctor._relative_error(torch.device("cpu"), 1) < doctor.TOLERANCE and tried == [torch.int8]
    monkeypatch.setattr(doctor, "linear", lambda *args: linear(*args[:2], args[2].flip(1), *args[3:]))
    assert doctor._relative_error(torch.device("cpu"), 1) > doctor.TOLERANCE


def test_doctor_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fingerprint, "WORK_FOLDERS", tmp_path / "nothing")
    assert doctor.listed(tmp_path / "nothing") == ["work folders       none"]
    assert main(["doctor", "--clean"]) == 0
    assert "There are no work folders" in capsys.readouterr().out


def test_a_terminal_that_is_not_utf8_shows_what_it_can(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(cli.COMMANDS["info"], "run", lambda args: print("naïve 日本 \udce9"))
    assert main(["info", "model"]) == 0
    shown.flush()
    assert shown.buffer.getvalue() == b"na?ve ?? ?\n"
