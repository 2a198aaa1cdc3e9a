"""From a dense checkpoint to a folder with the quantized one: checks before the work, nothing half-written after."""

import copy
import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..calibration.tokens import check_dataset
from ..checkpoint.planned import Beside, bytes_in
from ..checkpoint.sources import OF_THE_MODEL, check_source, load_dense, source_hash
from ..config import CRVQConfig
from ..modeling.replace import linear_size, quantizable_linears
from ..pipeline.fingerprint import dataset_fingerprint
from ..pipeline.quantize_model import quantize_model
from ..resources import distributed
from ..resources.workfolder import FINGERPRINT, flush, is_full_disk, is_work_folder, remove_folder
from ..selection.budget import within_budget
from ..sharing.hub import licence_in
from ..sharing.report import (
    REPORT,
    UNFINISHED,
    command_digest,
    command_of,
    draw_if_possible,
    most_bytes,
    save_report,
    shareable,
)

logger = logging.getLogger("crvq")

_UNFINISHED = UNFINISHED  # such a folder may be removed
# What an empty folder may hold: the top of a disk has one of its own.
_NO_MATTER = {"lost+found"}


@dataclass(frozen=True)
class _Places:
    """Where a run writes.

    Attributes:
        out: the result's folder, symbolic links resolved.
        unfinished: the folder in which the result is made.
        work: the work folder.
    """

    out: Path
    unfinished: Path
    work: Path

    @property
    def is_inside(self) -> bool:
        """Whether the result is made inside its folder, to which it is then moved file by file."""
        return self.out in self.unfinished.parents

    @property
    def folder(self) -> Path:
        """The folder that the result's own name, or its files, are put in."""
        return self.out if self.is_inside else self.out.parent


def convert(
    source: str,
    out: str | os.PathLike,
    config: CRVQConfig,
    gguf_file: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantizes a checkpoint into a new folder; the same call again continues an interrupted one.

    Args:
        source: folder or hub id of a dense model.
        out: folder to make. Finished blocks are kept in `config.work_dir`, by default `out` + ".work", until the
            result is saved. A folder that is there and empty (a mount point, say) stays, and all is kept inside it.
        config: how to quantize.
        gguf_file: name of a GGUF file in `source` to read instead of safetensors.
        options: loading options of `source`, see `checkpoint.sources`.

    Returns:
        The report: the pipeline's (see `quantize_blocks_`) with the `command`, hashes of its `inputs`, `base_model`
        and `base_licence`, as in `out`/report.json, drawn in report.html and report.png. Where `out` holds the
        finished result of the same call, nothing is done and that report returned. Of several processes the first
        writes all of it.

    Raises:
        ValueError: there is no such model, it is already quantized, `out` holds something else or cannot be written
            in, its model or text has changed since, there is too little space, or what `quantize_model` refuses.
        OSError: the result cannot be saved; the work folder is kept.
    """
    options = options or {}
    finished, places, inputs = distributed.first(lambda: _start(source, out, config, gguf_file, options))
    if finished is not None:
        return finished
    command, work = command_of(source, gguf_file, config, options), places.work
    config = copy.copy(config)
    config.work_dir = str(work)
    model, tokenizer = load_dense(source, gguf_file, options)
    _check_space(model, config, places.folder)
    is_new = not work.exists()
    try:
        own = tokenizer if config.tokenizer is None else None
        counted = {} if config.fit is None else {"beside": _beside(tokenizer)}
        quantize_model(model, own, config, options, **counted)
    except BaseException as error:
        # Nothing in it is worth keeping.
        if distributed.rank() == 0 and is_new and not (work / "calibration.safetensors").exists():
            remove_folder(work, last=FINGERPRINT)
            _remove_if_empty(places.out / _UNFINISHED)
        if is_full_disk(error):
            raise OSError(f"The disk is full ({work}); free some space and run the same command again.") from error
        raise
    extra = {"command": command, "command_digest": command_digest(command), "inputs": inputs}
    report = shareable(model.crvq_report | extra | {"base_licence": licence_in(source)})
    return distributed.first(lambda: _finish(model, tokenizer, report, places))


def _places(out: str | os.PathLike, config: CRVQConfig) -> _Places:
    """Returns where a run writes, the same for all calls until it is finished.

    Raises:
        ValueError: `out` is a symbolic link that leads in a circle.
    """
    try:
        out = Path(out).resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(out)} leads nowhere ({error}); name another output.") from None
    beside = Path(f"{out}.work")
    is_there = out.is_dir()
    work = out / _UNFINISHED / "work" if is_there and not beside.exists() else beside
    unfinished = out / _UNFINISHED / "result" if is_there else out.with_name(f"{out.name}.tmp")
    return _Places(out, unfinished, Path(os.path.abspath(config.work_dir or work)))


def _start(
    source: str, out: str | os.PathLike, config: CRVQConfig, gguf_file: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any] | None, _Places, dict[str, str | None]]:
    """Returns the report of a finished result of the same call, None if there is work to do; places; and inputs."""
    finished, places = finished_report(source, out, config, gguf_file, options), _places(out, config)
    if finished is None:
        _check_writable(places.folder)
        check_dataset(config.dataset)
        return None, places, _inputs(source, config, gguf_file, options)
    _tidy(places)  # a kill came before the end
    logger.warning("%s is already the finished result of this command; nothing to do.", places.out)
    return finished, places, {}


def _tidy(places: _Places) -> None:
    """Removes what a finished result needs no more: the work folder, then the mark of what is unfinished."""
    mark = places.out / _UNFINISHED
    if is_work_folder(places.work):
        remove_folder(places.work, last=FINGERPRINT)
    if mark.is_dir():
        shutil.rmtree(mark, ignore_errors=True)
    else:
        mark.unlink(missing_ok=True)


def _finish(model: PreTrainedModel, tokenizer: Any, report: dict[str, Any], places: _Places) -> dict[str, Any]:
    """Saves everything in `out`, then removes the work folder; returns the report."""
    out, work = places.out, places.work
    try:
        _save(model, tokenizer, report, places)
    except (OSError, SafetensorError) as error:
        reason = "the disk is full" if is_full_disk(error) else str(error)
        raise OSError(
            f"Saving {out} failed: {reason}. Nothing is lost: what is quantized is kept in {work}; "
            "once this is solved, run the same command again."
        ) from error
    _tidy(places)
    draw_if_possible(out)  # last: whatever happens to the picture, the result is there
    return report


def finished_report(
    source: str,
    out: str | os.PathLike,
    config: CRVQConfig,
    gguf_file: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Returns the report of a finished result of the same call of `convert`, None if `out` is free.

    Raises:
        ValueError: there is something else in `out`, or there can be no model `source`.
    """
    check_source(source)
    places, command = _places(out, config), command_of(source, gguf_file, config, options)
    out, unfinished = places.out, places.unfinished
    is_ours = (unfinished / _UNFINISHED).is_file() or (unfinished.is_dir() and not any(unfinished.iterdir()))
    if unfinished.exists() and not (is_ours or places.is_inside):
        raise ValueError(f"{unfinished} is in the way and crvq did not make it; move it or name another output.")
    own = {path.relative_to(out).parts[0] for path in (places.work, unfinished) if out in path.parents}
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= _NO_MATTER | own):
        return None
    if (out / _UNFINISHED).is_dir() and not (out / REPORT).exists():  # a kill came while files were moved
        return None
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        model = report["command"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} exists and holds something else; name another output, or remove it.") from None
    if report.get("command_digest") != command_digest(command):
        raise ValueError(
            f"{out} exists and is the result of another command ({model} quantized with other settings "
            "or another model); name another output, or remove it."
        )
    then, now = report.get("inputs") or {}, _inputs(source, config, gguf_file, options or {})
    changed = [name for name, value in now.items() if None not in (value, then.get(name)) and then[name] != value]
    if changed:
        raise ValueError(
            f"{out} is the result of this command, but {' and '.join(changed)} changed since; name another output, or "
            "remove it to quantize anew."
        )
    return report


def _inputs(source: str, config: CRVQConfig, gguf_file: str | None, options: dict[str, Any]) -> dict[str, str | None]:
    """Returns what changes when something that a command only names does; None for what cannot be told."""
    tokenizer = "" if config.tokenizer is None else config.tokenizer
    if tokenizer != "" and isinstance(tokenizer, (str, os.PathLike)):
        general = {key: value for key, value in options.items() if key not in OF_THE_MODEL}
        name = os.fspath(tokenizer)
        tokenizer = source_hash(name, options=general) or hashlib.sha256(name.encode()).hexdigest()
    return {
        "the model's files": source_hash(source, gguf_file, options),
        "the calibration data": dataset_fingerprint(config.dataset),
        "the tokenizer": tokenizer if isinstance(tokenizer, str) else None,
    }


def _check_writable(folder: Path) -> None:
    """Raises ValueError if no file can be made in `folder`, which is made first if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"Cannot write in {folder} ({error.strerror}); name an output elsewhere.") from error


def _check_space(model: PreTrainedModel, config: CRVQConfig, folder: Path) -> None:
    """Raises ValueError if the disk cannot hold the quantized layers twice (work folder, result) and the rest once."""
    if config.fit is not None:
        needed = 2 * min(config.fit, sum(parameter.nbytes for parameter in model.parameters()))
    else:
        sizes = {name: linear_size(module) for name, module in quantizable_linears(model, config)[0].items()}
        config = within_budget(config, sizes)
        linears, _ = quantizable_linears(model, config)
        shapes = (config.of_layer(name).layer_shape(*linear_size(module)) for name, module in linears.items())
        quantized = sum(shape.nbytes for shape in shapes)
        inside = {id(module.weight) for module in linears.values()}
        rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
        needed = 2 * quantized + rest
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB of free space, the result and the work folder need "
            f"{needed / 1e6:.0f} MB; free some, or name an output elsewhere."
        )


def _save(model: PreTrainedModel, tokenizer: Any, report: dict[str, Any], places: _Places) -> None:
    """Saves model, tokenizer and report in `out`, which is there complete or not at all.

    Where `out` was there, its files come one by one, those last without which it is no checkpoint and no result.
    """
    out, unfinished = places.out, places.unfinished
    remove_folder(unfinished, last=_UNFINISHED)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / _UNFINISHED).touch()
        model.save_pretrained(unfinished)
        _save_tokenizer(tokenizer, unfinished)
        save_report(unfinished, report)
        for path in (*unfinished.rglob("*"), unfinished):
            flush(path)
        if not places.is_inside:
            os.replace(unfinished, out)
            flush(out.parent)
    except BaseException:
        remove_folder(unfinished, last=_UNFINISHED)
        raise
    if places.is_inside:
        _move_files(unfinished, out)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _remove_indentation(folder / "tokenizer.json")


def _beside(tokenizer: Any) -> Beside:
    """Returns what says the bytes of the files that a result has beside the model."""
    nbytes = bytes_in(partial(_save_tokenizer, tokenizer))
    return lambda layers: {"tokenizer": nbytes, "report": most_bytes(layers)}


def _move_files(folder: Path, out: Path) -> None:
    """Moves all files of a folder, but for the mark, into `out`, on the same disk."""
    last = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, REPORT]
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != _UNFINISHED]
    for name in sorted(names, key=lambda name: last.index(name.name) if name.name in last else -1):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, out / name)
        flush((out / name).parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_indentation(file: Path) -> None:
    """Rewrites a JSON file without the white space that can be more than half of it, if there is such a file."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
