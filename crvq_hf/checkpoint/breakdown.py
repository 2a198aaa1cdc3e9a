"""What a quantized checkpoint spends its bits on and how well its layers came out, by block and by kind of layer."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .headers import LayerSize, embedding_bytes
from .info import CheckpointInfo

PARTS = ("codes", "extended codes", "codebooks", "scales", "channel order")
_BLOCK = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


@dataclass(frozen=True)
class Kind:
    """All quantized layers with the same role, such as every block's `q_proj` or all experts' `up_proj`.

    Attributes:
        name: the shortest ending of the layers' names that no other kind has.
        layers: names of the layers.
        mean_error: mean of their relative squared output errors, None where they are not known.
        worst_error: the largest of these.
        worst_layer: the layer that has it.
        bits_per_weight: stored bits per weight over all of them.
    """

    name: str
    layers: list[str]
    mean_error: float | None
    worst_error: float | None
    worst_layer: str | None
    bits_per_weight: float


@dataclass(frozen=True)
class Breakdown:
    """A checkpoint in numbers.

    Attributes:
        blocks: numbers of the decoder blocks that have quantized layers.
        kinds: the kinds of layers, as they come.
        errors: `[kinds][blocks]`, mean relative squared output error, NaN where a block has no such layer.
        per_cell: layers of one kind in one block at most; more than 1 for experts.
        block_bits: bits per weight by part, `[blocks]` each.
        quantized_bytes: bytes of the quantized layers by part, exact to the bit.
        embedding_bytes: bytes of embeddings and heads that are quantized; 0 where they are dense.
        dense_bytes: bytes of all other tensors by a short name, the largest first.
        file_bytes: bytes of the safetensors files.
    """

    blocks: list[int]
    kinds: list[Kind]
    errors: list[list[float]]
    per_cell: int
    block_bits: dict[str, list[float]]
    quantized_bytes: dict[str, float]
    embedding_bytes: int
    dense_bytes: dict[str, int]
    file_bytes: int


def break_down(info: CheckpointInfo, report: dict[str, Any] | None = None) -> Breakdown:
    """Returns the numbers of a CRVQ checkpoint in a folder.

    Args:
        info: the checkpoint.
        report: of the run that made it; its `layers` give the errors.
    """
    errors = {name: line["relative_error"] for name, line in (report or {"layers": {}})["layers"].items()}
    sizes = info.layers
    names = dict.fromkeys(name for name in (*errors, *sizes) if name in sizes)  # in the order of the model
    places = {name: _place(name) for name in names}
    cells: dict[tuple[str, int], list[str]] = {}
    for name, (block, kind) in places.items():
        cells.setdefault((kind, block), []).append(name)
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = sorted({block for block, _ in places.values()})
    parts = {name: _layer_bits(info, name, sizes[name]) for name in places}
    weights = {name: size.num_weights for name, size in sizes.items()}
    in_block = {block: [name for name, place in places.items() if place[0] == block] for block in blocks}
    return Breakdown(
        blocks=blocks,
        kinds=[
            _kind(label, [name for name, place in places.items() if place[1] == kind], errors, parts, weights)
            for kind, label in zip(kinds, shortest_endings(kinds), strict=True)
        ],
        errors=[[_mean(errors, cells.get((kind, block), [])) for block in blocks] for kind in kinds],
        per_cell=max(map(len, cells.values())),
        block_bits={
            part: [sum(parts[n][part] for n in names) / sum(weights[n] for n in names) for names in in_block.values()]
            for part in PARTS
        },
        quantized_bytes={part: sum(bits[part] for bits in parts.values()) / 8 for part in PARTS},
        embedding_bytes=embedding_bytes(info.tensors),
        dense_bytes=_dense_bytes(info),
        file_bytes=sum(Path(file).stat().st_size for file in {tensor.file for tensor in info.tensors.values()}),
    )


def shortest_endings(names: list[str]) -> list[str]:
    """Returns the shortest dotted ending of every name that no other name has."""
    endings = []
    for name in names:
        parts, others = name.split("."), [f".{other}" for other in names if other != name]
        candidates = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        endings.append(next((end for end in candidates if not any(o.endswith(f".{end}") for o in others)), name))
    return endings


def _place(name: str) -> tuple[int, str]:
    """Returns the number of a layer's block and its name inside the block without numbers (of experts)."""
    match = _BLOCK.fullmatch(name)
    block, rest = (int(match[1]), match[2]) if match else (0, name)
    return block, ".".join(part for part in rest.split(".") if not part.isdigit())


def _layer_bits(info: CheckpointInfo, name: str, layer: LayerSize) -> dict[str, int]:
    """Returns the stored bits of one layer by part; what pads a row to bytes counts to its last codes."""
    shape = info.crvq.of_layer(name).layer_shape(layer.in_features, layer.out_features)
    stored = {key: 8 * info.tensors[f"{name}.{key}"].nbytes for key in ("weight", "weight_codebooks", "weight_scale")}
    base = layer.out_features * shape.num_groups * shape.nbits if shape.num_codebooks > 1 else stored["weight"]
    return {
        "codes": base,
        "extended codes": stored["weight"] - base,
        "codebooks": stored["weight_codebooks"],
        "scales": stored["weight_scale"],
        "channel order": 8 * info.tensors[f"{name}.weight_order"].nbytes,
    }


def _kind(name: str, layers: list[str], errors: dict, parts: dict, weights: dict) -> Kind:
    """Returns what the layers of one kind have in common."""
    known = {layer: errors[layer] for layer in layers if layer in errors}
    worst = max(known, key=known.get, default=None)
    return Kind(
        name=name,
        layers=layers,
        mean_error=_mean(errors, layers) if known else None,
        worst_error=known.get(worst),
        worst_layer=worst,
        bits_per_weight=sum(sum(parts[layer].values()) for layer in layers) / sum(map(weights.get, layers)),
    )


def _dense_bytes(info: CheckpointInfo) -> dict[str, int]:
    """Returns the bytes of what is not quantized by kind of tensor, the largest first."""
    sizes: dict[str, int] = {}
    for name, tensor in info.dense.items():
        kind = _place(name.removesuffix(".weight"))[1]
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    names = shortest_endings([kind for kind, _ in ordered])
    return {name: nbytes for name, (_, nbytes) in zip(names, ordered, strict=True)}


def _mean(errors: dict[str, float], names: Iterable[str]) -> float:
    """Returns the mean of the errors that are known of some layers, NaN if there is none."""
    values = [errors[name] for name in names if name in errors]
    return sum(values) / len(values) if values else math.nan
