"""`crvq info`: sizes, shapes and bits of a checkpoint, from its headers."""

import argparse
import math
import re

from ..checkpoint.headers import TensorInfo, embedding_bytes, embedding_modules, embedding_shape
from ..checkpoint.info import CheckpointInfo, read_info
from ..checkpoint.sources import check_source
from ..config import CRVQConfig
from ..modeling.table import ROWS
from ..naming import told_overrides
from ..sharing.text import format_table, megabytes

HELP = "sizes, shapes and bits of a checkpoint, from its headers"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")


def run(args: argparse.Namespace) -> None:
    """Prints what a checkpoint consists of."""
    check_source(args.model)
    print(describe(read_info(args.model)))


def describe(info: CheckpointInfo) -> str:
    """Returns the lines that `crvq info` prints."""
    architecture = ", ".join(info.config.get("architectures") or [info.config.get("model_type", "unknown")])
    lines = [f"{'checkpoint':<15} {info.source} ({architecture})"]
    lines.append(f"{'whole size':<15} {megabytes(info.nbytes)} in {info.num_files} files")
    if info.crvq is None:
        lines.append(f"{'quantized':<15} nothing: this checkpoint has no CRVQ layers")
    else:
        layers = info.layers.values()
        nbytes, weights = (sum(getattr(layer, key) for layer in layers) for key in ("nbytes", "num_weights"))
        lines += [
            f"{'quantized':<15} {len(layers)} layers, {weights:,} weights, {megabytes(nbytes)}: "
            f"{info.bits_per_weight:.3f} bits per weight (codes, codebooks, scales and channel order)",
            *_embedding_rows(info),
            "{:<15} {:.1%} of the weights of the blocks, {:.1%} of all".format("stay dense", *info.dense_shares),
            f"{'method':<15} {_method(info.crvq)}",
            "",
            *_layer_table(info),
        ]
    dense = info.dense
    lines += ["", f"{'not quantized':<15} {len(dense)} tensors, {megabytes(sum(t.nbytes for t in dense.values()))}"]
    lines += [f"  {row}" for row in _dense_rows(dense)]
    return "\n".join(lines)


def _method(config: CRVQConfig) -> str:
    return (
        f"{config.nbits_per_codebook} bits per code of {config.in_group_size} channels, "
        f"extended codebooks: {config.num_extended_codebooks} for {config.critical_ratio:g} of the channels, "
        f"{config.codebook_bits}-bit codebook entries, "
        f"importance {config.importance!r}, format version {config.format_version}{told_overrides(config.overrides)}"
    )


def _embedding_rows(info: CheckpointInfo) -> list[str]:
    """Returns a line on the embeddings that are quantized, none where they are dense."""
    parts = embedding_modules(info.tensors)
    if not parts:
        return []
    nbytes, shapes = embedding_bytes(info.tensors), [embedding_shape(info.tensors, part) for part in parts]
    rows, weights = sum(rows for rows, _ in shapes), sum(rows * channels for rows, channels in shapes)
    what = "int8 rows and a float16 scale for each"
    if info.crvq.has_coded_embeddings:
        frequent = sum(math.prod(info.tensors[f"{part}.{ROWS}"].shape) for part in parts)
        what = f"{8 * nbytes / weights:.3f} bits per weight, finer ones for {frequent:,} rows of frequent tokens"
    return [
        f"{'embeddings':<15} {' and '.join(parts)} in {info.crvq.embedding_bits:g} bits, {rows:,} rows, "
        f"{megabytes(nbytes)} ({nbytes:,} bytes: {what})"
    ]


def _kind(name: str) -> str:
    """Returns a tensor or module name with a star for every number: `layers.3.mlp` is of the kind `layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _layer_table(info: CheckpointInfo) -> list[str]:
    """Returns a header and one row per kind of quantized layer."""
    rows: dict[tuple, int] = {}
    for name, layer in info.layers.items():
        shape = info.crvq.of_layer(name).layer_shape(layer.in_features, layer.out_features)
        books, size, group = info.tensors[f"{name}.weight_codebooks"].shape
        row = (
            _kind(name),
            f"{layer.out_features} x {layer.in_features}",
            f"{books} of {size} x {group}",
            f"{shape.num_critical_groups * group} of {layer.in_features}",
            info.tensors[f"{name}.weight_order"].dtype,
            f"{layer.bits_per_weight:.3f}",
        )
        rows[row] = rows.get(row, 0) + 1
    titles = ("layer", "out x in", "codebooks", "critical channels", "order", "bits/weight", "count")
    return format_table([titles, *((*row, str(count)) for row, count in rows.items())])


def _dense_rows(dense: dict[str, TensorInfo], most: int = 6) -> list[str]:
    """Returns one line per kind of dense tensor, the largest first, and one for the rest."""
    kinds: dict[str, list[TensorInfo]] = {}
    for name, tensor in dense.items():
        kinds.setdefault(_kind(name), []).append(tensor)
    sizes = sorted(((sum(t.nbytes for t in ts), kind, ts) for kind, ts in kinds.items()), key=lambda item: -item[0])
    rows = [
        f"{megabytes(nbytes)}  {kind} ({len(tensors)} of {list(tensors[0].shape)}, {tensors[0].dtype})"
        for nbytes, kind, tensors in sizes[:most]
    ]
    if len(sizes) > most:
        rows.append(f"{megabytes(sum(item[0] for item in sizes[most:]))}  {len(sizes) - most} other kinds")
    return rows
