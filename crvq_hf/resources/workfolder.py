"""The work folder: what a run has finished, on disk, so that a killed run continues where it was."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import distributed

FINGERPRINT = "fingerprint.json"
FINISHED = "finished"  # saved under this name when there is nothing left to do


class WorkFolder:
    """Named sets of tensors with a JSON-able note each, all belonging to one fingerprint.

    Every file is written under a temporary name, flushed and renamed, so a file that is there is complete. One run at
    a time may use a folder; use it as a context manager. Of several processes of a run the first writes, all read, and
    all must call the same methods in the same order.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: dict[str, Any]):
        """Opens or creates the folder.

        Args:
            path: the folder.
            fingerprint: JSON-able values by name; everything the result depends on.

        Raises:
            ValueError: the folder belongs to a run with another fingerprint, holds something else, is in use, or
                cannot be written in.
        """
        self.path = Path(path)
        self._lock = FileLock(self.path / ".lock")
        distributed.first(lambda: self._open(json.loads(json.dumps(fingerprint))))

    def _open(self, fingerprint: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The work folder {self.path} is a file; name another with work_dir.")
        if self.path.is_dir() and not (self.path / FINGERPRINT).exists():
            if any(p.name != ".lock" and not p.name.endswith(".tmp") for p in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and not a work folder; name another with work_dir.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(_in_use(self.path)) from None
        except OSError as error:
            raise ValueError(
                f"The work folder {self.path} cannot be written in ({error.strerror}); name a folder elsewhere with "
                "work_dir."
            ) from error
        try:
            self._compare(fingerprint)
        except BaseException:
            self._lock.release()
            raise

    def _compare(self, fingerprint: dict[str, Any]) -> None:
        file = self.path / FINGERPRINT
        if not file.exists():
            content = json.dumps(fingerprint, indent=1).encode()
            self._write(file, lambda temporary: temporary.write_bytes(content))
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); delete {self.path} to start anew.") from error
        differing = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
        if differing:
            changes = "; ".join(f"{k}: {found.get(k)!r:.60} then, {fingerprint.get(k)!r:.60} now" for k in differing)
            raise ValueError(
                f"The work folder {self.path} belongs to another run ({changes}); "
                "repeat that run's settings to continue it, or delete the folder to start anew."
            )

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def save(self, name: str, tensors: dict[str, Tensor], note: Any = None) -> None:
        """Writes `tensors` and a JSON-able note under `name`, replacing what was there."""
        distributed.first(lambda: self._save(name, tensors, note))

    def _save(self, name: str, tensors: dict[str, Tensor], note: Any) -> None:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"note": json.dumps(note)}
        self._write(self._file(name), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def has(self, name: str) -> bool:
        """Returns whether something is saved under `name`."""
        return distributed.first(lambda: self._file(name).exists())

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns the tensors and the note saved under `name`, None if there are none.

        Raises:
            ValueError: the file is damaged.
        """
        file = self._file(name)
        if not self.has(name):
            return None
        try:
            with safe_open(file, "pt") as opened:
                note = json.loads(opened.metadata()["note"])
            return load_file(file), note
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to compute it again.") from error

    def finish(self) -> None:
        """Notes that there is nothing left to do: whoever clears up may remove the folder."""
        self.save(FINISHED, {})

    def nbytes(self) -> int:
        """Returns how much the folder takes of the disk."""
        return folder_bytes(self.path)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of zeros that lives in a file of this folder instead of in memory.

        The file goes with the tensor, or with the process, however it ends.

        Raises:
            ValueError: there is no room on the disk.
        """
        size, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(self.path).free
        if size > free:
            raise ValueError(
                f"{size / 1e9:.1f} GB of activations do not fit on the disk of {self.path}, {free / 1e9:.1f} GB are "
                "free; lower e2e_nsamples or seqlen, or name a folder elsewhere with work_dir."
            )
        temporary = self.path / f"scratch{distributed.rank()}.tmp"
        temporary.unlink(missing_ok=True)
        tensor = torch.from_file(str(temporary), shared=True, size=math.prod(shape), dtype=dtype)
        with contextlib.suppress(PermissionError):  # Windows, which keeps what is mapped
            temporary.unlink()  # what is mapped stays until it is let go
        return tensor.view(shape)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _write(self, file: Path, write: Callable[[Path], Any]) -> None:
        """Makes `file` by a function that writes a path: whole and on the disk, or not at all.

        Raises:
            OSError: the disk is full or broken.
        """
        temporary = file.with_suffix(".tmp")
        try:
            write(temporary)
            flush(temporary)
            os.replace(temporary, file)
            flush(self.path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if is_full_disk(error):
                raise OSError(
                    errno.ENOSPC,
                    f"The disk is full: {file} could not be written; free some space and run the same again, "
                    "what is finished is kept",
                ) from error
            raise


def _in_use(path: Path) -> str:
    """Returns a sentence on a work folder that another process has, which may be one of this run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.world_size() == 1:
        return (
            f"The work folder {path} is in use by another process: {os.environ['WORLD_SIZE']} were started, but they "
            "do not work together; put `with crvq_hf.together():` around what quantizes."
        )
    return f"The work folder {path} is in use by another process; wait or name another."


def work_folders(parent: Path) -> list[Path]:
    """Returns the work folders in a folder, by name."""
    return sorted(file.parent for file in parent.glob(f"*/{FINGERPRINT}"))


def folder_bytes(folder: Path) -> int:
    """Returns how much the files of a folder take, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def state_of(folder: Path) -> str:
    """Returns whether a work folder is "in use", "finished" or "unfinished", or "closed" to this user."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return FINISHED if (folder / f"{FINISHED}.safetensors").exists() else f"un{FINISHED}"
    except Timeout:
        return "in use"
    except OSError:
        return "closed"


def is_work_folder(path: Path) -> bool:
    """Returns whether a folder is a work folder, or an empty one."""
    return path.is_dir() and ((path / FINGERPRINT).is_file() or not any(path.iterdir()))


def remove_folder(folder: Path, last: str) -> None:
    """Removes a folder with the file `last`, by which it is known to be ours, after all others.

    So a kill on the way leaves what the next run can remove. What cannot be removed is left.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != last:
            with contextlib.suppress(OSError):
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk and so survive a power cut, where that can be."""
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot do this
            raise
    finally:
        os.close(descriptor)


def is_full_disk(error: BaseException) -> bool:
    """Returns whether an error says that there is no space left, also as safetensors says it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, (OSError, SafetensorError)) and (
        getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)
    )
