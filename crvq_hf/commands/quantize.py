"""`crvq quantize`: a model into a new folder, on request with its perplexity before and after."""

import argparse
import logging
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.info import read_info
from ..checkpoint.sources import check_source, load, load_dense
from ..config import FIELDS, CRVQConfig
from ..evaluation.perplexity import SEQLEN, check_text, most_tokens, perplexity, read_text_tokens
from ..evaluation.samples import PROMPTS, write_samples
from ..pipeline.fingerprint import dataset_fingerprint
from ..pipeline.plan import plan
from ..resources import distributed
from ..sharing.report import draw_if_possible, save_report
from ..sharing.text import megabytes
from .convert import convert, finished_report
from .options import add_config_options, add_loading_options, loading_options

logger = logging.getLogger("crvq")

HELP = "quantize a model into a new folder; run again to resume"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a dense model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--gguf-file", metavar="FILE", help="read this GGUF file of MODEL")
    parser.add_argument("--plan", action="store_true", help="tell what it would need, and do nothing")
    add_loading_options(parser)
    add_config_options(parser)
    group = parser.add_argument_group("evaluation")
    text = "also measure the perplexity on this UTF-8 text, before and after, for the report"
    group.add_argument("--evaluate", metavar="FILE", help=text)
    text = f"tokens per window (default: {SEQLEN}, or what the model and the text have)"
    group.add_argument("--evaluate-seqlen", type=int, metavar="N", help=text)
    text = "windows at most (default: %(default)s)"
    group.add_argument("--evaluate-windows", type=int, default=10, metavar="N", help=text)


def run(args: argparse.Namespace) -> None:
    """Quantizes, then prints how it went."""
    fields = {name: value for name, value in vars(args).items() if name in FIELDS or name == "preset"}
    if fields.get("dataset") == "none":
        fields["dataset"] = None
    with distributed.together(fields.get("device")):
        config, options = CRVQConfig(**fields), loading_options(args)
        if args.plan:
            return tell_plan(args.model, args.out, config, args.gguf_file, options)
        if args.evaluate is None:
            report = convert(args.model, args.out, config, args.gguf_file, options)
        else:
            measurement = Measurement(args.evaluate, args.evaluate_seqlen, args.evaluate_windows, config.device)
            report = convert_and_measure(args.model, args.out, config, args.gguf_file, measurement, options)
    if distributed.rank():
        return
    print(summary(report))
    wished = "" if config.fit is None else f" of {megabytes(config.fit)} to fit in,"
    print(f"{'checkpoint':<18} {megabytes(read_info(args.out).nbytes)}{wished} in {args.out}")


def tell_plan(source: str, out: str, config: CRVQConfig, gguf_file: str | None, options: dict[str, Any]) -> None:
    """Prints what quantizing would need, and a time; nothing is loaded, but from a GGUF file.

    Raises:
        ValueError: it does not fit, or there is no such model.
    """
    check_source(source)
    config.work_dir = config.work_dir or f"{out}.work"
    found = plan(load_dense(source, gguf_file, options)[0] if gguf_file else source, config, options)
    print("\n".join(found.lines()))
    found.check()


def summary(report: dict[str, Any]) -> str:
    """Returns a few lines on how a run went."""
    errors = {name: layer["relative_error"] for name, layer in report["layers"].items()}
    mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.get)
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report["seconds"].items())
    rows = {
        "layers": f"{len(errors)}",
        "bits per weight": f"{report['bits_per_weight']:.3f} (stored, channel order counted)",
        "relative error": f"{mean:.4f} on average, at worst {errors[worst]:.4f} in {worst}",
        "calibration": f"{report['calibration_tokens']} tokens",
        "seconds": f"{sum(report['seconds'].values()):.0f} ({seconds})",
        "peak memory": megabytes(report["peak_memory_bytes"]),
    }
    if "dense_share" in report:  # not of an older version
        rows["stay dense"] = f"{report['dense_share']:.1%} of the weights of the blocks"
    if "evaluation" in report:
        rows["perplexity"] = "{before[value]:.4f} before, {after[value]:.4f} after".format(**report["evaluation"])
    return "\n".join(f"{title:<18} {value}" for title, value in rows.items())


@dataclass(frozen=True)
class Measurement:
    """What to measure.

    Attributes:
        text: path of a UTF-8 text file.
        seqlen: tokens per window; None for 2048, or what the model and the text have.
        windows: windows at most, from the start of the text.
        device: to run on; cuda if present, else cpu.
    """

    text: str
    seqlen: int | None = None
    windows: int = 10
    device: str | None = None


def convert_and_measure(
    source: str,
    out: str | os.PathLike,
    config: CRVQConfig,
    gguf_file: str | None,
    measurement: Measurement,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Does what `convert` does, and measures the perplexity of the dense and of the quantized model.

    Both are measured with the weights as they are on disk. The dense model comes first, so that a text which cannot
    be used is told before the long work. Where `out` is finished already, only what was not measured is.

    Returns:
        The report, also in `out`/report.json, with `evaluation`: `text`, `text_sha256`, `seqlen`, `windows`, `tokens`,
        `device`, `dtype`, the `command`, `value` and `seconds` of `before` and `after`, and `samples`, what both write
        after each `prompt`.

    Raises:
        ValueError: as `convert`, `read_text_tokens` and `perplexity`.
        OSError: as `convert`.
    """
    text = Path(measurement.text)
    options = options or {}
    check_text(measurement.text)
    wanted = {"most_windows": measurement.windows, "text_sha256": dataset_fingerprint(measurement.text)}
    wanted |= {} if measurement.seqlen is None else {"seqlen": measurement.seqlen}
    finished = distributed.first(lambda: finished_report(source, out, config, gguf_file, options))
    found = (finished or {}).get("evaluation", {})
    if all(found.get(key) == value for key, value in wanted.items()):
        return convert(source, out, config, gguf_file, options)
    before = distributed.first(lambda: _measure(source, gguf_file, measurement, options))
    report = finished or convert(source, out, config, gguf_file, options)
    trusted = {key: value for key, value in options.items() if key == "trust_remote_code"}
    after = distributed.first(lambda: _measure(os.fspath(out), None, measurement, trusted))
    windows = ["--seqlen", str(after["seqlen"]), "--windows", str(measurement.windows)]
    evaluation = {
        "text": text.name,
        **wanted,
        **{key: after[key] for key in ("seqlen", "windows", "tokens", "device", "dtype")},
        "command": shlex.join(["crvq", "eval", "MODEL", "--text", text.name, *windows]),
        "before": {key: before[key] for key in ("value", "seconds")},
        "after": {key: after[key] for key in ("value", "seconds")},
        "samples": [
            {"prompt": prompt, "before": one, "after": other}
            for prompt, one, other in zip(PROMPTS, before["samples"], after["samples"], strict=True)
        ],
    }
    report = {**report, "evaluation": evaluation}
    distributed.first(lambda: (save_report(out, report), draw_if_possible(out)))
    return report


def _measure(source: str, gguf_file: str | None, measurement: Measurement, options: dict[str, Any]) -> dict[str, Any]:
    """Returns what `crvq eval --json` says, and what the model writes."""
    model, tokenizer = load(source, measurement.device, gguf_file=gguf_file, options=options)
    tokens = read_text_tokens(tokenizer, measurement.text, most_tokens(measurement.seqlen, measurement.windows))
    result = asdict(perplexity(model, tokens, measurement.seqlen, measurement.windows))
    logger.info("Perplexity of %s: %.4f.", source, result["value"])
    result["samples"] = write_samples(model, tokenizer)
    return {**result, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
