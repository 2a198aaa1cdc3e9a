"""Options that commands share: the model to run, and the fields of `CRVQConfig`."""

import argparse
import dataclasses
from typing import Any

from ..config import FIELDS, PRESETS

NOT_OPTIONS = ("quant_method", "quantizer_package", "format_version", "dequantize")
GROUPS = {
    "method": (
        "bits",
        "fit",
        "in_group_size",
        "nbits_per_codebook",
        "num_extended_codebooks",
        "critical_ratio",
        "overrides",
        "codebook_bits",
        "importance",
    ),
    "embeddings": ("embedding_bits",),
    "calibration": ("dataset", "nsamples", "seqlen", "tokenizer"),
    "fine-tuning": ("block_finetune_epochs", "e2e_finetune_epochs", "e2e_nsamples"),
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and how to load and run it."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id, dense or quantized")
    add_loading_options(parser)
    parser.add_argument("--device", help="device to run on; cuda if present, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="dtype of what is not quantized, auto is as stored (default: float32 on a CPU, else auto)",
    )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds where in a repository a model is and whether its code may run, see `loading_options`."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of MODEL on the hub")
    parser.add_argument("--subfolder", metavar="DIR", help="folder within MODEL")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with MODEL")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the loading options that were given, as `from_pretrained` takes them."""
    names = ("revision", "subfolder", "trust_remote_code")
    return {name: value for name in names if (value := getattr(args, name))}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field of `CRVQConfig` that a command can set."""
    presets = {name: ", ".join(f"{key} {value}" for key, value in values.items()) for name, values in PRESETS.items()}
    changes = "; ".join(f"{name} is {text}" for name, text in presets.items() if text)
    parser.add_argument("--preset", choices=PRESETS, default="default", help=f"other defaults: {changes}")
    groups = {title: parser.add_argument_group(title) for title in (*GROUPS, "run")}
    title_of = {name: title for title, names in GROUPS.items() for name in names}
    for name, field in FIELDS.items():
        if name not in NOT_OPTIONS:
            groups[title_of.get(name, "run")].add_argument(f"--{name.replace('_', '-')}", **_option(field))


def _option(field: dataclasses.Field) -> dict[str, Any]:
    """Returns the arguments of `add_argument` for one field."""
    text = field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if field.default is not None:
        options["help"] += f" (default: {field.default})"
    if isinstance(field.default, (int, float)):
        kind = float if field.type == "float" else type(field.default)
        options |= {"type": kind, "metavar": "N" if kind is int else "X"}
    elif field.name == "bits":
        options |= {"type": float, "metavar": "X"}
    elif field.name == "fit":
        options |= {"metavar": "SIZE"}
    elif field.name == "dataset":  # the one field that takes other values here than in Python
        sources = "'self' (written by the model), 'wikitext2', 'c4', FILE, FILE:FIELD of a table, NAME:FIELD or "
        sources += "NAME:CONFIG:SPLIT:FIELD of the hub, a mixture of these such as FILE:0.7,FILE:0.3, or 'none'"
        sound = "for a model that hears, a folder of sound files (NAME.wav; what is said, if known, in NAME.txt)"
        options |= {"metavar": "TEXT", "help": f"calibration text: {sources}; {sound} (default: {field.default})"}
    elif field.name == "overrides":
        options |= {"metavar": "JSON"}
    elif field.type.startswith("list["):
        options |= {"action": "append", "metavar": "NAME", "help": f"{text}; may be repeated"}
    return options
