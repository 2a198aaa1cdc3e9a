"""Gathers the tensors of one layer of a checkpoint while vLLM loads them, and checks them; no vLLM.

vLLM hands a tensor to the `weight_loader` of the parameter that has its name. Here parameters are empty: a layer of
vLLM may be several of the checkpoint, which have shapes of their own, so tensors are kept until all have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CRVQConfig
from ..quantized_weight import TENSOR_NAMES, LayerShape, QuantizedWeight


class StoredLayer:
    """The tensors of one quantized layer of the checkpoint, as far as they have been loaded.

    Attributes:
        name: what messages call the layer.
        shape: what the config of the checkpoint makes of a layer of its size.
    """

    def __init__(self, name: str, config: CRVQConfig, in_features: int, out_features: int) -> None:
        self.name = name
        self.shape: LayerShape = config.layer_shape(in_features, out_features)
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Keeps a copy of a tensor, in the memory of the CPU; loaders use theirs again.

        Raises:
            ValueError: its shape or dtype contradicts the config.
        """
        shape, dtype = self.shape.tensors()[name]
        if tensor.dim() == 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous():
            tensor = tensor.mT  # turned by a model whose original weights are [in, out] (GPT-2)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"The shapes in the checkpoint contradict its config: {self.name}.{name} is {tensor.dtype} "
                f"{list(tensor.shape)}, expected {dtype} {list(shape)}."
            )
        self._tensors[name] = tensor.detach().to("cpu", copy=True)

    def weight(self) -> QuantizedWeight:
        """Returns the layer, all of whose tensors have been loaded.

        Raises:
            ValueError: one has not, or holds values that cannot be.
        """
        missing = next((name for name in TENSOR_NAMES if name not in self._tensors), None)
        if missing is not None:
            raise ValueError(
                f"The checkpoint lacks the tensor {self.name}.{missing}; it is incomplete, save or download it again."
            )
        weight = QuantizedWeight.from_tensors(self._tensors, self.shape.nbits, self.shape.num_critical_groups)
        weight.check(self.name)
        return weight


def register_placeholders(layer: nn.Module, prefix: str, shape: LayerShape, loader: Callable[..., Any]) -> None:
    """Gives `layer` an empty parameter for each tensor of a quantized layer, with a function that is given the tensor.

    Args:
        layer: the layer of vLLM.
        prefix: what names of parameters begin with, before those of the checkpoint.
        shape: of any layer with the same number of input channels; gives the dtypes.
        loader: called with the tensor's name in a checkpoint and all that vLLM gives a `weight_loader`.
    """
    for name, (_, dtype) in shape.tensors().items():
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = _Loader(loader, name)
        layer.register_parameter(prefix + name, parameter)


def remove_placeholders(layer: nn.Module, prefix: str) -> torch.device:
    """Takes the empty parameters away; returns the device that they were on."""
    device = layer.get_parameter(prefix + TENSOR_NAMES[0]).device
    for name in TENSOR_NAMES:
        delattr(layer, prefix + name)
    return device


class _Loader:
    """A `weight_loader` that knows the name of its tensor."""

    def __init__(self, loader: Callable[..., Any], name: str) -> None:
        self.loader, self.name = loader, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.loader(self.name, *args, **kwargs)
