"""A dense model larger than memory: what is outside of its blocks is loaded, each block is read when it is run.

All of it goes through transformers' own loading, so names, dtypes, tied and fused weights are what `from_pretrained`
makes of them. Files are read, not mapped: what is mapped counts where a limit is on addresses (`ulimit -v`).
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..blocks.absent import leave_absent_
from ..blocks.finding import named_blocks
from ..modeling.experts import UnfusedExperts
from ..modeling.stacks import StackedLinears, unfuse_stacks_
from ..resources import distributed
from ..resources.memory import give_back_freed_memory
from .headers import DTYPES, TensorInfo, read_headers

logger = logging.getLogger("crvq")

MEMORY_SHARE = 0.5  # of free memory for a dense model; a larger one is read block by block


class BlockFiles:
    """The files of a dense checkpoint, and which of their tensors belong to which block of a model."""

    def __init__(self, shell: PreTrainedModel, tensors: dict[str, TensorInfo]) -> None:
        """Looks up where each tensor belongs.

        Args:
            shell: the model on the meta device, as transformers has built it.
            tensors: of the checkpoint, by name, see `read_headers`.
        """
        self._shell, self.tensors = shell, tensors
        mapping = get_model_conversion_mapping(shell)
        plan = shell._get_dtype_plan(shell.dtype)
        self._loading = LoadStateDictConfig(dtype=shell.dtype, dtype_plan=plan, weight_mapping=mapping)
        self.blocks = list(named_blocks(shell))
        # By block; of what is outside under an empty name.
        self._keys: dict[str, list[str]] = defaultdict(list)
        known, prefix = shell.state_dict(), shell.base_model_prefix
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        for key in tensors:
            name, _ = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, _ = rename_source_key(key, [], [], prefix, known)
            self._keys[self.block_of(name)].append(key)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def can_be_left(self) -> bool:
        """Whether blocks can be read alone: none shares a weight, and the model's first parameter is in none."""
        tied = self._shell.all_tied_weights_keys
        first = next(name for name, _ in self._shell.named_parameters())
        return not any(map(self.block_of, [first, *tied, *tied.values()]))

    def block_of(self, name: str) -> str:
        """Returns the block that a tensor of the model is in, an empty name for none."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), "")

    def state_dict(self) -> dict[str, Any]:
        """Returns what transformers loads: what is outside of the blocks, and stand-ins for the rest."""
        outside = self._slices("")
        left = {key: _Left(self.tensors[key]) for key in self.tensors if key not in outside}
        return outside | left

    def leave_(self, model: nn.Module) -> None:
        """Makes all blocks of a model absent; their weights, as `state_dict` has left them, are on the meta device."""
        for name in self.blocks:
            leave_absent_(model.get_submodule(name), lambda block, name=name: self._read(name, block))
        size, blocks = self.nbytes / 1e9, len(self.blocks)
        logger.info("The model has %.1f GB, more than fits: each of its %d blocks is read when needed.", size, blocks)

    def _slices(self, block: str) -> dict[str, Any]:
        """Returns the tensors of a block, to be read, by their names in the files."""
        files = {self.tensors[key].file for key in self._keys[block]}
        opened = {file: _opened(file) for file in files}
        return {key: opened[self.tensors[key].file].get_slice(key) for key in self._keys[block]}

    def _read(self, name: str, block: nn.Module) -> nn.Module:
        """Returns a module with the weights of a block, its experts taken apart where they are in `block`."""
        give_back_freed_memory()  # of the block before
        empty = self._shell.get_submodule(name)
        config = self._shell.config
        self._shell.set_submodule(name, copy.deepcopy(empty, {id(config): config}))
        try:
            with _no_progress():
                info, _ = convert_and_load_state_dict_in_model(self._shell, self._slices(name), self._loading)
            if info.mismatched_keys or info.conversion_errors:
                what = sorted(str(key) for key, *_ in [*info.mismatched_keys, *info.conversion_errors.items()])
                raise ValueError(f"The checkpoint does not fit {type(self._shell).__name__}: see {what[0]}.")
            read = self._shell.get_submodule(name)
        finally:
            self._shell.set_submodule(name, empty)
        for path, module in block.named_modules():
            if isinstance(module, UnfusedExperts):
                read.set_submodule(path, UnfusedExperts(read.get_submodule(path)))
            elif isinstance(module, StackedLinears):
                unfuse_stacks_(read, {path: (module.stack, module.layout)})
        return read


class _Left:
    """Stands for a tensor that is not read: wherever it is moved to, it is on the meta device."""

    def __init__(self, tensor: TensorInfo) -> None:
        self.shape, self.dtype = tensor.shape, DTYPES.get(tensor.dtype, torch.uint8)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> _Left:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


class LeftOut:
    """An operation of transformers' loading that drops what was read of a tensor; it stays on the meta device."""

    def convert(self, tensors: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, nn.Parameter]:
        """Returns the model's own tensors, which are on the meta device, for those that were read."""
        return {name: model.get_parameter_or_buffer(name) for name in tensors}


def files_if_large(model: PreTrainedModel, files: list[str]) -> BlockFiles | None:
    """Returns the files of a model on the meta device that is about to be loaded, None as for `load_if_large`."""
    if not (files and all(str(file).endswith(".safetensors") for file in files) and model.device.type == "meta"):
        return None
    tensors = read_headers(files)
    return _left_in(copy.deepcopy(model), tensors) if _is_large(tensors) else None


def _is_large(tensors: dict[str, TensorInfo]) -> bool:
    size = sum(tensor.nbytes for tensor in tensors.values())
    return size > MEMORY_SHARE * distributed.free_memory_bytes()


def _left_in(shell: PreTrainedModel, tensors: dict[str, TensorInfo]) -> BlockFiles | None:
    """Returns the files of a model if its blocks can be left there."""
    found = BlockFiles(shell.eval(), tensors)
    return found if found.can_be_left else None


def load_if_large(kind: Any, source: str, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel | None:
    """Returns a model with absent blocks, None for one that fits in memory or cannot be read block by block.

    Args:
        kind: class to load it with.
        source: folder or hub id.
        config: of the model.
        options: loading options.
    """
    where = {key: value for key, value in options.items() if key != "trust_remote_code"}
    files = _safetensors(source, config, where)
    if not files:
        return None
    tensors = read_headers(files)
    if not _is_large(tensors):
        return None
    dtype = config.dtype or next(d for t in tensors.values() if (d := DTYPES.get(t.dtype)) and d.is_floating_point)
    shell = empty_model(kind, config, dtype, options)
    found = _left_in(shell, tensors)
    if found is None:
        return None
    model = type(shell).from_pretrained(None, config=config, state_dict=found.state_dict(), dtype=dtype)
    model.config.name_or_path = model.name_or_path = source
    if model.can_generate():
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        where = {name: where.get(name) for name in names} | {"subfolder": where.get("subfolder", "")}
        where["local_files_only"], where["force_download"] = bool(where["local_files_only"]), False
        trusted = options.get("trust_remote_code")
        model.adjust_generation_fn(None, True, None, source, **where, trust_remote_code=trusted)
    found.leave_(model)
    return model


def empty_model(kind: Any, config: PreTrainedConfig, dtype: Any, options: dict[str, Any]) -> PreTrainedModel:
    """Returns a model on the meta device: it has shapes, and takes no memory.

    Args:
        kind: class to make, one of transformers' auto classes or a model's own.
        config: of the model; is copied.
        dtype: of its parameters.
        options: loading options.
    """
    trusted = {key: value for key, value in options.items() if key in ("trust_remote_code", "revision")}
    make = getattr(kind, "from_config", None)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype) if make is None else make(config, dtype=dtype, **trusted)
    return model.eval()


def _safetensors(source: str, config: PreTrainedConfig, where: dict[str, Any]) -> list[str]:
    """Returns the safetensors files that transformers would load a model from; none where it is in others."""
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return []
    quiet = {"_raise_exceptions_for_missing_entries": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **where, **quiet)
    if whole is not None:
        return [whole]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where, **quiet)
    return [] if index is None else get_checkpoint_shard_files(source, index, **where)[0]


def _opened(file: str) -> Any:
    """Returns a safetensors file whose tensors are read into memory of their own; mapped by an old safetensors."""
    try:
        return safe_open(file, "pt", backend="pread")
    except TypeError:
        return safe_open(file, "pt")


@contextmanager
def _no_progress() -> Iterator[None]:
    """Shows no progress bars of transformers while inside."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
