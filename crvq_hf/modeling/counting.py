"""How many parameters a quantized model has: as many as the dense one it stands for, however they are stored."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .embedding import Rows
from .linear import CRVQLinear

QUANTIZED = (CRVQLinear, Rows)


def uncounted(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Returns the number of weights in quantized layers less the number of elements that store them.

    Args:
        model: has the layers.
        exclude_embeddings: whether the parameter `weight` of embeddings was left out of the count.
    """
    stored: dict[int, int] = {}
    weights: dict[int, int] = {}  # by parameter: what is tied counts once
    for layer in model.modules():
        if isinstance(layer, CRVQLinear):
            weights[id(layer.packed)] = layer.in_features * layer.out_features
            stored |= {id(p): p.numel() for name, p in layer.named_parameters(recurse=False) if name != "bias"}
        elif isinstance(layer, Rows):
            numbers = {name: layer.get_parameter(name) for name in layer.companions}
            stored |= {id(parameter): parameter.numel() for parameter in numbers.values()}
            if not (exclude_embeddings and (isinstance(layer, nn.Embedding) or layer.tied)):
                weights[id(layer.packed)] = math.prod(layer.dense_shape(numbers | {"weight": layer.packed}))
                stored[id(layer.packed)] = layer.packed.numel()
    return sum(weights.values()) - sum(stored.values())


class CountsWeights:
    """Takes the place of a model's method `num_parameters` while layers of it are quantized."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns what the method of transformers would return for the dense model."""
        options: dict[str, Any] = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
        counted = type(self.model).num_parameters(self.model, **options)
        return counted if only_trainable else counted + uncounted(self.model, exclude_embeddings)


def count_weights_(model: nn.Module) -> None:
    """Makes `num_parameters` of a model, and of models in it, count weights instead of stored elements."""
    is_quantized = any(isinstance(module, QUANTIZED) for module in model.modules())
    for module in model.modules():
        if hasattr(type(module), "num_parameters"):
            module.__dict__.pop("num_parameters", None)
            if is_quantized:
                module.num_parameters = CountsWeights(module)
