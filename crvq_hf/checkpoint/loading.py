"""A checkpoint against the model it is loaded into: which layers to swap before, whether all has arrived after."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..config import QUANT_METHOD, CRVQConfig
from ..modeling.embedding import ROW_SCALE, CodedEmbedding, CodedHead, Rows
from ..modeling.experts import find_fused_experts, unfuse_experts_
from ..modeling.linear import CRVQLinear
from ..modeling.replace import linear_size
from ..modeling.stacks import OUT_IN, stacks_among, unfuse_stacks_
from .headers import (
    TensorInfo,
    check_embeddings,
    check_layer,
    embedding_modules,
    layer_sizes,
    quantized_modules,
    read_headers,
)

logger = logging.getLogger("crvq")


def match_checkpoint(model: PreTrainedModel, files: list[str], config: CRVQConfig) -> tuple[list[str], list[str]]:
    """Returns the layers that the checkpoint has codes for and the embeddings and heads that it has as quantized rows.

    Named as in `model`, their shapes checked. Experts which the checkpoint has one by one are unfused.
    """
    safetensors = [file for file in files if str(file).endswith(".safetensors")]
    if not safetensors:
        raise ValueError(
            f"A CRVQ checkpoint consists of safetensors files, found {sorted(map(os.path.basename, files))}."
        )
    tensors = read_headers(safetensors)
    stored = quantized_modules(tensors)
    if not stored:
        raise ValueError(
            f"The config says {QUANT_METHOD!r}, but none of the {len(tensors)} tensors of the checkpoint belongs to a "
            "CRVQ layer; remove quantization_config from config.json if the checkpoint is dense."
        )
    rename, prefix = _renaming(model), model.base_model_prefix
    stored_names = {*tensors, *map(rename, tensors)}
    known, _ = find_fused_experts(model)
    unfuse_experts_(model, [name for name in known if _resolve(f"{name}.0.up_proj.weight", stored_names, prefix)])
    unfuse_stacks_(model, _stacks(model, tensors, rename))

    modules = dict(model.named_modules())
    names = {}
    for module in stored:
        name = _place(module, rename, modules, prefix)
        if name is None:
            logger.warning("The checkpoint has a CRVQ layer %s, %s has not.", module, type(model).__name__)
            continue
        dense = modules[name]
        if not isinstance(dense, (nn.Linear, Conv1D)):
            raise ValueError(f"The checkpoint has a CRVQ layer {module}, in the model it is a {type(dense).__name__}.")
        check_layer(tensors, module, config, *linear_size(dense), bias=dense.bias is not None)
        names[name] = module
    if not names:
        raise ValueError(
            f"None of the {len(stored)} CRVQ layers of the checkpoint (such as {stored[0]}) "
            f"is in {type(model).__name__}; load it with the class it was saved from."
        )
    check_embeddings(tensors, config)
    embeddings = (_place(part, rename, modules, prefix) for part in embedding_modules(tensors))
    return list(names), [name for name in embeddings if name is not None]


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Returns what makes of a tensor's name in a checkpoint that in `model`, as transformers does while it loads.

    A model of a family may have other names than the one that was saved: a vision-language model's text model alone.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, [])[0]


def _place(module: str, rename: Callable[[str], str], known: Container[str], prefix: str) -> str | None:
    """Returns the name in the model of a module of a checkpoint, None if it has none.

    As for transformers, a name that leads nowhere once renamed was the model's own.
    """
    renamed = rename(f"{module}.weight").removesuffix(".weight")
    return _resolve(renamed, known, prefix) or _resolve(module, known, prefix)


def _stacks(
    model: PreTrainedModel, tensors: dict[str, TensorInfo], rename: Callable[[str], str]
) -> dict[str, tuple[tuple[int, int, int], str]]:
    """Returns the parameters of `model` that the checkpoint has as many layers: (stack, layout) by name."""
    sizes = {module: (size.out_features, size.in_features) for module, size in layer_sizes(tensors).items()}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) == 2:
            sizes.setdefault(name.removesuffix(".weight"), tensor.shape)  # a layer that was left dense
    parameters, stacks = dict(model.named_parameters()), {}
    for layer, (stack, layout) in stacks_among(sizes).items():
        name = _place(stack, rename, parameters, model.base_model_prefix)
        if name is not None:
            rows, columns = sizes[layer] if layout == OUT_IN else sizes[layer][::-1]
            stacks[name] = (parameters[name].numel() // (rows * columns), rows, columns), layout
    return stacks


def _resolve(name: str, known: Container[str], prefix: str) -> str | None:
    """Returns `name` as `known` spells it: with or without the prefix of the base model, None if not at all."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in known), None)


def check_loaded(model: PreTrainedModel) -> None:
    """Checks that every CRVQ tensor was loaded and is sound, and switches gradients off.

    Raises:
        ValueError: a tensor was not in the checkpoint, or holds values that cannot be.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (CRVQLinear, Rows)):
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
        elif isinstance(module, (CodedEmbedding, CodedHead)):
            module.table().check(name)
        elif not module.weight_row_scale.isfinite().all():
            raise ValueError(f"{name}.{ROW_SCALE} holds NaN or infinite values; the checkpoint is damaged.")
