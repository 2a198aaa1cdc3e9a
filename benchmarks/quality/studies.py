r"""The studies of the CRVQ paper, rerun: perplexity and stored bits against one option at a time.

    python -m benchmarks studies MODEL --calibration calib.txt --text wiki.test.raw --nsamples 32 \
        --block-finetune-epochs 0 --e2e-finetune-epochs 0
    python -m benchmarks studies --plot

MODEL is the folder of a dense model; options it does not know go to each `crvq quantize`. Rows go to
results/studies.csv; those that are there are not measured again. Also studied: what text to calibrate on, evaluated on
two domains, for which `--other-calibration` and `--other-text` name texts of the second.

`layer_error` is the geometric mean over all layers of the relative squared error of their outputs, as the report of a
run has it: before codebooks are rounded, and on the calibration text.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..common.commands import add_inputs, command_line, perplexity
from ..common.rows import append, commit, cpu_name, pictures, read
from .perplexity import quantize_and_evaluate

# What the paper has where an option is not the one studied (section 4.1).
PAPER = {
    "critical-ratio": 0.02,
    "num-extended-codebooks": 3,
    "nbits-per-codebook": 8,
    "in-group-size": 8,
    "codebook-bits": 16,
    "importance": "weight_activation",
    "dataset": "same domain",
}
STUDIES: dict[str, list[Any]] = {
    "critical-ratio": [0, 0.005, 0.01, 0.02, 0.05, 0.1],
    "num-extended-codebooks": [0, 1, 2, 3, 4],
    "nbits-per-codebook": [8, 10, 12],
    "in-group-size": [4, 8, 16],
    "importance": ["random", "weight", "weight_activation"],
    "dataset": ["same domain", "other domain", "self", "none"],
}
MEASURED = ("perplexity", "bits_per_weight", "cpu_seconds")


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the command line describes."""
    parser = command_line(__name__)
    add_inputs(parser, required=False)
    text = "text file of another domain, for the study of `dataset`"
    parser.add_argument("--other-calibration", metavar="FILE", help=text)
    parser.add_argument("--other-text", metavar="FILE", help="text file of that domain, evaluation only")
    parser.add_argument("--study", choices=STUDIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--plot", action="store_true", help="only draw what is measured")
    args, options = parser.parse_known_args(arguments)
    results = args.output / "studies.csv"
    if not args.plot:
        if not (args.model and args.calibration and args.text):
            parser.error("MODEL, --calibration and --text are needed to measure; --plot draws what is measured")
        studies = args.study or STUDIES
        if "dataset" in studies and not (args.other_calibration and args.other_text):
            parser.error("the study of dataset needs --other-calibration and --other-text; choose others with --study")
        for study in studies:
            for value in STUDIES[study]:
                append(results, new_rows(study, value, read(results), args, options))
    draw(read(results), pictures(args.output) / "studies.png")


def new_rows(
    study: str, value: Any, rows: list[dict[str, str]], args: argparse.Namespace, options: list[str]
) -> list[dict[str, Any]]:
    """Returns the row of a point: that of the same point in another study, or quantized for; none if it is there."""
    # What several studies share is measured once; on two texts where the text is studied.
    known = [row for row in rows if row["options"] == " ".join(options)]
    known = [row for row in known if study != "dataset" or row["other_perplexity"]]
    same = [row for row in known if _settings(row["study"], _typed(row)) == _settings(study, value)]
    if same:
        return [same[0] | {"study": study, "value": value}] if all(row["study"] != study for row in same) else []
    texts = {"same domain": args.calibration, "other domain": args.other_calibration}
    chosen = _settings(study, value)
    chosen["dataset"] = texts.get(chosen["dataset"], chosen["dataset"])
    flags = [part for name, setting in chosen.items() for part in (f"--{name}", str(setting))]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/quantized"
        result = quantize_and_evaluate(args.model, out, args.text, [*flags, *options])
        other = round(perplexity(out, args.other_text), 2) if study == "dataset" else ""
        layers = json.loads(Path(out, "report.json").read_text())["layers"].values()
    row = {"study": study, "value": value} | {name: result[name] for name in MEASURED} | {"other_perplexity": other}
    row["layer_error"] = round(statistics.geometric_mean(layer["relative_error"] for layer in layers), 4)
    row |= {"options": " ".join(options), "commit": commit(), "cpu": cpu_name()}
    print(row, flush=True)
    return [row]


def _settings(study: str, value: Any) -> dict[str, Any]:
    """Returns the options of a point; the same for points that are the same."""
    settings = PAPER | {study: value}
    if not (settings["critical-ratio"] and settings["num-extended-codebooks"]):
        settings |= {"critical-ratio": 0, "num-extended-codebooks": 0}
    return settings


def _typed(row: dict[str, str]) -> Any:
    """Returns the value of a row as `STUDIES` has it."""
    return next(value for value in STUDIES[row["study"]] if str(value) == str(row["value"]))


def draw(rows: list[dict[str, str]], picture: Path) -> None:
    """Draws one panel a study, with the stored bits at each point, and all of them against bits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    studies = [study for study in STUDIES if any(row["study"] == study for row in rows)]
    if not studies:
        print("nothing is measured yet", file=sys.stderr)
        return
    columns = 3
    lines = -(-(len(studies) + 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * lines), dpi=140, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    together = panels[len(studies)]
    for axes, study in zip(panels, studies, strict=False):
        points = sorted((row for row in rows if row["study"] == study), key=lambda r: STUDIES[study].index(_typed(r)))
        values = [row["value"].replace(" ", "\n") for row in points]
        perplexities = [float(row["perplexity"]) for row in points]
        ordered = study not in ("importance", "dataset")
        axes.plot(values, perplexities, "o-" if ordered else "o", color="#0072B2", label="domain 1")
        if study == "dataset":
            others = [float(row["other_perplexity"]) for row in points]
            axes.plot(values, others, "s", color="#D55E00", label="domain 2")
            axes.legend(title="evaluated on", fontsize=7, title_fontsize=7)
        else:  # errors on different texts cannot be compared
            errors = axes.twinx()
            layers = [float(row["layer_error"] or "nan") for row in points]
            errors.plot(values, layers, "x:", color="#999999", markersize=4)
            errors.set_ylabel("layer error (dotted)", color="#777777", fontsize=7)
            errors.tick_params(labelsize=6, labelcolor="#777777")
        for row, x, y in zip(points, values, perplexities, strict=True):
            label = f"{float(row['bits_per_weight']):.2f}"
            axes.annotate(label, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.set(yscale="log", title=study.replace("-", "_"), ylabel="perplexity (bits at the points)")
        axes.margins(x=0.15, y=0.2)
        together.plot([float(row["bits_per_weight"]) for row in points], perplexities, ".", label=study)
    together.set(yscale="log", title="all of them", xlabel="stored bits per weight", ylabel="perplexity")
    together.legend(fontsize=7, loc="upper right")
    for axes in panels[: len(studies) + 1]:
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.tick_params(axis="y", which="both", labelsize=7)
    for axes in panels[len(studies) + 1 :]:
        axes.remove()
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture)
    print(picture)
