"""Embeddings and output heads in 8 bits: an int8 number per weight and a scale per token.

Row `t` of the dense weight is `weight[t] * weight_row_scale[t]`. Scales are stored as float16; in memory they have the
dtype of the model, which is how transformers and the modules here know it. A head that is tied to the embedding shares
both with it, so they are stored once.

Models cast hidden states to `lm_head.weight.dtype`, so the weight in a finished model answers with the dtype of the
model, and a row of it is dense; the numbers themselves (`weight.detach()`) are int8.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from crvq_kernels import dequantize_rows, rows_linear
from torch import Tensor, nn
from torch.nn import functional as F

from .frozen import as_traced
from .rows import quantize_rows

logger = logging.getLogger("crvq")

ROW_SCALE = "weight_row_scale"


class RowNumbers(nn.Parameter):
    """The int8 weight of an embedding or a head, which says the dtype of the rows that it stands for, and has them.

    Attributes:
        scales: the row scales, whose dtype it says; None until its module is asked for its weight.
    """

    scales: nn.Parameter | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model; for PyTorch's compilers, which make programs that read the numbers, int8."""
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if self.scales is None or asked_by.startswith("torch._"):
            return Tensor.dtype.__get__(self)
        return self.scales.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """Returns dense rows, or part of them: Gemma 4 takes that of its padding token from here."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        dense = dequantize_rows(self.detach()[rows], self.scales.detach()[rows], self.dtype)
        return dense[(..., *columns)] if columns else dense

    def __deepcopy__(self, memo: dict[int, Any]) -> RowNumbers:
        copied = super().__deepcopy__(memo)
        copied.scales = copy.deepcopy(self.scales, memo)
        return copied


def answer_dtypes_(model: nn.Module) -> None:
    """Makes the weights of 8-bit embeddings and heads say the dtype of the model."""
    for module in model.modules():
        if isinstance(module, (Int8Embedding, Int8Head)):
            # transformers before 5.23 leaves what it renames in the dtype that is stored.
            dtype = module.__dict__.pop("loading_dtype", None)
            if dtype is not None and not module.weight_row_scale.is_meta:
                module.weight_row_scale.data = module.weight_row_scale.data.to(dtype)
            module.packed.__class__ = RowNumbers
            module.packed.scales = module.weight_row_scale


class _Int8Rows(nn.Module):
    """What the two modules below have in common."""

    @property
    def weight(self) -> Tensor:
        """The int8 numbers, which say the dtype of the model; in a compiled program the dense weight.

        There only a tensor can answer for its dtype, and compilers drop what of it is not used.
        """
        if "weight" not in self._parameters:
            raise AttributeError("weight")  # not registered yet, or deleted
        if torch.compiler.is_compiling():
            return self.dequantize(self.compute_dtype)
        weight = self.packed
        if isinstance(weight, RowNumbers):
            weight.scales = self._parameters[ROW_SCALE]  # accelerate puts new parameters in the place of both
        return weight

    @property
    def packed(self) -> nn.Parameter:
        """The parameter `weight`, also where `adapters` has the attribute show the dense weight; int8."""
        weight = self._parameters["weight"]
        if torch.compiler.is_compiling():
            return weight
        if Tensor.dtype.__get__(weight) != torch.int8:  # accelerate brings it back in the dtype that it says
            weight = type(weight)(weight.detach().to(torch.int8), requires_grad=False)
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
        _ = self.packed  # in int8
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # unpickling makes a plain parameter of every parameter
        answer_dtypes_(self)


class Int8Embedding(_Int8Rows, nn.Embedding):
    """Looks up rows of an int8 weight and makes them dense.

    Attributes:
        weight: int8, `[V, H]`.
        weight_row_scale: `[V]`, in the dtype of the model, which the output has too; stored as float16.
        dense: the embedding in whose place this one is, without its weight; not a submodule.
    """

    def __init__(self, dense: nn.Embedding, weight: Tensor, scales: Tensor) -> None:
        """Takes the place of `dense`, whose weight is let go, with `weight` and `scales`."""
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(dense, name))
        _take_over_(self, dense, weight, scales)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., H]` for token numbers `[...]`."""
        scales = self.weight_row_scale
        rows = dequantize_rows(F.embedding(input, as_traced(self.packed)), scales[input], scales.dtype)
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

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _store_half(destination, prefix + ROW_SCALE)


class Int8Head(_Int8Rows, nn.Linear):
    """A linear layer onto the vocabulary, from an int8 weight.

    Attributes:
        weight: int8, `[V, H]`; the very parameter of an embedding if tied to it.
        weight_row_scale: `[V]`, in the dtype of the model, stored as float16; tied like the weight.
        bias: `[V]` or None, as it was.
        tied: whether weight and scales are an embedding's, which stores them.
    """

    def __init__(self, dense: nn.Linear, weight: Tensor, scales: Tensor, tied: bool = False) -> None:
        """Takes the place of `dense`, whose weight is let go, with `weight` and `scales`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bias = dense.bias
        self.tied = tied
        _take_over_(self, dense, weight, scales)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., V]` in the dtype of `input`, `[..., H]`."""
        output = rows_linear(input, as_traced(self.packed).detach(), self.weight_row_scale)
        return output if self.bias is None else output + self.bias

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """Returns the layer that this one stands for, weight and bias in `dtype`."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense.train(self.training)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tied and not self.weight_row_scale.is_meta:
            del destination[prefix + ROW_SCALE]
        _store_half(destination, prefix + ROW_SCALE)

    def __setattr__(self, name: str, value: Any) -> None:
        """Hands accelerate, which brings tensors from a state dict, the scales that a tied head has not in it.

        It keeps the forward, takes the tensors away, and then leaves its hook.
        """
        if name == "_old_forward" and self.tied:
            self.__dict__["_scales"] = self.weight_row_scale.detach()
        super().__setattr__(name, value)
        scales = self.__dict__.get("_scales") if name == "_hf_hook" else None
        if scales is not None and not scales.is_meta:
            for hook in getattr(value, "hooks", [value]):
                if getattr(hook, "offload", False):
                    hook.weights_map = ChainMap({ROW_SCALE: scales}, hook.weights_map)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.tied:  # what the embedding loads is loaded here too
            state_dict = state_dict | {prefix + ROW_SCALE: self.weight_row_scale}
        super()._load_from_state_dict(state_dict, prefix, *args)


def find_embeddings(model: nn.Module, leave: Container[str] = ()) -> dict[str, nn.Module]:
    """Returns the input embedding and the head of a transformers model by name, those that 8 bits can replace.

    That is an `nn.Embedding`, one of transformers' `...ScaledWordEmbedding`s (Gemma's, BART's), which only multiply it
    by a number, and an `nn.Linear`. What is tied to anything else stays dense with it.

    Args:
        model: a transformers model.
        leave: names of parts that have to stay dense.
    """
    names = {id(module): name for name, module in model.named_modules()}
    plain = {names[id(part)]: part for part in parts_of(model) if _is_plain(part)}
    plain = {name: part for name, part in plain.items() if name not in leave}
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
def quantize_embeddings_(model: nn.Module, leave: Container[str] = ()) -> bool:
    """Puts the embedding and the head of a model in 8 bits, in place; returns False if both have to stay dense.

    Args:
        model: a transformers model.
        leave: names of parts that have to stay dense.

    Raises:
        ValueError: their weights hold NaN or infinite values.
    """
    found = find_embeddings(model, leave)
    for part in parts_of(model):
        if not any(part is other for other in found.values()):
            logger.warning("%s stays as it is: embedding_bits=8 cannot replace it.", type(part).__name__)
    _replace_(model, found, quantize_rows)
    return bool(found)


def replace_embeddings_(model: nn.Module, names: Iterable[str]) -> None:
    """Puts 8-bit modules on the meta device in the place of dense ones, ready for loading a checkpoint.

    Args:
        model: changed in place, on the meta device.
        names: names of what the checkpoint has scales for: an embedding, a head, or both. A head that the model ties
            to its embedding needs none and is replaced with it.

    Raises:
        ValueError: a name is that of something else.
    """
    found = find_embeddings(model)
    strange = next((name for name in names if name not in found), None)
    if strange is not None:
        kind = type(model.get_submodule(strange)).__name__
        raise ValueError(f"The checkpoint has 8-bit rows for {strange}, in the model it is a {kind} of another kind.")
    weights = _weights(model)
    shared = {weights[f"{name}.weight"] for name in names}
    parts = {name: part for name, part in found.items() if weights[f"{name}.weight"] in shared}

    def on_meta(weight: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        return numbers, torch.empty(weight.shape[0], dtype=weight.dtype, device="meta")

    for layer in _replace_(model, parts, on_meta):
        # Models' `_init_weights` would draw random numbers into a module that is not marked as done.
        layer._is_hf_initialized = layer.weight._is_hf_initialized = True
        layer.loading_dtype = layer.weight_row_scale.dtype


def dequantize_embeddings_(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the dense modules back in the place of the 8-bit ones, those that were tied tied again."""
    dense_weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (Int8Embedding, Int8Head)):
            dense = module.to_dense(dtype)
            dense.weight = dense_weights.setdefault(id(module.packed), dense.weight)
            model.set_submodule(name, dense)
            model.all_tied_weights_keys.pop(f"{name}.{ROW_SCALE}", None)


def _replace_(
    model: nn.Module, parts: dict[str, nn.Module], split: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[nn.Module]:
    """Puts 8-bit modules in the place of `parts`, numbers and scales from `split` of each weight; returns them."""
    first: dict[int, str] = {}
    weights = _weights(model)
    for name, dense in parts.items():
        source, training = first.setdefault(weights[f"{name}.weight"], name), dense.training
        if source != name:
            embedding = model.get_submodule(source)
            layer = Int8Head(dense, embedding.weight, embedding.weight_row_scale, tied=True)
            model.all_tied_weights_keys[f"{name}.{ROW_SCALE}"] = f"{source}.{ROW_SCALE}"
        else:
            kind = Int8Embedding if isinstance(dense, nn.Embedding) else Int8Head
            layer = kind(dense, *split(dense.weight.detach()))
        model.set_submodule(name, layer.train(training))
    return [model.get_submodule(name) for name in parts]


def _weights(model: nn.Module) -> dict[str, int]:
    """Returns a number for every parameter by name, the same for those that are one, or will be once loaded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbers = {name: id(parameter) for name, parameter in parameters.items()}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in parameters and source in parameters and parameters[name].is_meta:  # not tied yet
            numbers[name] = numbers[source]
    return numbers


def _take_over_(layer: nn.Module, dense: nn.Module, weight: Tensor, scales: Tensor) -> None:
    """Gives `layer` its tensors, kept as they are if parameters; `dense`, if an embedding, is kept without weight.

    Scales come first: many ask the first of a model's parameters for its dtype.
    """
    for name, tensor in ((ROW_SCALE, scales), ("weight", weight)):
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


def _is_plain(part: nn.Module) -> bool:
    """Returns whether an embedding or a head computes nothing but what the classes here compute."""
    if isinstance(part, nn.Embedding):
        kind = type(part)
        is_scaled = kind.__name__.endswith("ScaledWordEmbedding") and hasattr(part, "embed_scale")
        if is_scaled and isinstance(part.embed_scale, Tensor):
            is_scaled = hasattr(part, "scalar_embed_scale")  # a number also where the tensor is on the meta device
        return (kind is nn.Embedding or is_scaled) and part.max_norm is None
    return type(part) is nn.Linear
