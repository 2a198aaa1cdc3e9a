"""What a safetensors checkpoint holds, read from the headers of its files: no tensor is loaded.

A safetensors file is 8 bytes, the little-endian length of the header, then the header in JSON (name -> dtype, shape,
data_offsets), then the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import ROW_BITS, CRVQConfig
from ..modeling.table import BASIS, GROUP, ROW_SCALE, TABLE_NAMES, TableShape
from ..quantized_weight import TENSOR_NAMES

COMPANION_NAMES = TENSOR_NAMES[1:]
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        shape: sizes of its dimensions.
        dtype: safetensors' name for its dtype, e.g. "F16".
        nbytes: bytes it takes in the file.
        file: path of the file it is in.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str


@dataclass(frozen=True)
class LayerSize:
    """Size of one quantized layer of a checkpoint.

    Attributes:
        in_features: K.
        out_features: N.
        nbytes: stored bytes of its codes, codebooks, scales and channel order.
    """

    in_features: int
    out_features: int
    nbytes: int

    @property
    def num_weights(self) -> int:
        """N * K."""
        return self.in_features * self.out_features

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, channel order counted, per weight of the dense layer."""
        return self.nbytes * 8 / self.num_weights


def read_headers(source: str | os.PathLike | Iterable[str | os.PathLike]) -> dict[str, TensorInfo]:
    """Returns every tensor of a checkpoint by name.

    Args:
        source: a folder with `model.safetensors` or a sharded `model.safetensors.index.json`, one file, or a list of
            files.

    Raises:
        ValueError: no checkpoint is there, a file is missing, truncated or damaged.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        files = files_of_folder(path) if path.is_dir() else [path]
    else:
        files = [Path(file) for file in source]
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_read_header(file)[0])
    return tensors


def read_metadata(file: str | os.PathLike) -> dict[str, str]:
    """Returns the metadata of one safetensors file.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    return _read_header(Path(file))[1]


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """Returns the names of the modules that have CRVQ tensors beside their weight, in the order they come."""
    suffixes = tuple(f".{name}" for name in COMPANION_NAMES)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(suffixes)))


def embedding_modules(tensors: Iterable[str]) -> list[str]:
    """Returns the names of the embeddings and heads that are stored as quantized rows, in the order they come."""
    return [name.removesuffix(f".{ROW_SCALE}") for name in tensors if name.endswith(f".{ROW_SCALE}")]


def embedding_bytes(tensors: dict[str, TensorInfo]) -> int:
    """Returns the stored bytes of the embeddings and heads that are quantized, all of their tensors counted.

    Raises:
        ValueError: one lacks its weight.
    """
    parts = {module: embedding_tensors(tensors, module) for module in embedding_modules(tensors)}
    return sum(_require(tensors, f"{module}.{name}").nbytes for module, names in parts.items() for name in names)


def embedding_tensors(tensors: dict[str, TensorInfo], module: str) -> tuple[str, ...]:
    """Returns the names that the tensors of a quantized embedding or head have in it."""
    return TABLE_NAMES if f"{module}.{BASIS}" in tensors else ("weight", ROW_SCALE)


def embedding_shape(tensors: dict[str, TensorInfo], module: str) -> tuple[int, int]:
    """Returns `[V, K]`, the shape of the dense weight of a quantized embedding or head.

    Raises:
        ValueError: a tensor is missing, or of another number of dimensions.
    """
    weight, basis = _require(tensors, f"{module}.weight"), tensors.get(f"{module}.{BASIS}")
    shape = (*weight.shape[:1], *(weight if basis is None else basis).shape[-1:])
    if len(weight.shape) != 2 or len(shape) != 2 or 0 in shape:
        raise ValueError(f"The checkpoint has {module}.weight of shape {list(weight.shape)}, expected [V, H].")
    return shape


def layer_sizes(tensors: dict[str, TensorInfo]) -> dict[str, LayerSize]:
    """Returns the size of every CRVQ layer of a checkpoint by module name.

    Raises:
        ValueError: a layer lacks one of its tensors.
    """
    sizes = {}
    for module in quantized_modules(tensors):
        stored = {name: _require(tensors, f"{module}.{name}") for name in TENSOR_NAMES}
        sizes[module] = LayerSize(
            in_features=math.prod(stored["weight_order"].shape),
            out_features=math.prod(stored["weight_scale"].shape),
            nbytes=sum(info.nbytes for info in stored.values()),
        )
    return sizes


def bits_per_weight(tensors: dict[str, TensorInfo]) -> float:
    """Returns stored bits per weight over all CRVQ layers of a checkpoint, channel orders counted.

    Raises:
        ValueError: the checkpoint has no CRVQ layer, or one lacks a tensor.
    """
    sizes = layer_sizes(tensors).values()
    if not sizes:
        raise ValueError(f"None of the {len(tensors)} tensors of the checkpoint belongs to a CRVQ layer.")
    return sum(size.nbytes for size in sizes) * 8 / sum(size.num_weights for size in sizes)


def check_embeddings(tensors: dict[str, TensorInfo], config: CRVQConfig) -> None:
    """Checks that the checkpoint has quantized embeddings if its config says so, and that they fit together.

    Raises:
        ValueError: tensors and config contradict each other, or a tensor is missing.
    """
    stored = embedding_modules(tensors)
    coded = [module for module in stored if f"{module}.{BASIS}" in tensors]
    if bool(stored) != (config.embedding_bits <= ROW_BITS) or bool(coded) != config.has_coded_embeddings:
        raise ValueError(
            f"The checkpoint contradicts its config: embedding_bits is {config.embedding_bits}, "
            f"{'rows of codes' if coded else '8-bit rows'} are stored for {', '.join(stored) or 'nothing'}; download "
            "or save it again."
        )
    for module in coded:
        _check_table(tensors, module, config.embedding_bits)
    for module in stored if not coded else ():
        weight, scales = _require(tensors, f"{module}.weight"), tensors[f"{module}.{ROW_SCALE}"]
        is_float = scales.dtype in ("F16", "BF16", "F32")  # in the model's dtype if saved from an offloaded model
        if weight.dtype != "I8" or not is_float or scales.shape != weight.shape[:1] or len(weight.shape) != 2:
            raise ValueError(
                f"The shapes in the checkpoint contradict its config: {module}.weight is {weight.dtype} "
                f"{list(weight.shape)}, {module}.{ROW_SCALE} is {scales.dtype} {list(scales.shape)}, "
                "expected I8 [V, H] and F16 [V]."
            )


def _check_table(tensors: dict[str, TensorInfo], module: str, bits: float) -> None:
    """Raises ValueError unless the tensors of an embedding or a head are those of a table of these bits."""
    num_rows, num_channels = embedding_shape(tensors, module)
    if num_channels % GROUP:
        raise ValueError(f"The checkpoint has codes for {module}, whose {num_channels} channels cannot have any.")
    for name, (shape, dtype) in TableShape(num_rows, num_channels, bits).tensors().items():
        found = _require(tensors, f"{module}.{name}")
        fits = found.dtype in ("F16", "BF16", "F32") if dtype.is_floating_point else DTYPES.get(found.dtype) == dtype
        if found.shape != shape or not fits:
            raise ValueError(
                f"The shapes in the checkpoint contradict its config: {module}.{name} is {found.dtype} "
                f"{list(found.shape)}, expected {_dtype_name(dtype)} {list(shape)}."
            )


def check_layer(
    tensors: dict[str, TensorInfo], module: str, config: CRVQConfig, in_features: int, out_features: int, bias: bool
) -> None:
    """Checks that the tensors stored for one layer are those which the model and the config ask for.

    Args:
        tensors: the checkpoint.
        module: name of the layer in the checkpoint.
        config: the CRVQ config of the checkpoint.
        in_features: K in the model.
        out_features: N in the model.
        bias: whether the model's layer has one.

    Raises:
        ValueError: a tensor is missing, or its shape or dtype contradicts the config.
    """
    for name, (shape, dtype) in config.of_layer(module).layer_shape(in_features, out_features).tensors().items():
        found = _require(tensors, f"{module}.{name}")
        if found.shape != shape or DTYPES.get(found.dtype) != dtype:
            raise ValueError(
                f"The shapes in the checkpoint contradict its config: {module}.{name} is {found.dtype} "
                f"{list(found.shape)}, expected {_dtype_name(dtype)} {list(shape)}."
            )
    if bias and _require(tensors, f"{module}.bias").shape != (out_features,):
        found = tensors[f"{module}.bias"]
        raise ValueError(
            f"The shapes in the checkpoint contradict its config: {module}.bias is {list(found.shape)}, "
            f"expected {[out_features]}."
        )


def _require(tensors: dict[str, TensorInfo], name: str) -> TensorInfo:
    if name not in tensors:
        raise ValueError(f"The checkpoint lacks the tensor {name}; it is incomplete, save or download it again.")
    return tensors[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def read_index(folder: Path) -> dict[str, str] | None:
    """Returns the name of the file that each tensor of a sharded checkpoint is in, None if it is not sharded.

    Raises:
        ValueError: the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(name, str) and name and Path(name).name == name for name in places.values()):
            return dict(places)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError):
        pass
    raise ValueError(f"{index} is damaged: it is no JSON with a 'weight_map' to file names; download it again.")


def files_of_folder(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint folder.

    Raises:
        ValueError: there are none, or their index is damaged.
    """
    index = read_index(folder)
    if index is not None:
        return [folder / name for name in sorted(set(index.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder} holds no model.safetensors and no model.safetensors.index.json.")


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors of one safetensors file by name, and its metadata."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            text = file.read(length) if 8 + length <= size else b""
    except (OSError, ValueError) as error:  # a ValueError on a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}); the checkpoint is incomplete.") from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        _check_strings(metadata)
        tensors = {name: _tensor_info(entry, path) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        raise ValueError(f"{path} is no safetensors file, or its header is damaged; download it again.") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is truncated or damaged: its header announces {8 + length + end} bytes, the file has {size}."
        )
    return tensors, metadata


def _tensor_info(entry: dict, path: Path) -> TensorInfo:
    """Returns one entry of a header.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    shape, dtype, (start, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(dtype, str):
        raise TypeError
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)) or start > end:
        raise ValueError
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError
    return TensorInfo(tuple(shape), dtype, end - start, str(path))


def _check_strings(metadata: dict) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError
