"""Embeddings and output heads of quantized rows: what they have in common, and those in 8 bits.

In 8 bits, row `t` of the dense weight is `weight[t] * weight_row_scale[t]`, int8 numbers and a scale; `coded` has
those in fewer. Scales are stored as float16; in memory they have the dtype of the model, which is how transformers and
the modules here know it. A head that is tied to the embedding shares all tensors with it, so they are stored once.

Models cast hidden states to `lm_head.weight.dtype`, so the weight in a finished model answers with the dtype and shape
of the dense one, and a row of it is dense; the numbers themselves (`weight.detach()`) are integers.
"""

from __future__ import annotations

import copy
import sys
from collections import ChainMap
from typing import Any

import torch
from crvq_kernels import dequantize_rows, rows_linear
from torch import Tensor, nn
from torch.nn import functional as F

from .frozen import as_traced
from .table import ROW_SCALE


class RowNumbers(nn.Parameter):
    """The weight of an embedding or a head, which says dtype and shape of the rows that it stands for, and has them.

    Attributes:
        parts: the tensors that it needs for that by name, scales among them, whose dtype it says; None until its
            module is asked for its weight.
        kind: class of its module.
    """

    parts: dict[str, nn.Parameter] | None = None
    kind: type[Rows]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model; for PyTorch's compilers, which make programs that read the numbers, their own."""
        if self.parts is None or _asked_by("torch._"):
            return Tensor.dtype.__get__(self)
        return self.parts[ROW_SCALE].dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight, `[V, H]`; for what moves and stores tensors, that of the numbers."""
        if self.parts is None or _asked_by("torch.", "accelerate.", "safetensors."):
            return Tensor.shape.__get__(self)
        return torch.Size(self.kind.dense_shape(self.stored))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Returns `shape`, or one of its numbers."""
        shape = Tensor.shape.__get__(self) if _asked_by("torch.", "accelerate.", "safetensors.") else self.shape
        return shape if dim is None else shape[dim]

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors by name, without gradient."""
        return {name: tensor.detach() for name, tensor in (("weight", self), *(self.parts or {}).items())}

    def __getitem__(self, index: Any) -> Tensor:
        """Returns dense rows, or part of them: Gemma 4 takes that of its padding token from here."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        dense = self.kind.dense_rows(self.stored, rows, self.dtype)
        return dense[(..., *columns)] if columns else dense

    def __deepcopy__(self, memo: dict[int, Any]) -> RowNumbers:
        copied = super().__deepcopy__(memo)
        copied.parts, copied.kind = copy.deepcopy(self.parts, memo), self.kind
        return copied


def _asked_by(*modules: str) -> bool:
    """Returns whether what asked the caller for something is code of one of these modules."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith(modules)


def answer_dtypes_(model: nn.Module) -> None:
    """Makes the weights of quantized embeddings and heads say the dtype of the model."""
    for module in model.modules():
        if isinstance(module, Rows):
            # transformers before 5.23 leaves what it renames in the dtype that is stored.
            dtype = module.__dict__.pop("loading_dtype", None)
            for name in module.halves if dtype is not None else ():
                parameter = module.get_parameter(name)
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(dtype)
            module.packed.__class__ = RowNumbers
            _ = module.weight


class Rows(nn.Module):
    """An embedding or a head of quantized rows; the classes that are one are below and in `coded`.

    Attributes:
        companions: names of the tensors that it has beside its weight.
        halves: names of those which are stored as float16 and have the dtype of the model in memory.
        numbers: dtype of its weight.
    """

    companions: tuple[str, ...] = (ROW_SCALE,)
    halves: tuple[str, ...] = (ROW_SCALE,)
    numbers = torch.int8

    @staticmethod
    def dense_shape(tensors: dict[str, Tensor]) -> tuple[int, int]:
        """Returns `[V, H]` of the tensors of such a module."""
        return tuple(tensors["weight"].shape)

    @staticmethod
    def dense_rows(tensors: dict[str, Tensor], rows: Any, dtype: torch.dtype) -> Tensor:
        """Returns the rows that `rows`, any index, names, dense in `dtype`."""
        return dequantize_rows(tensors["weight"][rows], tensors[ROW_SCALE][rows], dtype)

    @property
    def weight(self) -> Tensor:
        """The numbers, which say dtype and shape of the dense weight; in a compiled program the dense weight.

        There only a tensor can answer for its dtype, and compilers drop what of it is not used.
        """
        if "weight" not in self._parameters:
            raise AttributeError("weight")  # not registered yet, or deleted
        if torch.compiler.is_compiling():
            return self.dequantize(self.compute_dtype)
        weight = self.packed
        if isinstance(weight, RowNumbers):  # accelerate puts new parameters in the place of all
            weight.parts, weight.kind = {name: self._parameters[name] for name in self.companions}, type(self)
        return weight

    @property
    def packed(self) -> nn.Parameter:
        """The parameter `weight`, also where `adapters` has the attribute show the dense weight."""
        weight = self._parameters["weight"]
        if torch.compiler.is_compiling():
            return weight
        if Tensor.dtype.__get__(weight) != self.numbers:  # accelerate brings it back in the dtype that it says
            weight = type(weight)(weight.detach().to(self.numbers), requires_grad=False)
            self._parameters["weight"] = weight
        return weight

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return self.weight_row_scale.dtype

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[V, H]` in `dtype`, as the module that this one stands for would hold it."""
        return dequantize_rows(self.packed, self.weight_row_scale, dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        _ = self.packed  # in its own dtype
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.__dict__.get("tied") and not self.weight_row_scale.is_meta:
            for name in self.companions:
                del destination[prefix + name]
        for name in self.halves:
            _store_half(destination, prefix + name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # unpickling makes a plain parameter of every parameter
        answer_dtypes_(self)


class RowEmbedding(Rows, nn.Embedding):
    """Looks up quantized rows and makes them dense.

    Attributes:
        dense: the embedding in whose place this one is, without its weight; not a submodule.
    """

    def __init__(self, dense: nn.Embedding, tensors: dict[str, Tensor]) -> None:
        """Takes the place of `dense`, whose weight is let go, with `tensors` by name, scales first."""
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(dense, name))
        _take_over_(self, dense, tensors)

    def lookup(self, input: Tensor) -> Tensor:
        """Returns dense rows `[..., H]` for token numbers `[...]`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., H]` for token numbers `[...]`."""
        rows = self.lookup(input)
        scale = getattr(self.dense, "embed_scale", None)
        if scale is None:
            return rows
        if isinstance(scale, Tensor):  # as Gemma does it: rounded to the dtype of the model
            return rows * torch.full((), self.dense.scalar_embed_scale, dtype=rows.dtype, device=rows.device)
        return rows * scale

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """Returns the embedding that this one stands for, of the class that it had, its weight in `dtype`."""
        dense = copy.deepcopy(self.dense)
        dense.weight = nn.Parameter(self.dequantize(dtype))
        if isinstance(getattr(dense, "embed_scale", None), Tensor):
            scale = torch.tensor(dense.scalar_embed_scale, dtype=torch.float32, device=self.packed.device)
            dense.embed_scale = scale
        return dense.train(self.training)


class RowHead(Rows, nn.Linear):
    """A linear layer onto the vocabulary, from quantized rows.

    Attributes:
        bias: `[V]` or None, as it was.
        tied: whether its tensors are an embedding's, which stores them.
    """

    def __init__(self, dense: nn.Linear, tensors: dict[str, Tensor], tied: bool = False) -> None:
        """Takes the place of `dense`, whose weight is let go, with `tensors` by name, scales first."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bias = dense.bias
        self.tied = tied
        _take_over_(self, dense, tensors)

    def product(self, input: Tensor) -> Tensor:
        """Returns `[..., V]` in the dtype of `input`, `[..., H]`, without the bias."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., V]` in the dtype of `input`, `[..., H]`."""
        output = self.product(input)
        return output if self.bias is None else output + self.bias

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """Returns the layer that this one stands for, weight and bias in `dtype`."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense.train(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        """Hands accelerate, which brings tensors from a state dict, those that a tied head has not in it.

        It keeps the forward, takes the tensors away, and then leaves its hook.
        """
        if name == "_old_forward" and self.tied:
            self.__dict__["_kept"] = {key: self.get_parameter(key).detach() for key in self.companions}
        super().__setattr__(name, value)
        kept = self.__dict__.get("_kept") if name == "_hf_hook" else None
        if kept is not None and not kept[ROW_SCALE].is_meta:
            for hook in getattr(value, "hooks", [value]):
                if getattr(hook, "offload", False):
                    hook.weights_map = ChainMap(kept, hook.weights_map)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.tied:  # what the embedding loads is loaded here too
            state_dict = state_dict | {prefix + name: self.get_parameter(name) for name in self.companions}
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Embedding(RowEmbedding):
    """Looks up rows of an int8 weight and makes them dense.

    Attributes:
        weight: int8, `[V, H]`.
        weight_row_scale: `[V]`, in the dtype of the model, which the output has too; stored as float16.
    """

    def lookup(self, input: Tensor) -> Tensor:
        """Returns dense rows `[..., H]` for token numbers `[...]`."""
        scales = self.weight_row_scale
        return dequantize_rows(F.embedding(input, as_traced(self.packed)), scales[input], scales.dtype)


class Int8Head(RowHead):
    """A linear layer onto the vocabulary, from an int8 weight.

    Attributes:
        weight: int8, `[V, H]`; the very parameter of an embedding if tied to it.
        weight_row_scale: `[V]`, in the dtype of the model, stored as float16; tied like the weight.
    """

    def product(self, input: Tensor) -> Tensor:
        """Returns `[..., V]` in the dtype of `input`, `[..., H]`, without the bias."""
        return rows_linear(input, as_traced(self.packed).detach(), self.weight_row_scale)


def _take_over_(layer: Rows, dense: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives `layer` its tensors, kept as they are if parameters; `dense`, if an embedding, is kept without weight.

    Scales come first: many ask the first of a model's parameters for its dtype.
    """
    for name in (*layer.companions, "weight"):
        tensor = tensors[name]
        is_shared = isinstance(tensor, nn.Parameter)
        layer.register_parameter(name, tensor if is_shared else nn.Parameter(tensor, requires_grad=False))
    if isinstance(dense, nn.Embedding):
        dense.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        object.__setattr__(layer, "dense", dense)


def _store_half(destination: dict, name: str) -> None:
    """Makes the scales in a state dict float16; not on the meta device, where loaders ask for the model's dtype."""
    scales = destination.get(name)
    if scales is not None and not scales.is_meta and scales.dtype != torch.float16:
        destination[name] = scales.detach().half()
