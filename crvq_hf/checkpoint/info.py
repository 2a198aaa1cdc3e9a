"""What a checkpoint consists of, read from its JSON files and safetensors headers."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from ..config import QUANT_METHOD, CRVQConfig
from ..quantized_weight import TENSOR_NAMES
from .headers import (
    TensorInfo,
    bits_per_weight,
    embedding_modules,
    embedding_shape,
    embedding_tensors,
    layer_sizes,
    read_headers,
)

_BLOCK = re.compile(r"(.*?\.|)\d+\.")  # the list of blocks that a name leads into


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
        """The tensors that are not part of a quantized weight or embedding; biases are among them."""
        parts = embedding_modules(self.tensors)
        inside = {f"{layer}.{name}" for layer in self.layers for name in TENSOR_NAMES}
        inside |= {f"{part}.{name}" for part in parts for name in embedding_tensors(self.tensors, part)}
        return {name: tensor for name, tensor in self.tensors.items() if name not in inside}

    @property
    def layers(self) -> dict[str, Any]:
        """`LayerSize` of every quantized layer by name."""
        return layer_sizes(self.tensors)

    @property
    def dense_shares(self) -> tuple[float, float]:
        """The shares of the weights that stay dense: of those in blocks that have quantized layers, and of all.

        Weights are tensors of two or more dimensions; codes count as the weights they stand for.
        """
        layers = self.layers
        prefixes = {match[1] for match in map(_BLOCK.match, layers) if match}
        dense = {name: math.prod(tensor.shape) for name, tensor in self.dense.items() if len(tensor.shape) > 1}
        inside = [count for name, count in dense.items() if (match := _BLOCK.match(name)) and match[1] in prefixes]
        quantized = sum(layer.num_weights for layer in layers.values())
        rows = sum(math.prod(embedding_shape(self.tensors, part)) for part in embedding_modules(self.tensors))
        return _share(sum(inside), quantized), _share(sum(dense.values()), quantized + rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, channel orders counted."""
        return bits_per_weight(self.tensors)


def _share(part: int, rest: int) -> float:
    return part / max(1, part + rest)


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
