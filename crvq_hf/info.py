"""What a checkpoint consists of, read from its JSON files and safetensors headers."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .checkpoint import TensorInfo, bits_per_weight, embedding_bytes, embedding_modules, layer_sizes, read_headers
from .config import QUANT_METHOD, CRVQConfig
from .embedding import ROW_SCALE
from .quantized_weight import TENSOR_NAMES


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a folder or on the hub.

    Attributes:
        source: the folder or hub id.
        config: its config.json.
        crvq: its CRVQ config, None for a dense checkpoint.
        tensors: every tensor by name.
        nbytes: bytes of all its files.
        num_files: how many files that are.
    """

    source: str
    config: dict[str, Any]
    crvq: CRVQConfig | None
    tensors: dict[str, TensorInfo]
    nbytes: int
    num_files: int

    @property
    def dense(self) -> dict[str, TensorInfo]:
        """The tensors that are not part of a quantized weight or 8-bit embedding; biases are among them."""
        inside = {f"{layer}.{name}" for layer in self.layers for name in TENSOR_NAMES}
        inside |= {f"{part}.{name}" for part in embedding_modules(self.tensors) for name in ("weight", ROW_SCALE)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in inside}

    @property
    def layers(self) -> dict[str, Any]:
        """`LayerSize` of every quantized layer by name."""
        return layer_sizes(self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, channel orders counted."""
        return bits_per_weight(self.tensors)


def read_info(source: str) -> CheckpointInfo:
    """Returns what a checkpoint consists of.

    Args:
        source: folder, or hub id; of a model on the hub only JSON files and headers are fetched.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of an unknown format.
        OSError: the hub cannot be reached.
    """
    if os.path.isdir(source):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json, so it is no checkpoint.")
        config_file, tensors = folder / "config.json", read_headers(folder)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    else:
        config_file = Path(cached_file(source, "config.json"))
        tensors, sizes = _read_hub(source)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        stored = config.get("quantization_config")
        method = stored and stored.get("quant_method")
    except (ValueError, AttributeError):
        raise ValueError(f"{config_file} is damaged: it is no JSON object; download or save it again.") from None
    crvq = CRVQConfig.from_dict(stored) if method == QUANT_METHOD else None
    return CheckpointInfo(source, config, crvq, tensors, sum(sizes), len(sizes))


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
            f"{'method':<15} {_method(info.crvq)}",
            "",
            *_layer_table(info),
        ]
    dense = info.dense
    lines += ["", f"{'not quantized':<15} {len(dense)} tensors, {megabytes(sum(t.nbytes for t in dense.values()))}"]
    lines += [f"  {row}" for row in _dense_rows(dense)]
    return "\n".join(lines)


def megabytes(nbytes: int) -> str:
    """Returns a size in MB (10**6 bytes), with as many digits as are of interest."""
    return f"{nbytes / 1e6:,.{1 if nbytes >= 1e6 else 3}f} MB"


def _method(config: CRVQConfig) -> str:
    return (
        f"{config.nbits_per_codebook} bits per code of {config.in_group_size} channels, "
        f"extended codebooks: {config.num_extended_codebooks} for {config.critical_ratio:g} of the channels, "
        f"{config.codebook_bits}-bit codebook entries, "
        f"importance {config.importance!r}, format version {config.format_version}"
    )


def _embedding_rows(info: CheckpointInfo) -> list[str]:
    """Returns a line on the embeddings in 8 bits, none where they are dense."""
    parts = embedding_modules(info.tensors)
    if not parts:
        return []
    nbytes, rows = embedding_bytes(info.tensors), sum(info.tensors[f"{part}.{ROW_SCALE}"].shape[0] for part in parts)
    return [
        f"{'embeddings':<15} {' and '.join(parts)} in 8 bits, {rows:,} rows, {megabytes(nbytes)} ({nbytes:,} bytes: "
        "int8 rows and a float16 scale for each)"
    ]


def _kind(name: str) -> str:
    """Returns a tensor or module name with a star for every number: `layers.3.mlp` is of the kind `layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _layer_table(info: CheckpointInfo) -> list[str]:
    """Returns a header and one row per kind of quantized layer."""
    rows: dict[tuple, int] = {}
    for name, layer in info.layers.items():
        shape = info.crvq.layer_shape(layer.in_features, layer.out_features)
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


def format_table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Returns lines with the columns of `rows` aligned: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


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


def _read_hub(source: str) -> tuple[dict[str, TensorInfo], list[int]]:
    """Returns the tensors of a checkpoint on the hub and the bytes of each of its files."""
    from huggingface_hub import HfApi

    try:
        metadata = HfApi().get_safetensors_metadata(source)
        files = HfApi().model_info(source, files_metadata=True).siblings
    except Exception as error:  # whatever the hub client or the network raise
        raise OSError(f"{source} cannot be read from the hub ({type(error).__name__}: {error}).") from error
    tensors = {
        name: TensorInfo(tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0], file)
        for file, part in metadata.files_metadata.items()
        for name, info in part.tensors.items()
    }
    return tensors, [file.size or 0 for file in files]
