"""The report of a quantization beside its checkpoint: report.json with every number, report.html and report.png.

What is written here may be shared: of the user's folders only last names are kept, of his texts only how many.
"""

import base64
import copy
import hashlib
import html
import json
import logging
import os
import re
import shlex
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..blocks.finding import kind_of
from ..checkpoint.breakdown import Breakdown, Kind, break_down
from ..checkpoint.info import CheckpointInfo, read_info
from ..config import FIELDS, CRVQConfig
from ..dataset.grammar import shareable_dataset
from ..naming import told_overrides
from .figures import draw
from .text import megabytes

logger = logging.getLogger("crvq")

REPORT = "report.json"
PICTURE = "report.png"
PAGE = "report.html"
UNFINISHED = ".crvq-unfinished"  # marks a folder that `convert` is still writing
# At most, by what many reports took: numbers of a layer beside its name, all else; a picture, and each kind in it.
_LAYER_BYTES, _OTHER_BYTES, _PICTURE_BYTES, _KIND_BYTES = 130, 12_000, 125_000, 5_000
_CACHED = re.compile(r"models--(.+)/snapshots/[^/]+")  # where the hub client keeps a downloaded model
_SAMPLES = "Tokens drawn with one seed, for a chat model as answers: before quantizing and after."
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .9em .15em 0; text-align: left }
th { border-bottom: 1px solid #999 } td.n, th.n { text-align: right } img { width: 100% }
table.samples td { vertical-align: top; white-space: pre-wrap; width: 40%; border-bottom: 1px solid #ddd }
table.samples td:first-child { width: 20%; color: #666 }
code { background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere }
"""


def command_digest(command: dict[str, Any]) -> str:
    """Returns what tells commands apart, without telling what they were."""
    return hashlib.sha256(json.dumps(command, sort_keys=True).encode()).hexdigest()


def command_of(
    source: str, gguf_file: str | None, config: CRVQConfig, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns what a report keeps as its `command`, still with the user's own paths."""
    model = os.path.abspath(source) if os.path.isdir(source) else source
    command = {"model": model, "gguf_file": gguf_file, "config": config.to_dict()}
    return command | ({"options": options} if options else {})


def shareable(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report that names no folder of the user's; one that names none already is returned as it is.

    Args:
        report: with the `command` that was run, if one was: `model`, `gguf_file` and `config`.

    Returns:
        A copy in which `base_model` is the model's id on the hub, None if it was a folder, and local paths have
        become their last component.
    """
    report = copy.deepcopy(report)
    command = report.get("command")
    if command is None:
        return report
    model = command["model"]
    if os.path.isabs(model):
        cached = _CACHED.search(Path(model).as_posix())
        report.setdefault("base_model", cached and cached[1].replace("--", "/", 1))
        command["model"] = report["base_model"] or os.path.basename(os.path.normpath(model))
    else:
        report.setdefault("base_model", model)
    command["config"]["dataset"] = shareable_dataset(command["config"]["dataset"])
    return report


def write_report(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes report.json, and report.html and report.png where matplotlib is installed.

    Args:
        folder: holds the checkpoint.
        report: what the pipeline returned, `model.crvq_report`; `convert` adds `command` and what comes with it.

    Raises:
        ValueError: the folder holds no CRVQ checkpoint, or the report is of another one.
    """
    save_report(folder, report)
    draw_if_possible(folder)


def save_report(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes report.json, without the user's own paths."""
    _write(Path(folder) / REPORT, (json.dumps(shareable(report), indent=1) + "\n").encode())


def draw_if_possible(folder: str | os.PathLike) -> None:
    """Draws report.html and report.png; says what to do where matplotlib is not installed or they cannot be saved."""
    try:
        draw_report(folder)
    except (ImportError, OSError) as error:
        cure = "pip install 'crvq-hf[report]', then " if isinstance(error, ImportError) else ""
        logger.warning("The report is not drawn (%s); %scrvq report %s draws it.", error, cure, folder)


def most_bytes(layers: Collection[str]) -> int:
    """Returns the most bytes that the files of a report will take, which are made after the model is.

    Args:
        layers: names of the quantized layers.
    """
    kinds = len({kind_of(name) for name in layers})
    numbers = _OTHER_BYTES + sum(_LAYER_BYTES + len(name) for name in layers)
    picture = _PICTURE_BYTES + _KIND_BYTES * kinds if find_spec("matplotlib") else 0
    return (
        numbers + picture + (_OTHER_BYTES + 4 * picture // 3 if picture else 0)
    )  # in the page it is once more, as text


def draw_report(folder: str | os.PathLike) -> list[Path]:
    """Draws report.html and report.png from report.json and the headers of the checkpoint; returns their paths.

    Raises:
        ValueError: there is no CRVQ checkpoint or no report, or they do not belong together.
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    info, report = read_quantized(folder)
    if report is None:
        raise ValueError(
            f"{folder} has no {REPORT}, so there is nothing to draw; crvq quantize writes one, and so does "
            "crvq_hf.write_report(folder, model.crvq_report)."
        )
    numbers = break_down(info, report)
    errors = f"Relative squared error of the {_measured(report)}, before fine-tuning"
    picture = draw(numbers, headline(info, report, numbers), errors, report["seconds"])
    _write(folder / PICTURE, picture)
    _write(folder / PAGE, _page(info, report, numbers, picture).encode())
    return [folder / PAGE, folder / PICTURE]


def read_quantized(folder: Path) -> tuple[CheckpointInfo, dict[str, Any] | None]:
    """Returns a CRVQ checkpoint in a folder and its report, made shareable, None if it has none.

    Raises:
        ValueError: there is no complete CRVQ checkpoint, or the report is damaged or of another one.
    """
    unfinished = any(Path(f"{folder.resolve()}{end}").is_dir() for end in (".work", ".tmp"))
    if (folder / UNFINISHED).exists() or (not folder.exists() and unfinished):
        raise ValueError(f"{folder} is not finished; run the same crvq quantize command again to finish it.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give the output folder of crvq quantize.")
    info = read_info(str(folder))
    if info.crvq is None or not info.layers:
        raise ValueError(f"{folder} is no CRVQ model; give the output folder of crvq quantize.")
    file = folder / REPORT
    if not file.is_file():
        return info, None
    try:
        report = shareable(json.loads(file.read_text(encoding="utf-8")))
        layers, bits = report["layers"], float(report["bits_per_weight"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged; remove it, or quantize again.") from None
    if layers.keys() != info.layers.keys() or abs(bits - info.bits_per_weight) > 1e-6:
        raise ValueError(f"{file} is the report of another model than the checkpoint beside it; remove it.")
    return info, report


def headline(info: CheckpointInfo, report: dict[str, Any], numbers: Breakdown) -> str:
    """Returns the two or three lines above the picture."""
    model = report.get("command", {}).get("model") or ", ".join(info.config.get("architectures") or ["A model"])
    lines = [
        f"{model}: {info.bits_per_weight:.3f} bits per weight in {len(info.layers)} quantized layers, "
        f"{megabytes(numbers.file_bytes)} in all",
        f"d {info.crvq.in_group_size}, e {info.crvq.nbits_per_codebook}, {info.crvq.num_extended_codebooks} extended "
        f"codebooks for {info.crvq.critical_ratio:.1%} of the channels"
        f"{told_overrides(info.crvq.overrides)}, {report['calibration_tokens']:,} calibration tokens",
    ]
    evaluation = report.get("evaluation")
    if evaluation:
        before, after = evaluation["before"]["value"], evaluation["after"]["value"]
        lines.append(
            f"perplexity {before:.2f} before, {after:.2f} after ({evaluation['text']}, "
            f"{evaluation['windows']} windows of {evaluation['seqlen']} tokens)"
        )
    return "\n".join(lines)


def command_line(report: dict[str, Any]) -> str | None:
    """Returns the `crvq quantize` command of a report with what differs from the defaults, None if it has none."""
    command = report.get("command")
    if command is None:
        return None
    words = ["crvq", "quantize", command["model"], "OUT"]
    if command["gguf_file"]:
        words += ["--gguf-file", command["gguf_file"]]
    for name, value in command.get("options", {}).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    for name, value in command["config"].items():
        if name in FIELDS and name != "format_version" and value != FIELDS[name].default:  # it follows from the others
            text = "none" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
            values = value if isinstance(value, list) else [text]
            words += [word for one in values for word in (f"--{name.replace('_', '-')}", one)]
    return shlex.join(words)


def facts(info: CheckpointInfo, report: dict[str, Any] | None, numbers: Breakdown) -> dict[str, str]:
    """Returns the rows of numbers that the page and the model card have in common."""
    layers = info.layers.values()
    quantized, dense = sum(layer.nbytes for layer in layers), sum(tensor.nbytes for tensor in info.dense.values())
    rows = {
        "bits per weight of the quantized layers": f"{info.bits_per_weight:.4f}, all that is stored for them: codes, "
        "codebooks, scales and channel order",
        "quantized": f"{len(layers)} layers, {sum(layer.num_weights for layer in layers):,} weights, "
        f"{quantized:,} bytes",
        "embeddings": f"{info.crvq.embedding_bits:g} bits, scales counted, {numbers.embedding_bytes:,} bytes, "
        f"{numbers.embedding_bytes / numbers.file_bytes:.1%} of the checkpoint",
        "stay dense": "{:.1%} of the weights of the blocks, {:.1%} of all".format(*info.dense_shares),
        "not quantized": f"{len(info.dense)} tensors ({'' if numbers.embedding_bytes else 'embeddings, '}norms and so "
        f"on), {dense:,} bytes, {dense / numbers.file_bytes:.1%} of the checkpoint",
        "whole checkpoint": f"{numbers.file_bytes:,} bytes ({megabytes(numbers.file_bytes)}) of safetensors",
    }
    if not numbers.embedding_bytes:
        del rows["embeddings"]
    evaluation = (report or {}).get("evaluation")
    if evaluation:
        rows["perplexity before"] = f"{evaluation['before']['value']:.2f}"
        rows["perplexity after"] = f"{evaluation['after']['value']:.2f}"
    else:
        rows["perplexity"] = "not measured"
    if report is not None:
        rows["calibration"] = f"{report['calibration_tokens']:,} tokens"
        if report.get("e2e_tokens"):
            rows["calibration"] += f", {report['e2e_tokens']:,} for end-to-end fine-tuning"
        rows["time to quantize"] = f"{sum(report['seconds'].values()):,.0f} s"
        rows["peak memory"] = megabytes(report["peak_memory_bytes"])
    return rows


def _measured(report: dict[str, Any]) -> str:
    """Returns what the errors of a report are those of."""
    return "layers' output" if report["calibration_tokens"] else "weights"


def about_errors(report: dict[str, Any]) -> str:
    """Returns a sentence on what the errors of a report are."""
    of = "of a layer's output on the calibration tokens" if report["calibration_tokens"] else "of a layer's weights"
    return f"Errors are squared differences {of}, relative to these, before any fine-tuning."


def kind_rows(kinds: list[Kind]) -> list[tuple[str, ...]]:
    """Returns a header and one row of text per kind of layer."""
    titles = ("layers", "count", "bits per weight", "mean error", "worst error", "in")
    return [
        titles,
        *(
            (
                kind.name,
                f"{len(kind.layers)}",
                f"{kind.bits_per_weight:.3f}",
                *(("-",) * 3 if kind.worst_layer is None else _errors(kind)),
            )
            for kind in kinds
        ),
    ]


def _errors(kind: Kind) -> tuple[str, str, str]:
    return f"{kind.mean_error:.4f}", f"{kind.worst_error:.4f}", kind.worst_layer


def _page(info: CheckpointInfo, report: dict[str, Any], numbers: Breakdown, picture: bytes) -> str:
    """Returns report.html: one file, the picture in it."""
    rows = [
        f"<tr><td>{_e(name)}</td><td>{_e(value)}</td></tr>" for name, value in facts(info, report, numbers).items()
    ]
    head, *body = kind_rows(numbers.kinds)
    commands = [command_line(report), (report.get("evaluation") or {}).get("command")]
    title = headline(info, report, numbers).splitlines()[0]
    image = base64.b64encode(picture).decode()
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{_e(title)}</title>',
            f"<style>{_STYLE}</style></head>\n<body>\n<h1>Quantization report</h1>\n<p>{_e(title)}</p>",
            f"<table>\n{''.join(rows)}\n</table>",
            *(f"<p><code>{_e(command)}</code></p>" for command in commands if command),
            f'<img alt="errors, bits, bytes and time" src="data:image/png;base64,{image}">',
            f"<h2>Kinds of layers</h2>\n<p>{_e(about_errors(report))} All layers are in {REPORT}.</p>",
            f"<table>\n<tr>{_cells(head, 'th')}</tr>",
            *(f"<tr>{_cells(row, 'td')}</tr>" for row in body),
            "</table>",
            *_samples(report),
            "</body>\n</html>\n",
        ]
    )


def _samples(report: dict[str, Any]) -> list[str]:
    """Returns the lines of the page that show what the models write, none if that was not measured."""
    samples = (report.get("evaluation") or {}).get("samples") or []
    rows = [[sample[name] for name in ("prompt", "before", "after")] for sample in samples]
    return samples and [
        f"<h2>What they write</h2>\n<p>{_SAMPLES}</p>\n<table class=samples>",
        *(
            f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in row)}</tr>"
            for row in [["prompt", "before", "after"], *rows]
        ),
        "</table>",
    ]


def _cells(row: tuple[str, ...], tag: str) -> str:
    numeric = {1, 2, 3, 4}
    return "".join(f"<{tag}{' class=n' if i in numeric else ''}>{_e(cell)}</{tag}>" for i, cell in enumerate(row))


def _e(text: str) -> str:
    return html.escape(text)


def _write(file: Path, content: bytes) -> None:
    """Writes a file that is there complete or as it was."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
