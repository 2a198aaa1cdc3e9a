"""What a model will take on disk once it is quantized, known before the work from names, shapes and dtypes."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..config import EMBEDDING_BITS, CRVQConfig
from ..dataset.grammar import shareable_dataset
from ..modeling.embedding import parts_of
from ..modeling.replace import is_dense_linear, linear_size
from ..modeling.table import stored_tensors
from .headers import DTYPES
from .metadata import CONFIG_HASH_KEY, HASHES_KEY, VERSION_KEY

# Bytes of the files beside the model by what they are, given the names of its quantized layers.
Beside = Callable[[Collection[str]], dict[str, int]]
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name

SHARD = 50 * 10**9  # bytes of a file of weights, `save_pretrained`'s own
TABLES = ("embedding", "head")
LINEARS, REST, FILES = "linears", "norms, biases, dense layers", "config and header"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8")  # the order of dtypes in a safetensors file
_HASH = 64 * "0"


class PlannedCheckpoint:
    """The files of a model that is about to be quantized.

    Args:
        model: dense, its experts unfused.
        tables: names of the embedding and the head that can be stored in so many bits.
        beside: see `Beside`; None if there are no such files.
    """

    def __init__(
        self, model: PreTrainedModel, tables: Callable[[float], Collection[str]], beside: Beside | None = None
    ) -> None:
        self.model, self.beside = model, beside
        once: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            once.setdefault(id(tensor), name)  # what is tied is stored once
        ignored = model._keys_to_ignore_on_save or ()
        self._tensors = {name: state[name] for name in once.values() if name not in ignored}
        self._tables = {bits: {f"{name}.weight" for name in tables(bits)} for bits in EMBEDDING_BITS}
        titles: dict[int, str] = {}
        for part, title in zip(parts_of(model), TABLES, strict=False):
            weight = id(getattr(part, "weight", None))
            titles[weight] = f"{titles[weight]} and {title}" if weight in titles else title
        self._parts = {name: titles[id(tensor)] for name, tensor in self._tensors.items() if id(tensor) in titles}
        self._dense = {name for name, module in model.named_modules() if is_dense_linear(module)}
        self._written = _written_bytes(model)

    def tables(self, bits: float) -> set[str]:
        """Returns which of the parts, as `parts` has them, can be stored in so many bits per weight."""
        return {title for name, title in self._parts.items() if name in self._tables[bits]}

    def parts(self, config: CRVQConfig, linears: Mapping[str, nn.Module]) -> dict[str, int]:
        """Returns the bytes of the whole checkpoint by part.

        Args:
            config: how it is quantized, without a budget.
            linears: the layers that are quantized, by name; those that its groups do not fit stay dense.
        """
        linears = {name: module for name, module in linears.items() if config.fits(name, linear_size(module)[0])}
        sizes, stored = dict.fromkeys((LINEARS, *self._parts.values(), REST), 0), {}
        for name, tensor in self._tensors.items():
            module, _, key = name.rpartition(".")
            if key == "weight" and module in linears:
                part, tensors = LINEARS, config.of_layer(module).layer_shape(*linear_size(linears[module])).tensors()
                tensors = {f"{module}.{one}": shape for one, shape in tensors.items()}
            elif name in self._tables[config.embedding_bits]:
                tensors = stored_tensors(*tensor.shape, config.embedding_bits)
                part, tensors = self._parts[name], {f"{module}.{one}": shape for one, shape in tensors.items()}
            else:
                part, tensors = self._parts.get(name, REST), {name: (tuple(tensor.shape), tensor.dtype)}
            sizes[part] += _data_bytes(tensors)
            stored |= tensors
        sizes[FILES] = _header_bytes(stored, config) + self._written + self._config_bytes(config, linears)
        return sizes | ({} if self.beside is None else self.beside(linears))

    def dense_bytes(self, config: CRVQConfig) -> int:
        """Returns the bytes of the whole checkpoint as it is now, nearly."""
        plain = copy.copy(config)
        plain.fit, plain.embedding_bits = None, 16
        return sum(self.parts(plain, {}).values())

    def _config_bytes(self, config: CRVQConfig, linears: Collection[str]) -> int:
        """Returns what a quantization config adds to config.json."""
        recorded = copy.copy(config)
        recorded.dataset = shareable_dataset(config.dataset)
        dense = {*(config.modules_to_not_convert or []), *self._dense - {*linears}}
        recorded.modules_to_not_convert = sorted(dense) or None
        alone = json.dumps({"quantization_config": recorded.to_dict()}, indent=2, sort_keys=True)
        return len(alone) - len("{\n\n}") + len(",\n")


def bytes_in(write: Callable[[Path], Any]) -> int:
    """Returns the bytes of all files that a function writes into the folder it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _written_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of the files that `save_pretrained` writes beside the weights, of the dense model.

    Its dtype and its class come into config.json only then.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # of a run that `from_pretrained` has begun
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]

    def write(folder: Path) -> None:
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    return bytes_in(write)


def _data_bytes(tensors: Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def _header_bytes(tensors: Tensors, config: CRVQConfig) -> int:
    """Returns the bytes of the headers of the safetensors files, and of their index if there are several."""
    dtypes = {name: _NAMES.get(dtype, "U8") for name, (_, dtype) in tensors.items()}
    names = sorted(tensors, key=lambda name: (_FIRST.index(dtypes[name]), name))
    entries, end = {}, 0
    for name in names:
        start, end = end, end + _data_bytes({name: tensors[name]})
        entries[name] = {"dtype": dtypes[name], "shape": [*tensors[name][0]], "data_offsets": [start, end]}
    hashes = json.dumps(dict.fromkeys(names, _HASH))
    metadata = {VERSION_KEY: str(config.format_version), HASHES_KEY: hashes, CONFIG_HASH_KEY: _HASH, "format": "pt"}
    shards = math.ceil(end / SHARD) if end else 1
    once = _packed(json.dumps({"__metadata__": metadata}, separators=(",", ":")))
    all_bytes = _packed(json.dumps({"__metadata__": metadata} | entries, separators=(",", ":"))) + (shards - 1) * once
    return all_bytes if shards == 1 else all_bytes + sum(len(name) + 48 for name in names)


def _packed(header: str) -> int:
    """Returns the bytes of a header in a file: its length before it, and spaces up to a multiple of 8 after it."""
    return 8 + math.ceil(len(header.encode()) / 8) * 8
