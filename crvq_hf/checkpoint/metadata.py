"""What we write into the metadata of a safetensors file: the format version, and hashes that `verify` checks."""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

# Keys of the metadata in a safetensors file.
VERSION_KEY, HASHES_KEY, CONFIG_HASH_KEY = "crvq_format_version", "crvq_sha256", "crvq_config_sha256"


def tensor_hash(tensor: torch.Tensor) -> str:
    """Returns the sha256 of a line with dtype and shape, as in "float16 [3, 4]", and of the bytes of a tensor."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(head.encode())
    digest.update(data)
    return digest.hexdigest()


def json_hash(text: str) -> str:
    """Returns the sha256 of what a JSON text says, however it is laid out.

    Raises:
        ValueError: it is no JSON.
    """
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def metadata_of(model: nn.Module, format_version: int) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
    """Returns what is saved of `model` (None: its state dict) and what the metadata of its files will say.

    That is the format version and, unless an adapter is saved or a part is offloaded, sha256 of every tensor and of
    config.json.
    """
    metadata = {VERSION_KEY: str(format_version)}
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return None, metadata
    state_dict = model.state_dict()
    if not any(tensor.is_meta for tensor in state_dict.values()):
        tied = (getattr(model, "all_tied_weights_keys", None) or {}).items()
        twice = {name for name, source in tied if _is_same(state_dict.get(name), state_dict.get(source))}
        hashes = {name: tensor_hash(tensor) for name, tensor in state_dict.items() if name not in twice}
        metadata[HASHES_KEY] = json.dumps(hashes)
        if getattr(model, "_auto_class", None) is None:  # else code is saved, and its names in the config
            metadata[CONFIG_HASH_KEY] = _config_hash(model)
    return state_dict, metadata


def _is_same(tensor: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Returns whether two entries of a state dict are one tensor in memory, of which only one is saved."""
    return tensor is not None and other is not None and tensor.data_ptr() == other.data_ptr()


def _config_hash(model: PreTrainedModel) -> str:
    """Returns the hash of the config.json that `save_pretrained` is about to write."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return json_hash((Path(folder) / "config.json").read_text(encoding="utf-8"))
