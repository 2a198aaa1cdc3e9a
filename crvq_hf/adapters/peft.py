"""PEFT: adapters train beside quantized layers as beside any `nn.Linear`.

PEFT asks a layer for more than its output: methods read its weight or its dtype, or write into it. So layers to which
adapters come show a `DenseWeight` as `weight`: what a method reads is right, what would change the codes is refused.
That holds for methods that nobody here knows of. PEFT lets no other package take part, so some of its functions are
wrapped.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from ..modeling.counting import QUANTIZED, uncounted
from ..modeling.embedding import CodedEmbedding, CodedHead, Int8Embedding, Int8Head
from ..modeling.experts import UnfusedExperts
from ..modeling.linear import CRVQLinear
from ..modeling.replace import to_dense
from ..modeling.row_modules import RowEmbedding
from .dense_weight import DenseWeight, WeightIsFrozen

_moving: ContextVar[bool] = ContextVar("moving", default=False)  # tensors, which accelerate finds as attributes


class _ShowsDense:
    """Makes `weight` the dense weight of a quantized layer, to be read; `packed` is the parameter of that name."""

    @property
    def weight(self) -> Tensor:
        dtype = self.compute_dtype
        if torch.compiler.is_compiling():
            return self.dequantize(dtype)
        if _moving.get():
            return self.packed
        return DenseWeight(
            lambda: _read(self, dtype), torch.empty(_shape(self), dtype=dtype, device="meta"), self.packed.device
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and getattr(value, "dtype", None) != self.packed.dtype:
            raise WeightIsFrozen
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise WeightIsFrozen
        super().__delattr__(name)


class AdaptedLinear(_ShowsDense, CRVQLinear):
    """A `CRVQLinear` that adapters may stand around."""


class AdaptedHead(_ShowsDense, Int8Head):
    """An `Int8Head` that adapters may stand around."""


class AdaptedCodedHead(_ShowsDense, CodedHead):
    """A `CodedHead` that adapters may stand around."""


class _ShowsScale(_ShowsDense):
    """Shows what an embedding multiplies by, too."""

    @property
    def embed_scale(self) -> float:
        """What the embedding multiplies its rows by, where PEFT looks for it."""
        scale = getattr(self.dense, "embed_scale", 1.0)
        return self.dense.scalar_embed_scale if isinstance(scale, Tensor) else scale


class AdaptedEmbedding(_ShowsScale, Int8Embedding):
    """An `Int8Embedding` that adapters may stand around."""


class AdaptedCodedEmbedding(_ShowsScale, CodedEmbedding):
    """A `CodedEmbedding` that adapters may stand around."""


ADAPTED = {
    CRVQLinear: AdaptedLinear,
    Int8Head: AdaptedHead,
    Int8Embedding: AdaptedEmbedding,
    CodedHead: AdaptedCodedHead,
    CodedEmbedding: AdaptedCodedEmbedding,
}


def _shape(layer: nn.Module) -> tuple[int, int]:
    is_embedding = isinstance(layer, nn.Embedding)
    names = ("num_embeddings", "embedding_dim") if is_embedding else ("out_features", "in_features")
    return tuple(getattr(layer, name) for name in names)


def _read(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    _refuse_offloaded(layer)
    return layer.dequantize(dtype)


def _refuse_offloaded(layer: nn.Module) -> None:
    if layer.packed.is_meta:
        raise ValueError(
            "These PEFT settings need the weight of a layer that is offloaded; load the model without offloading."
        )


def show_dense_weights_(model: nn.Module) -> bool:
    """Makes the quantized layers of a model show a dense `weight`; returns whether it has any."""
    for layer in (layers := [module for module in model.modules() if isinstance(module, QUANTIZED)]):
        layer.__class__ = ADAPTED.get(type(layer), type(layer))
    return bool(layers)


def dense_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of a module with dense layers, which can be trained, in the place of quantized ones."""
    if isinstance(module, QUANTIZED):
        _refuse_offloaded(module)
        dtype = module.compute_dtype
        return to_dense(module, dtype) if isinstance(module, CRVQLinear) else module.to_dense(dtype)
    copied = copy.deepcopy(module)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QUANTIZED):
            copied.set_submodule(name, dense_copy(layer))
    return copied


def _construct(construct: Callable, self: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands around `PeftModel.__init__`."""
    show_dense_weights_(model)
    construct(self, model, *args, **kwargs)


def _find(find: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands around what finds layers to look at before adapters are made; programs may hold the caller already."""
    show_dense_weights_(model)
    return find(model, *args, **kwargs)


def _embed(set_up: Callable, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands around `PeftModel._setup_prompt_encoder`, which takes the first parameter with a row for each token for
    the embedding's weight: that comes first for a while."""
    embeddings = [module for module in self.base_model.modules() if isinstance(module, RowEmbedding)]
    before = [embedding._parameters for embedding in embeddings]
    for embedding in embeddings:
        embedding._parameters = {"weight": embedding.packed} | embedding._parameters
    try:
        return set_up(self, *args, **kwargs)
    finally:
        for embedding, parameters in zip(embeddings, before, strict=True):
            embedding._parameters = parameters


def _inject(inject: Callable, self: nn.Module, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Stands around `BaseTuner.inject_adapter`: adapters that do not fit are refused, the model is as it was."""
    if not show_dense_weights_(model):
        return inject(self, model, adapter_name, *args, **kwargs)
    config = self.peft_config[adapter_name]
    _refuse_parameters(model, getattr(config, "target_parameters", None) or [])
    try:
        with _undone_on_failure(self, model):
            inject(self, model, adapter_name, *args, **kwargs)
    except Exception as error:
        if isinstance(error, (ValueError, ImportError)) and not isinstance(error, WeightIsFrozen):
            raise
        why = "it changes their weights, which are codes" if isinstance(error, WeightIsFrozen) else _first_line(error)
        raise ValueError(
            f"PEFT's {config.peft_type.value} with these settings does not fit quantized layers ({why}); choose "
            "another method, other settings or other target_modules, or call model.dequantize() first."
        ) from error


@contextmanager
def _undone_on_failure(tuner: nn.Module, model: nn.Module) -> Iterator[None]:
    """Puts the model back as it was if adapters cannot be made for all of it.

    Methods that change weights change those of dense layers until they meet a quantized one, so such are copied until
    the first quantized layer has its adapter.
    """
    children = [(module, dict(module._modules)) for module in model.modules()]
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    copies: list[tuple[Tensor, Tensor]] = []
    create = tuner._create_and_replace
    met_quantized = False

    def create_and_replace(config: Any, name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal met_quantized
        if not met_quantized:
            dense = [parameter.data for parameter in target.parameters() if parameter.is_floating_point()]
            copies.extend((data, data.clone()) for data in dense)
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        create(config, name, target, *args, **kwargs)
        if isinstance(base, QUANTIZED):
            met_quantized = True
            copies.clear()

    tuner._create_and_replace = create_and_replace
    try:
        yield
    except Exception:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad = requires_grad
        for data, before in copies:
            data.copy_(before)
        raise
    finally:
        del tuner._create_and_replace


def _refuse_parameters(model: nn.Module, targets: list[str]) -> None:
    """Raises a ValueError if PEFT's `target_parameters` name a tensor of a quantized layer, or of fused experts."""
    for name, module in model.named_modules():
        held = module.skeleton[0] if isinstance(module, UnfusedExperts) else module
        keys = [key for key, _ in held.named_parameters(recurse=False)]
        named = [key for key in keys if any(f".{name}.{key}".endswith(f".{target}") for target in targets)]
        if named and isinstance(module, UnfusedExperts):
            raise ValueError(
                f"target_parameters names {name}.{named[0]}, but each expert has layers of its own in a quantized "
                "model; put gate_proj, up_proj and down_proj into target_modules, or call model.dequantize() first."
            )
        if named and isinstance(module, QUANTIZED):
            raise ValueError(
                f"target_parameters names {name}.{named[0]}, which is stored quantized; put the layer into "
                "target_modules, or call model.dequantize() first."
            )


def _convert_config(convert: Callable, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands around what has a config name the parameters of fused experts: unfused ones are named as they are."""
    if not _has_unfused_experts(model):
        convert(peft_config, model, *args, **kwargs)


def _conversions(find: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Stands around what finds how the tensors of a file, here of adapters, are renamed and fused for a model."""
    conversions = find(model, *args, **kwargs)
    if not _has_unfused_experts(model):
        return conversions
    return [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]


def _has_unfused_experts(model: nn.Module) -> bool:
    return any(isinstance(module, UnfusedExperts) for module in model.modules())


def _merge(merge: Callable, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands around what merges all adapters of a `BaseTuner`: refused before any is, if one cannot be."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer))
    if any(isinstance(layer.get_base_layer(), QUANTIZED) for layer in layers):
        raise ValueError(
            "Adapters cannot be merged into quantized layers, whose weights are codes; keep the adapter beside the "
            "model, or call model.dequantize() before merging."
        )
    return merge(self, *args, **kwargs)


def _update(update: Callable, self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands around `ModulesToSaveWrapper.update`: what is trained and saved whole is a dense copy."""
    original = self.original_module
    if any(isinstance(module, QUANTIZED) for module in original.modules()):
        self.original_module = dense_copy(original)
    try:
        update(self, *args, **kwargs)
    finally:
        self.original_module = original


def _move(move: Callable, *args: Any, **kwargs: Any) -> Any:
    """Stands around accelerate's `set_module_tensor_to_device`: what is moved are codes."""
    token = _moving.set(True)
    try:
        return move(*args, **kwargs)
    finally:
        _moving.reset(token)


def _count(count: Callable, self: nn.Module) -> tuple[int, int]:
    """Stands around `PeftModel.get_nb_trainable_parameters`: weights are counted, not what stores them."""
    trainable, every = count(self)
    return trainable, every + uncounted(self)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


WRAPPED = {
    "accelerate.hooks": {"set_module_tensor_to_device": _move},
    "peft.tuners.tuners_utils": {
        "BaseTuner.inject_adapter": _inject,
        "BaseTuner.merge_and_unload": _merge,
        "BaseTuner.merge_adapter": _merge,
    },
    "peft.utils.other": {"ModulesToSaveWrapper.update": _update},
    "peft.peft_model": {
        "PeftModel.__init__": _construct,
        "PeftModel._setup_prompt_encoder": _embed,
        "PeftModel.get_nb_trainable_parameters": _count,
    },
    "peft.tuners.lora.corda": {"target_modules": _find},
    "peft.tuners.lora.loraga": {"get_target_modules": _find},
    "peft.utils.transformers_weight_conversion": {
        "convert_peft_config_for_transformers": _convert_config,
        "get_model_conversion_mapping": _conversions,
    },
    "transformers.integrations.peft": {"get_model_conversion_mapping": _conversions},
    "peft.mixed_model": {"PeftMixedModel.get_nb_trainable_parameters": _count},
}


def wrap_peft(module_name: str) -> None:
    """Wraps what `WRAPPED` names in a module, if that has been imported; may be called again."""
    module = sys.modules.get(module_name)
    for path, around in WRAPPED[module_name].items():
        *owners, name = path.split(".")
        owner = getattr(module, owners[0], None) if owners else module
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "wrapped_by_crvq"):
            setattr(owner, name, _around(function, around))


def _around(function: Callable, around: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    wrapped.wrapped_by_crvq = True
    return wrapped
