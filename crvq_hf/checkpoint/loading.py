"""A checkpoint against the model it is loaded into: which layers to swap before, whether all has arrived after."""

from __future__ import annotations

import logging
import os
from collections.abc import Container

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import QUANT_METHOD, CRVQConfig
from ..modeling.embedding import ROW_SCALE, Int8Embedding, Int8Head
from ..modeling.experts import find_fused_experts, unfuse_experts_
from ..modeling.linear import CRVQLinear
from ..modeling.replace import linear_size
from .headers import check_embeddings, check_layer, embedding_modules, quantized_modules, read_headers

logger = logging.getLogger("crvq")


def match_checkpoint(model: PreTrainedModel, files: list[str], config: CRVQConfig) -> tuple[list[str], list[str]]:
    """Returns the layers that the checkpoint has codes for and the embeddings and heads that it has in 8 bits.

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
        check_layer(tensors, module, config, *linear_size(dense), bias=dense.bias is not None)
        names[name] = module
    if not names:
        raise ValueError(
            f"None of the {len(stored)} CRVQ layers of the checkpoint (such as {stored[0]}) "
            f"is in {type(model).__name__}; load it with the class it was saved from."
        )
    check_embeddings(tensors, config)
    embeddings = (_resolve(module, modules, prefix) for module in embedding_modules(tensors))
    return list(names), [name for name in embeddings if name is not None]


def _resolve(name: str, known: Container[str], prefix: str) -> str | None:
    """Returns `name` as `known` spells it: with or without the prefix of the base model, None if not at all."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in known), None)


def check_loaded(model: PreTrainedModel) -> None:
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
