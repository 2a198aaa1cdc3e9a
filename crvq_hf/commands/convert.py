"""From a dense checkpoint to a folder with the quantized one: checks before the work, nothing half-written after."""

import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..checkpoint.sources import check_source, load_dense
from ..config import CRVQConfig
from ..modeling.replace import linear_size, quantizable_linears
from ..pipeline.budget import within_budget
from ..pipeline.quantize_model import quantize_model
from ..resources import distributed
from ..resources.workfolder import FINGERPRINT, flush, is_full_disk, is_work_folder, remove_folder
from ..sharing.hub import licence_in
from ..sharing.report import REPORT, UNFINISHED, command_digest, command_of, draw_if_possible, save_report, shareable

logger = logging.getLogger("crvq")

_UNFINISHED = UNFINISHED  # such a folder may be removed


def convert(source: str, out: str | os.PathLike, config: CRVQConfig, gguf_file: str | None = None) -> dict[str, Any]:
    """Quantizes a checkpoint into a new folder; the same call again continues an interrupted one.

    Args:
        source: folder or hub id of a dense causal language model.
        out: folder to make. Finished blocks are kept in `config.work_dir`, by default `out` + ".work", until the
            result is saved.
        config: how to quantize.
        gguf_file: name of a GGUF file in `source` to read instead of safetensors.

    Returns:
        The report: the pipeline's (see `quantize_blocks_`) with the `command`, `base_model` and `base_licence`, as in
        `out`/report.json, drawn in report.html and report.png. Where `out` holds the finished result of the same
        call, nothing is done and that report returned. Of several processes the first writes all of it.

    Raises:
        ValueError: there is no such model, it is already quantized, `out` holds something else, there is too little
            space, or what `quantize_model` refuses.
        OSError: the result cannot be saved; the work folder is kept.
    """
    out = Path(os.path.abspath(out))
    work = Path(config.work_dir or f"{out}.work")
    finished = distributed.first(lambda: _start(source, out, config, gguf_file, work))
    if finished is not None:
        return finished
    command = command_of(source, gguf_file, config)
    config = copy.copy(config)
    config.work_dir = str(work)
    model, tokenizer = load_dense(source, gguf_file)
    _check_space(model, config, out.parent)
    is_new = not work.exists()
    try:
        quantize_model(model, tokenizer if config.tokenizer is None else None, config)
    except BaseException as error:
        # Nothing in it is worth keeping.
        if distributed.rank() == 0 and is_new and not (work / "calibration.safetensors").exists():
            remove_folder(work, last=FINGERPRINT)
        if is_full_disk(error):
            raise OSError(f"The disk is full ({work}); free some space and run the same command again.") from error
        raise
    extra = {"command": command, "command_digest": command_digest(command), "base_licence": licence_in(source)}
    report = shareable(model.crvq_report | extra)
    return distributed.first(lambda: _finish(model, tokenizer, report, out, work))


def _start(source: str, out: Path, config: CRVQConfig, gguf_file: str | None, work: Path) -> dict[str, Any] | None:
    """Returns the report of a finished result of the same call, which it tidies up; None if there is work to do."""
    finished = finished_report(source, out, config, gguf_file)
    if finished is None:
        _check_writable(out.parent)
        return None
    if is_work_folder(work):  # a kill came before the end
        remove_folder(work, last=FINGERPRINT)
    (out / _UNFINISHED).unlink(missing_ok=True)
    logger.warning("%s is already the finished result of this command; nothing to do.", out)
    return finished


def _finish(model: PreTrainedModel, tokenizer: Any, report: dict[str, Any], out: Path, work: Path) -> dict[str, Any]:
    """Saves everything in `out`, then removes the work folder; returns the report."""
    try:
        _save(model, tokenizer, report, out)
    except (OSError, SafetensorError) as error:
        reason = "the disk is full" if is_full_disk(error) else str(error)
        raise OSError(
            f"Saving {out} failed: {reason}. Nothing is lost: what is quantized is kept in {work}; "
            "once this is solved, run the same command again."
        ) from error
    remove_folder(work, last=FINGERPRINT)
    draw_if_possible(out)  # last: whatever happens to the picture, the result is there
    return report


def finished_report(
    source: str, out: str | os.PathLike, config: CRVQConfig, gguf_file: str | None = None
) -> dict[str, Any] | None:
    """Returns the report of a finished result of the same call of `convert`, None if `out` is free.

    Raises:
        ValueError: there is something else in `out`, or there can be no model `source`.
    """
    check_source(source)
    out, command = Path(os.path.abspath(out)), command_of(source, gguf_file, config)
    unfinished = _unfinished(out)
    is_ours = (unfinished / _UNFINISHED).is_file() or (unfinished.is_dir() and not any(unfinished.iterdir()))
    if unfinished.exists() and not is_ours:
        raise ValueError(f"{unfinished} is in the way and crvq did not make it; move it or name another output.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
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
    return report


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
    config = within_budget(config, map(linear_size, quantizable_linears(model, config)[0].values()))
    linears, _ = quantizable_linears(model, config)
    quantized = sum(config.layer_shape(*linear_size(module)).nbytes for module in linears.values())
    inside = {id(module.weight) for module in linears.values()}
    rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    needed, free = 2 * quantized + rest, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB of free space, the result and the work folder need "
            f"{needed / 1e6:.0f} MB; free some, or name an output elsewhere."
        )


def _unfinished(out: Path) -> Path:
    """Returns the folder that is written before it is renamed to `out`."""
    return out.with_name(f"{out.name}.tmp")


def _save(model: PreTrainedModel, tokenizer: Any, report: dict[str, Any], out: Path) -> None:
    """Saves model, tokenizer and report in `out`, which is there complete or not at all."""
    unfinished = _unfinished(out)
    remove_folder(unfinished, last=_UNFINISHED)
    unfinished.mkdir()
    try:
        (unfinished / _UNFINISHED).touch()
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
            _remove_indentation(unfinished / "tokenizer.json")
        save_report(unfinished, report)
        for path in (*unfinished.rglob("*"), unfinished):
            flush(path)
        os.replace(unfinished, out)
        flush(out.parent)
        (out / _UNFINISHED).unlink()  # last: wherever a kill comes, the next run knows what it may remove
    except BaseException:
        remove_folder(unfinished, last=_UNFINISHED)
        raise


def _remove_indentation(file: Path) -> None:
    """Rewrites a JSON file without the white space that can be more than half of it, if there is such a file."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
