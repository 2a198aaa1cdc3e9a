"""Many weights in one parameter, as some models keep those of their experts: taken apart into linear layers.

transformers' usual kind of experts is taken apart by `experts`. What is here is for all others: code that multiplies
by one matrix of a parameter `[experts, ..., ...]` after the other, or by all at once, and does nothing
else with it. The code stays: in place of the parameter it finds a `StackedLinears`, which multiplies as that would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import linear

# Names of the list of layers, which say how the parameter held the matrices: [out, in], or transposed.
OUT_IN, IN_OUT = "linears", "linears_transposed"
_NAME = re.compile(rf"(.+)\.({OUT_IN}|{IN_OUT})\.\d+")
# What can be done with a stack, or with one matrix of it, as the second factor.
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")


class StackedLinears(nn.Module):
    """Stands where a parameter of many matrices stood and multiplies by them.

    Attributes:
        shape: of the parameter.
        stack: how its code views it, `[experts, out, in]`, or `[experts, in, out]`.
        layout: `OUT_IN` or `IN_OUT`, also the name of the list of layers.
    """

    def __init__(self, fused: Tensor, stack: tuple[int, int, int], layout: str) -> None:
        """Makes linear layers of the matrices in `fused`, sharing its memory if they are not transposed."""
        super().__init__()
        self.shape, self.stack, self.layout = fused.shape, torch.Size(stack), layout
        matrices = fused.detach().view(stack)
        matrices = matrices if layout == OUT_IN else matrices.mT
        self.add_module(layout, nn.ModuleList(linear(matrix.contiguous()) for matrix in matrices))
        self._is_hf_initialized = True  # models' `_init_weights` take it for a parameter

    @property
    def layers(self) -> nn.ModuleList:
        """One linear layer for each matrix."""
        return self.get_submodule(self.layout)

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return self.layers[0].weight.device

    def fuse(self) -> nn.Parameter:
        """Returns the parameter again; the layers must be dense by now."""
        matrices = torch.stack([layer.weight.detach() for layer in self.layers])
        matrices = matrices if self.layout == OUT_IN else matrices.mT
        return nn.Parameter(matrices.reshape(self.shape))

    def view(self, *shape: Any) -> _Part:
        """Returns the whole, seen as its matrices; `reshape` does the same."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            sizes[sizes.index(-1)] = math.prod(self.shape) // -math.prod(sizes)
        if tuple(sizes) not in (tuple(self.stack), tuple(self.shape)):
            raise ValueError(f"Quantized weights of {tuple(self.stack)} cannot be seen as {tuple(sizes)}.")
        return _Part(self)

    reshape = view

    def size(self, dim: int | None = None) -> Any:
        """Returns the shape of the parameter, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, index: Any) -> _Part:
        return _Part(self)[index]

    def transpose(self, *dims: int) -> _Part:
        """Returns the whole with each matrix transposed."""
        return _Part(self).transpose(*dims)

    @property
    def mT(self) -> _Part:
        """The whole with each matrix transposed."""
        return _Part(self, flipped=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _product(func, args, kwargs or {})


class _Part:
    """All matrices of a `StackedLinears`, or one of them, as they are or transposed."""

    def __init__(self, owner: StackedLinears, index: int | None = None, flipped: bool = False) -> None:
        self.owner, self.index, self.flipped = owner, index, flipped

    @property
    def shape(self) -> torch.Size:
        first, rows, columns = self.owner.stack
        sizes = (columns, rows) if self.flipped else (rows, columns)
        return torch.Size(sizes if self.index is not None else (first, *sizes))

    @property
    def device(self) -> torch.device:
        return self.owner.device

    def __getitem__(self, index: Any) -> _Part:
        return _Part(self.owner, int(index), self.flipped)

    def transpose(self, *dims: int) -> _Part:
        return _Part(self.owner, self.index, not self.flipped)

    swapaxes = transpose
    t = transpose
    T = mT = property(transpose)

    def multiply(self, x: Tensor) -> Tensor:
        """Returns `x` times the matrix, or each of `x` `[experts, tokens, in]` times its own."""
        layers = self.owner.layers
        if self.index is not None:
            return layers[self.index](x)
        return torch.stack([layer(part) for layer, part in zip(layers, x.expand(len(layers), -1, -1), strict=True)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _product(func, args, kwargs or {})


def _product(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Returns what `func`, a product, makes of a tensor and a `_Part`."""
    values = [*args, *kwargs.values()]
    if func.__name__ not in PRODUCTS or isinstance(values[0], _Part):
        raise TypeError(f"{func.__name__} of quantized weights is not supported; call model.dequantize() first.")
    part = _Part(values[1]) if isinstance(values[1], StackedLinears) else values[1]
    product = part.multiply(values[0])
    return product + values[2] if len(values) > 2 and values[2] is not None else product


def unfuse_stacks_(model: nn.Module, stacks: dict[str, tuple[torch.Size, str]]) -> None:
    """Puts `StackedLinears` in the place of parameters, in place: (stack, layout) by name of a parameter."""
    for name, (stack, layout) in stacks.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters.pop(key)
        module.add_module(key, StackedLinears(parameter, stack, layout).train(module.training))


def fuse_stacks_(model: nn.Module) -> None:
    """Puts the parameters back in the place of all `StackedLinears`, whose layers must be dense by now."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, StackedLinears):
                del module._modules[key]
                module.register_parameter(key, child.fuse())


def stacks_among(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns (name of a `StackedLinears`, its layout) by the name of one of its layers, for each that has some."""
    found = {match[1]: (match[0], match[2]) for match in map(_NAME.fullmatch, names) if match}
    return {layer: (stack, layout) for stack, (layer, layout) in found.items()}
