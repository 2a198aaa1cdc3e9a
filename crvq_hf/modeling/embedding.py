"""Embeddings and heads in 8 bits and fewer: which of a model can be replaced, and replacing them.

What takes their place is in `row_modules` and `coded`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from ..config import ROW_BITS
from .coded import CodedEmbedding, CodedHead
from .row_modules import Int8Embedding, Int8Head, RowNumbers, Rows, answer_dtypes_
from .rows import quantize_rows
from .table import GROUP, ROW_SCALE, stored_tensors

logger = logging.getLogger("crvq")

# What others look for here, and where models that were pickled before have it.
__all__ = [
    "ROW_SCALE",
    "CodedEmbedding",
    "CodedHead",
    "Int8Embedding",
    "Int8Head",
    "RowNumbers",
    "Rows",
    "answer_dtypes_",
    "dequantize_embeddings_",
    "distinct_tables",
    "find_embeddings",
    "parts_of",
    "quantize_embeddings_",
    "replace_embeddings_",
    "set_rows_",
    "tell_dense",
]


def find_embeddings(model: nn.Module, bits: float, leave: Container[str] = ()) -> dict[str, nn.Module]:
    """Returns the input embedding and the head of a transformers model by name, those that quantized rows can replace.

    That is an `nn.Embedding`, one of transformers' `...ScaledWordEmbedding`s (Gemma's, BART's), which only multiply it
    by a number, and an `nn.Linear`. What is tied to anything else stays dense with it.

    Args:
        model: a transformers model.
        bits: `embedding_bits`; in fewer than 8, channels must come in whole groups.
        leave: names of parts that have to stay dense.
    """
    if bits > ROW_BITS:
        return {}
    multiple = GROUP if bits < ROW_BITS else 1
    names = {id(module): name for name, module in model.named_modules()}
    plain = {names[id(part)]: part for part in parts_of(model) if _is_plain(part)}
    plain = {name: part for name, part in plain.items() if name not in leave and part.weight.shape[1] % multiple == 0}
    weights = _weights(model)
    uses, known = Counter(weights.values()), Counter(weights[f"{name}.weight"] for name in plain)
    return {name: p for name, p in plain.items() if uses[key := weights[f"{name}.weight"]] == known[key]}


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Returns the input embedding and the head of a model, or part of it, those that it has."""
    parts = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            parts.append(getattr(model, get)())
        except (AttributeError, NotImplementedError):  # a vision tower has no table of tokens
            pass
    return [part for part in parts if isinstance(part, nn.Module)]


@torch.no_grad()
def quantize_embeddings_(model: nn.Module, leave: Container[str] = ()) -> None:
    """Puts the embedding and the head of a model in 8 bits, in place.

    Args:
        model: a transformers model.
        leave: names of parts that have to stay dense.

    Raises:
        ValueError: their weights hold NaN or infinite values.
    """
    found = find_embeddings(model, ROW_BITS, leave)
    tell_dense(model, found, ROW_BITS)
    for names, weight in distinct_tables(model, found).items():
        set_rows_(model, names, dict(zip(("weight", ROW_SCALE), quantize_rows(weight), strict=True)))


def tell_dense(model: nn.Module, found: dict[str, nn.Module], bits: float) -> None:
    """Warns of the embedding or the head of a model that is not among those `found` to be replaced."""
    for part in parts_of(model):
        if not any(part is other for other in found.values()):
            logger.warning("%s stays as it is: embedding_bits=%g cannot replace it.", type(part).__name__, bits)


def distinct_tables(model: nn.Module, found: dict[str, nn.Module]) -> dict[tuple[str, ...], Tensor]:
    """Returns the weights of embeddings and heads by the names of those that have it: two where they are tied."""
    weights, shared = _weights(model), {}
    for name in found:
        shared.setdefault(weights[f"{name}.weight"], []).append(name)
    return {tuple(names): found[names[0]].weight.detach() for names in shared.values()}


def replace_embeddings_(model: nn.Module, names: Iterable[str], bits: float) -> None:
    """Puts modules of quantized rows on the meta device in the place of dense ones, ready for loading a checkpoint.

    Args:
        model: changed in place, on the meta device.
        names: names of what the checkpoint has scales for: an embedding, a head, or both. A head that the model ties
            to its embedding needs none and is replaced with it.
        bits: `embedding_bits`.

    Raises:
        ValueError: a name is that of something else.
    """
    found = find_embeddings(model, bits)
    strange = next((name for name in names if name not in found), None)
    if strange is not None:
        kind = type(model.get_submodule(strange)).__name__
        raise ValueError(f"The checkpoint has {bits:g}-bit rows for {strange}, in the model it is a {kind}.")
    for parts, weight in distinct_tables(model, found).items():
        if {*parts} & {*names}:
            tensors = {
                key: torch.empty(shape, dtype=weight.dtype if dtype.is_floating_point else dtype, device="meta")
                for key, (shape, dtype) in stored_tensors(*weight.shape, bits).items()
            }
            for layer in set_rows_(model, parts, tensors):
                # Models' `_init_weights` would draw random numbers into a module that is not marked as done.
                layer._is_hf_initialized = layer.weight._is_hf_initialized = True
                layer.loading_dtype = weight.dtype


def dequantize_embeddings_(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the dense modules back in the place of the quantized ones, those that were tied tied again."""
    dense_weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Rows):
            dense = module.to_dense(dtype)
            dense.weight = dense_weights.setdefault(id(module.packed), dense.weight)
            model.set_submodule(name, dense)
            for key in module.companions:
                model.all_tied_weights_keys.pop(f"{name}.{key}", None)


def set_rows_(model: nn.Module, names: Iterable[str], tensors: dict[str, Tensor]) -> list[Rows]:
    """Puts modules of quantized rows in the place of dense ones that share a weight; returns them.

    Args:
        model: changed in place.
        names: of an embedding or a head, or of both.
        tensors: by name; int8 rows and scales, or a table.
    """
    kinds = (Int8Embedding, Int8Head) if len(tensors) == 2 else (CodedEmbedding, CodedHead)
    source, *tied = names
    dense = model.get_submodule(source)
    layer = kinds[not isinstance(dense, nn.Embedding)](dense, tensors)
    model.set_submodule(source, layer.train(dense.training))
    for name in tied:
        dense = model.get_submodule(name)
        shared = {key: layer.get_parameter(key) for key in ("weight", *layer.companions)}
        model.set_submodule(name, kinds[1](dense, shared, tied=True).train(dense.training))
        model.all_tied_weights_keys |= {f"{name}.{key}": f"{source}.{key}" for key in layer.companions}
    return [model.get_submodule(name) for name in names]


def _weights(model: nn.Module) -> dict[str, int]:
    """Returns a number for every parameter by name, the same for those that are one, or will be once loaded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbers = {name: id(parameter) for name, parameter in parameters.items()}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in parameters and source in parameters and parameters[name].is_meta:  # not tied yet
            numbers[name] = numbers[source]
    return numbers


def _is_plain(part: nn.Module) -> bool:
    """Returns whether an embedding or a head computes nothing but what the classes here compute."""
    if isinstance(part, nn.Embedding):
        kind = type(part)
        is_scaled = kind.__name__.endswith("ScaledWordEmbedding") and hasattr(part, "embed_scale")
        if is_scaled and isinstance(part.embed_scale, Tensor):
            is_scaled = hasattr(part, "scalar_embed_scale")  # a number also where the tensor is on the meta device
        return (kind is nn.Embedding or is_scaled) and part.max_norm is None
    return type(part) is nn.Linear
