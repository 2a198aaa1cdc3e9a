"""Perplexity before and after, measured as `crvq eval` does, for the report of a quantized model."""

import hashlib
import logging
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import distributed
from .config import CRVQConfig
from .convert import check_source, convert, finished_report, load_dense
from .device import compute_device
from .evaluate import perplexity, read_text_tokens
from .report import draw_if_possible, save_report

logger = logging.getLogger("crvq")


@dataclass(frozen=True)
class Measurement:
    """What to measure.

    Attributes:
        text: path of a UTF-8 text file.
        seqlen: tokens per window.
        windows: windows at most, from the start of the text.
        device: to run on; cuda if present, else cpu.
    """

    text: str
    seqlen: int = 2048
    windows: int = 10
    device: str | None = None


def convert_and_measure(
    source: str, out: str | os.PathLike, config: CRVQConfig, gguf_file: str | None, measurement: Measurement
) -> dict[str, Any]:
    """Does what `convert` does, and measures the perplexity of the dense and of the quantized model.

    Both are measured with the weights as they are on disk. The dense model comes first, so that a text which cannot
    be used is told before the long work. Where `out` is finished already, only what was not measured is.

    Returns:
        The report, also in `out`/report.json, with `evaluation`: `text`, `text_sha256`, `seqlen`, `windows`, `tokens`,
        `device`, `dtype`, the `command`, and `value` and `seconds` of `before` and `after`.

    Raises:
        ValueError: as `convert`, `read_text_tokens` and `perplexity`.
        OSError: as `convert`.
    """
    text = Path(measurement.text)
    wanted = {"seqlen": measurement.seqlen, "most_windows": measurement.windows, "text_sha256": _sha256(text)}
    finished = distributed.first(lambda: finished_report(source, out, config, gguf_file))
    found = (finished or {}).get("evaluation", {})
    if all(found.get(key) == value for key, value in wanted.items()):
        return convert(source, out, config, gguf_file)
    before = distributed.first(lambda: _measure(source, gguf_file, measurement))
    report = finished or convert(source, out, config, gguf_file)
    after = distributed.first(lambda: _measure(os.fspath(out), None, measurement))
    windows = ["--seqlen", str(measurement.seqlen), "--windows", str(measurement.windows)]
    evaluation = {
        "text": text.name,
        **wanted,
        **{key: after[key] for key in ("windows", "tokens", "device", "dtype")},
        "command": shlex.join(["crvq", "eval", "MODEL", "--text", text.name, *windows]),
        "before": {key: before[key] for key in ("value", "seconds")},
        "after": {key: after[key] for key in ("value", "seconds")},
    }
    report = {**report, "evaluation": evaluation}
    distributed.first(lambda: (save_report(out, report), draw_if_possible(out)))
    return report


def load(
    source: str, device: str | None = None, dtype: str | None = None, gguf_file: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Returns a model, dense or quantized, and its tokenizer, ready to run.

    Args:
        source: folder or hub id.
        device: to run on; cuda if present, else cpu.
        dtype: name of the dtype of what is not quantized, "auto" as stored; by default float32 on a CPU, else "auto".
        gguf_file: name of a GGUF file in `source` to read instead.

    Raises:
        ValueError, OSError: there is no such model or device.
    """
    check_source(source)
    place = compute_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "auto")
    if gguf_file is not None:
        model, tokenizer = load_dense(source, gguf_file)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(place).eval(), tokenizer


def _measure(source: str, gguf_file: str | None, measurement: Measurement) -> dict[str, Any]:
    """Returns what `crvq eval --json` says."""
    model, tokenizer = load(source, measurement.device, gguf_file=gguf_file)
    tokens = read_text_tokens(tokenizer, measurement.text)
    result = asdict(perplexity(model, tokens, measurement.seqlen, measurement.windows))
    logger.info("Perplexity of %s: %.4f.", source, result["value"])
    return {**result, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def _sha256(text: Path) -> str | None:
    """Returns the hash of a file, None where there is none: reading its tokens then says so."""
    return hashlib.sha256(text.read_bytes()).hexdigest() if text.is_file() else None
