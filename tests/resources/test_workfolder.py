"""The work folder: complete files or none, one run, one process, words for everything else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from filelock import FileLock, Timeout

from crvq_hf.resources import workfolder
from crvq_hf.resources.workfolder import WorkFolder

pytestmark = pytest.mark.usefixtures("precision", "quiet")

PRINT = {"model": "Tiny", "seed": 0, "dataset": None, "modules": ["a", "b"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "work"


def files(path) -> set[str]:
    return {p.name for p in path.iterdir()} - {".lock"}


def test_what_is_saved_comes_back(path):
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "b": torch.randint(256, (5,), dtype=torch.uint8),
        "c": torch.tensor(7.0),
        "d": torch.randn(2, requires_grad=True),
        "e": torch.randn(4).bfloat16(),
        "f": torch.zeros(0, 3),
    }
    note = {"loss": [0.1, 1 / 3, 1e-300], "step": 4, "name": "ä"}
    with WorkFolder(path, PRINT) as work:
        assert work.load("block") is None
        work.save("block", tensors, note)
    with WorkFolder(path, PRINT) as work:
        found, found_note = work.load("block")
    assert found_note == note and found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_nothing_but_a_note(path):
    with WorkFolder(path, PRINT) as work:
        work.save("precision", {}, {"bfloat16": True})
        work.save("empty", {})
        assert work.load("precision") == ({}, {"bfloat16": True})
        assert work.load("empty") == ({}, None)


def test_the_last_save_counts(path):
    with WorkFolder(path, PRINT) as work:
        work.save("x", {"a": torch.zeros(2)}, 1)
        work.save("x", {"b": torch.ones(3)}, 2)
        tensors, note = work.load("x")
    assert note == 2 and tensors.keys() == {"b"}
    assert files(path) == {"fingerprint.json", "x.safetensors"}


def fail_while_writing(monkeypatch, error: BaseException) -> None:
    def save_file(tensors, file, metadata):
        file.write_bytes(b"half of")
        raise error

    monkeypatch.setattr(workfolder, "save_file", save_file)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "^C"])
def test_a_failed_save_leaves_what_was_there(path, monkeypatch, error):
    with WorkFolder(path, PRINT) as work:
        work.save("x", {"a": torch.arange(3)}, 1)
        fail_while_writing(monkeypatch, error)
        for name in ("x", "y"):
            with pytest.raises(type(error)):
                work.save(name, {"a": torch.zeros(3)}, 2)
        assert files(path) == {"fingerprint.json", "x.safetensors"}
        tensors, note = work.load("x")
        assert note == 1 and tensors["a"].tolist() == [0, 1, 2]
        assert work.load("y") is None


def test_a_half_written_file_of_a_killed_run_does_not_count(path):
    with WorkFolder(path, PRINT):
        (path / "x.tmp").write_bytes(b"half of")
    with WorkFolder(path, PRINT) as work:
        assert work.load("x") is None
        work.save("x", {"a": torch.ones(3)})
        assert work.load("x")[0]["a"].tolist() == [1, 1, 1]
    assert files(path) == {"fingerprint.json", "x.safetensors"}


def test_a_kill_before_the_fingerprint_leaves_a_folder_that_can_be_used(path):
    path.mkdir(parents=True)
    (path / ".lock").touch()
    (path / "fingerprint.tmp").write_text("{")
    with WorkFolder(path, PRINT) as work:
        work.save("x", {})
    with WorkFolder(path, PRINT):
        pass


def test_another_fingerprint_is_refused_by_name(path):
    with WorkFolder(path, PRINT):
        pass
    other = PRINT | {"seed": 1, "modules": ["a"], "more": 3}
    with pytest.raises(ValueError) as caught:
        WorkFolder(path, other)
    message = str(caught.value)
    assert "belongs to another run" in message and "delete the folder to start anew" in message
    assert "seed: 0 then, 1 now" in message and "modules: ['a', 'b'] then, ['a'] now" in message
    assert "more: None then, 3 now" in message
    assert "model" not in message and "dataset" not in message and "\n" not in message
    with WorkFolder(path, PRINT):  # being refused neither locks nor changes anything
        pass


def test_a_fingerprint_is_what_json_makes_of_it(path):
    with WorkFolder(path, {"modules": ("a", "b"), "ratio": 0.02}):
        pass
    with WorkFolder(path, {"ratio": 0.02, "modules": ["a", "b"]}):
        pass


def test_a_long_value_does_not_flood_the_message(path):
    with WorkFolder(path, {"names": ["x" * 50] * 100}):
        pass
    with pytest.raises(ValueError) as caught:
        WorkFolder(path, {"names": ["y" * 50] * 100})
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_foreign_folder_is_refused_and_left_alone(path):
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not a work folder; name another with work_dir"):
        WorkFolder(path, PRINT)
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file; name another with work_dir"):
        WorkFolder(file, PRINT)


def test_an_empty_folder_is_taken(tmp_path):
    with WorkFolder(tmp_path, PRINT) as work:
        work.save("x", {})
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == PRINT


def test_two_at_a_time_are_refused(path):
    with WorkFolder(path, PRINT):
        with pytest.raises(ValueError, match="is in use by another process; wait or name another"):
            WorkFolder(path, PRINT)
    with WorkFolder(path, PRINT):
        pass


def test_the_lock_holds_between_processes(path):
    path.mkdir(parents=True)
    script = (
        "import sys; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(timeout=0); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another process"):
            WorkFolder(path, PRINT)
        other.kill()
    with WorkFolder(path, PRINT):
        with pytest.raises(Timeout):
            FileLock(path / ".lock").acquire(timeout=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_file_is_named(path, damage):
    with WorkFolder(path, PRINT) as work:
        work.save("block_0003", {"a": torch.randn(64, 64)}, {"b": 1})
        file = path / "block_0003.safetensors"
        content = file.read_bytes()
        file.write_bytes({"truncated": content[:5000], "empty": b"", "garbage": os.urandom(3000)}[damage])
        with pytest.raises(ValueError, match=r"block_0003\.safetensors is damaged .*delete it"):
            work.load("block_0003")


@pytest.mark.parametrize("content", ["", '{"model": "Ti'], ids=["empty", "truncated"])
def test_a_damaged_fingerprint_is_named(path, content):
    with WorkFolder(path, PRINT):
        pass
    (path / "fingerprint.json").write_text(content)
    with pytest.raises(ValueError, match=r"fingerprint\.json"):
        WorkFolder(path, PRINT)
    with pytest.raises(ValueError, match=r"fingerprint\.json"):  # not: in use
        WorkFolder(path, PRINT)


def test_scratch_lives_on_the_disk_and_leaves_nothing(path):
    with WorkFolder(path, PRINT) as work:
        one, two = (work.scratch((3, 4, 5), torch.bfloat16) for _ in range(2))
        one.fill_(1.0)
        assert one.shape == (3, 4, 5) and one.dtype == torch.bfloat16
        assert not two.any() and one.all()  # each has a file of its own
        assert files(path) == {"fingerprint.json"}
        with pytest.raises(ValueError, match=r"do not fit on the disk .*lower e2e_nsamples or seqlen"):
            work.scratch((1 << 60,), torch.float32)


# Where it is, and for how long


def test_a_folder_that_cannot_be_written_in_is_told_before_the_work(path, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(workfolder.Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"cannot be written in \(Permission denied\); name a folder elsewhere"):
        WorkFolder(path, PRINT)


def test_processes_that_do_not_work_together_are_told_how(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with WorkFolder(path, PRINT):
        with pytest.raises(ValueError, match=r"2 were started, .* put `with crvq_hf\.together\(\):` around"):
            WorkFolder(path, PRINT)


def test_what_is_finished_is_known(path):
    with WorkFolder(path, PRINT) as work:
        work.save("block", {"a": torch.zeros(1000)})
        assert workfolder.state_of(path) == "in use" and work.nbytes() > 4000
    assert workfolder.state_of(path) == "unfinished" and workfolder.work_folders(path.parent) == [path]
    with WorkFolder(path, PRINT) as work:
        work.finish()
    assert workfolder.state_of(path) == "finished"
    assert workfolder.work_folders(path / "nothing") == []
