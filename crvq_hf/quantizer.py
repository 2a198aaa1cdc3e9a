"""`CRVQQuantizer`: how transformers quantizes, saves, loads and dequantizes a CRVQ model.

The only file that knows transformers' quantizer hooks. `from_pretrained` calls them in this order: `__init__`,
`validate_environment`, (the model is built on the meta device), `_process_model_before_weight_loading`,
`update_weight_conversions`, (the weights are loaded), `_process_model_after_weight_loading`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from . import checkpoint
from .blocks import find_blocks
from .budget import within_budget
from .config import QUANT_METHOD, CRVQConfig, shareable_dataset
from .embedding import (
    ROW_SCALE,
    Int8Embedding,
    Int8Head,
    dequantize_embeddings_,
    find_embeddings,
    fix_vocabulary_,
    quantize_embeddings_,
    replace_embeddings_,
)
from .experts import UnfusedExperts, find_fused_experts, fuse_experts_, unfuse_experts_
from .linear import CRVQLinear
from .replace import is_named_by, linear_size, quantizable_linears, replace_with_crvq_, to_dense

logger = logging.getLogger("crvq")


class CRVQQuantizer(HfQuantizer):
    """Connects CRVQ to `from_pretrained`, `save_pretrained` and `model.dequantize()`.

    A dense checkpoint is loaded as it is and quantized afterwards, block by block. A CRVQ checkpoint is loaded into
    `CRVQLinear` layers that stand exactly where the checkpoint has codes.
    """

    requires_calibration = False  # it does calibrate, but by itself: True would refuse dense checkpoints
    is_trainable = True  # adapters only
    is_compileable = True
    quantization_config: CRVQConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses to spread a model over several devices where its layers are about to be replaced.

        Raises:
            ValueError: on a device map that names several devices or the disk while the model is to be quantized,
                or is to be loaded as a dense one.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if self.pre_quantized and not self.quantization_config.dequantize:
            return
        if len(devices) > 1 or devices & {"disk", "meta"}:
            task = "dequantize a model" if self.pre_quantized else "quantize a model"
            raise ValueError(
                f"To {task} while loading, all of it must be on one device, but device_map spreads it over "
                f"{sorted(devices)}; pass device_map='cpu' (blocks move to the GPU one at a time)."
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Returns the renamings alone for a CRVQ checkpoint: it is stored in the model's own layout, nothing fused."""
        if not self.pre_quantized:
            return weight_conversions
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Puts `CRVQLinear` layers where the checkpoint has codes; leaves a model to be quantized alone."""
        tp_size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        if tp_size > 1:
            raise ValueError(
                f"CRVQ layers cannot be split over devices, but tensor parallelism over {tp_size} was asked for; "
                "start one process without tp_plan and tp_size, device_map='auto' gives each of its GPUs whole blocks."
            )
        if not self.pre_quantized:
            find_blocks(model)
            return
        if checkpoint_files is None:  # a state dict was given, so there are no headers to ask
            _unfuse(model, self.quantization_config)
            names = list(quantizable_linears(model, self.quantization_config)[0])
            embeddings = list(find_embeddings(model)) if self.quantization_config.embedding_bits == 8 else []
        else:
            names, embeddings = _match_checkpoint(model, checkpoint_files, self.quantization_config)
        replace_with_crvq_(model, names, self.quantization_config)
        replace_embeddings_(model, embeddings)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Quantizes a dense model, or checks a CRVQ model that has just been loaded."""
        if not self.pre_quantized:
            decided = _quantize(model, self.quantization_config)
            self.quantization_config = _recorded_config(model, decided)
        else:
            _check_loaded(model)
            if self.quantization_config.dequantize:
                return self._dequantize(model, model.dtype)
        self._attach(model)
        return model

    def _attach(self, model: PreTrainedModel) -> None:
        """Makes `model` one that transformers knows to be quantized and can save."""
        model.config.quantization_config = self.quantization_config
        _mark_quantized(model, True)
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        model.hf_quantizer = self
        model._weight_conversions = []  # saved as it is: the conversions know nothing of codes
        for module in model.modules():
            if isinstance(module, CRVQLinear):
                module.tile_()
        fix_vocabulary_(model)
        model.add_model_tags([QUANT_METHOD])
        model.push_to_hub = partial(_push_to_hub, model)
        self.is_compileable = not any(isinstance(module, UnfusedExperts) for module in model.modules())

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Turns every layer back into a dense one, as if the model had been loaded from a dense checkpoint."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        layers = {name: module for name, module in model.named_modules() if isinstance(module, CRVQLinear)}
        rows = [module for module in model.modules() if isinstance(module, (Int8Embedding, Int8Head))]
        if any(layer.weight.is_meta or hasattr(layer, "_hf_hook") for layer in [*layers.values(), *rows]):
            raise ValueError(
                "Dequantizing needs the whole model on one device; load it without offloading, "
                "for example with device_map='cpu'."
            )
        for name, layer in layers.items():
            model.set_submodule(name, to_dense(layer, dtype))
        dequantize_embeddings_(model, dtype)
        fix_vocabulary_(model)
        fuse_experts_(model)
        _mark_quantized(model, False)
        model.__dict__.pop("push_to_hub", None)
        model._weight_conversions = None  # saved in the layout of the original checkpoint
        model.model_tags = [tag for tag in model.model_tags or [] if tag != QUANT_METHOD]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Returns what is saved (None: the model's state dict) and what the metadata of the safetensors files says.

        That is the format version and, unless an adapter is saved or a part is offloaded, sha256 of every tensor.
        """
        metadata = {checkpoint.VERSION_KEY: str(self.quantization_config.format_version)}
        if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
            return None, metadata
        state_dict = model.state_dict()
        if not any(tensor.is_meta for tensor in state_dict.values()):
            tied = (getattr(model, "all_tied_weights_keys", None) or {}).items()
            twice = {name for name, source in tied if _is_same(state_dict.get(name), state_dict.get(source))}
            hashes = {k: checkpoint.tensor_hash(tensor) for k, tensor in state_dict.items() if k not in twice}
            metadata[checkpoint.HASHES_KEY] = json.dumps(hashes)
            if getattr(model, "_auto_class", None) is None:  # else code is saved, and its names in the config
                metadata[checkpoint.CONFIG_HASH_KEY] = _config_hash(model)
        return state_dict, metadata

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns that a CRVQ model can be saved."""
        return True


def quantize_model(model: PreTrainedModel, tokenizer: Any = None, config: CRVQConfig | None = None) -> PreTrainedModel:
    """Quantizes a model that is in memory; afterwards it can be saved like any other.

    Args:
        model: changed in place, and put into evaluation mode. It must be on one device; the CPU will do, blocks move
            to the compute device one at a time.
        tokenizer: tokenizer or its name, for calibration text; the one that came with the model by default.
        config: how to quantize, the defaults of `CRVQConfig` if None.

    Returns:
        `model`.

    Raises:
        ValueError: the model is already quantized, is spread over devices, or has nothing to quantize.
    """
    config = CRVQConfig() if config is None else config
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is already quantized ({model.quantization_method}); start from the dense model."
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or devices == {"meta"}:
        raise ValueError(
            f"The model to quantize must be on one device, found it on {sorted(devices)}; "
            "load it with device_map='cpu'."
        )
    config = _quantize(model.eval(), config, tokenizer)
    CRVQQuantizer(_recorded_config(model, config), pre_quantized=True)._attach(model)
    return model


def register() -> None:
    """Makes transformers know "crvq"; may be called again after a reload."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    auto.register_quantization_config(QUANT_METHOD)(CRVQConfig)
    auto.register_quantizer(QUANT_METHOD)(CRVQQuantizer)
    others = [cls for cls in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if cls.__name__ != CRVQConfig.__name__]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, CRVQConfig)


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> Any:
    """Uploads `model` with a model card that tells what was measured; see `hub.push_model` for the options."""
    from .hub import push_model

    return push_model(model, repo_id, **options)


def _quantize(model: PreTrainedModel, config: CRVQConfig, tokenizer: Any = None) -> CRVQConfig:
    """Quantizes `model` in place with the pipeline; returns the config with what its budget has decided."""
    from .pipeline import quantize_blocks_

    _unfuse(model, config)
    linears, _ = quantizable_linears(model, config)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no layer to quantize; check modules_to_not_convert.")
    config = within_budget(config, map(linear_size, linears.values()))
    tokenizer = config.tokenizer if tokenizer is None else tokenizer
    quantize_blocks_(model, _load_tokenizer(model, config, tokenizer), config)
    if config.embedding_bits == 8:
        quantize_embeddings_(model)
    return config


def _unfuse(model: nn.Module, config: CRVQConfig) -> None:
    """Unfuses the experts that `config` does not leave dense."""
    known, _ = find_fused_experts(model)
    unfuse_experts_(model, [name for name in known if not is_named_by(name, config.modules_to_not_convert or [])])


def _load_tokenizer(model: PreTrainedModel, config: CRVQConfig, tokenizer: Any) -> Any:
    """Returns the tokenizer for the calibration text, or None where there is none and none is needed."""
    if tokenizer is None and config.dataset is None:
        return None
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    name = tokenizer or model.name_or_path
    problem = None
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            problem = error
    if tokenizer is None and config.dataset == "self":
        return None  # the model can write tokens without one
    raise ValueError(
        f"No tokenizer found at {str(name)!r} to read the calibration text; pass CRVQConfig(tokenizer=...)."
    ) from problem


def _recorded_config(model: nn.Module, config: CRVQConfig) -> CRVQConfig:
    """Returns the config to store with a quantized model: no runtime fields, no texts or local paths of the user."""
    recorded = CRVQConfig.from_dict(config.to_dict())
    recorded.dataset = shareable_dataset(recorded.dataset)
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, CRVQLinear)
    ]
    if not any(isinstance(module, (Int8Embedding, Int8Head)) for module in model.modules()):
        recorded.embedding_bits = 16  # also where 8 were asked for and nothing could take them
    recorded.modules_to_not_convert = sorted({*(config.modules_to_not_convert or []), *dense}) or None
    return recorded


def _match_checkpoint(model: PreTrainedModel, files: list[str], config: CRVQConfig) -> tuple[list[str], list[str]]:
    """Returns the layers that the checkpoint has codes for and the embeddings and heads that it has in 8 bits.

    Named as in `model`, their shapes checked. Experts which the checkpoint has one by one are unfused.
    """
    safetensors = [file for file in files if str(file).endswith(".safetensors")]
    if not safetensors:
        raise ValueError(
            f"A CRVQ checkpoint consists of safetensors files, found {sorted(map(os.path.basename, files))}."
        )
    tensors = checkpoint.read_headers(safetensors)
    stored = checkpoint.quantized_modules(tensors)
    if not stored:
        raise ValueError(
            f"The config says {QUANT_METHOD!r}, but none of the {len(tensors)} tensors of the checkpoint belongs to a "
            "CRVQ layer; remove quantization_config from config.json if the checkpoint is dense."
        )
    known, _ = find_fused_experts(model)
    prefix = model.base_model_prefix
    unfuse_experts_(model, [name for name in known if _resolve(f"{name}.0.gate_proj.weight", tensors, prefix)])

    modules = dict(model.named_modules())
    names = {}
    for module in stored:
        name = _resolve(module, modules, prefix)
        if name is None:
            logger.warning("The checkpoint has a CRVQ layer %s, %s has not.", module, type(model).__name__)
            continue
        dense = modules[name]
        if not isinstance(dense, (nn.Linear, Conv1D)):
            raise ValueError(f"The checkpoint has a CRVQ layer {module}, in the model it is a {type(dense).__name__}.")
        checkpoint.check_layer(tensors, module, config, *linear_size(dense), bias=dense.bias is not None)
        names[name] = module
    if not names:
        raise ValueError(
            f"None of the {len(stored)} CRVQ layers of the checkpoint (such as {stored[0]}) "
            f"is in {type(model).__name__}; load it with the class it was saved from."
        )
    checkpoint.check_embeddings(tensors, config)
    embeddings = (_resolve(module, modules, prefix) for module in checkpoint.embedding_modules(tensors))
    return list(names), [name for name in embeddings if name is not None]


def _resolve(name: str, known: Container[str], prefix: str) -> str | None:
    """Returns `name` as `known` spells it: with or without the prefix of the base model, None if not at all."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in known), None)


def _check_loaded(model: PreTrainedModel) -> None:
    """Checks that every CRVQ and 8-bit tensor was loaded and is sound, and switches gradients off.

    Raises:
        ValueError: a tensor was not in the checkpoint, or holds values that cannot be.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (CRVQLinear, Int8Embedding, Int8Head)):
            continue
        module.requires_grad_(False)
        parameters = dict(module.named_parameters(recurse=False))
        if any(parameter.is_meta for parameter in parameters.values()):
            continue  # offloaded to disk
        for key, parameter in parameters.items():
            if not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(f"The checkpoint lacks the tensor {name}.{key}; it is incomplete.")
        if isinstance(module, CRVQLinear):
            module.quantized_weight().check(name)
        elif not module.weight_row_scale.isfinite().all():
            raise ValueError(f"{name}.{ROW_SCALE} holds NaN or infinite values; the checkpoint is damaged.")


def _is_same(tensor: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Returns whether two entries of a state dict are one tensor in memory, of which only one is saved."""
    return tensor is not None and other is not None and tensor.data_ptr() == other.data_ptr()


def _config_hash(model: PreTrainedModel) -> str:
    """Returns the hash of the config.json that `save_pretrained` is about to write."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return checkpoint.json_hash((Path(folder) / "config.json").read_text(encoding="utf-8"))


def _mark_quantized(model: nn.Module, flag: bool) -> None:
    """Sets the flag that forbids to cast a quantized model on it and all models inside it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = flag
