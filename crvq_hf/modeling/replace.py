"""Which layers of a model are quantized, and swapping them for `CRVQLinear` before a checkpoint is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..blocks.absent import present
from ..blocks.finding import named_blocks
from ..config import CRVQConfig
from ..naming import is_named_by
from ..quantized_weight import QuantizedWeight
from .experts import find_fused_experts, shared_parameters, unfuse_experts_
from .linear import CRVQLinear


def quantizable_linears(model: nn.Module, config: CRVQConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the layers that `config` quantizes and those that it leaves dense, in the order of the model.

    Quantized is every `nn.Linear`, every layer of a subclass that computes the same, and every transformers `Conv1D`
    inside the decoder blocks.

    Args:
        model: a transformers model; fused experts are not looked into, see `crvq_hf.experts`.
        config: says the group size and which modules to leave alone. While a budget is yet to be spent, layers
            that the finest groups fit are among the quantized.

    Returns:
        linears: module by name.
        skipped: reason by name, for every linear layer in the blocks that is left dense.

    Raises:
        ValueError: the model has no decoder blocks.
    """
    patterns = config.modules_to_not_convert or []
    shared = shared_parameters(model)
    in_float32 = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    in_float32 += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]

    linears, skipped = {}, {}
    blocks = named_blocks(model).items()
    modules = ((name, module, block) for path, block in blocks for name, module in block.named_modules(prefix=path))
    for name, module, block in modules:
        if not is_dense_linear(module):
            continue
        in_features, _ = linear_size(module)
        if is_named_by(name, patterns):
            skipped[name] = "named in modules_to_not_convert"
        elif type(module) not in (nn.Linear, Conv1D) and not _computes_like_linear(module, block):
            skipped[name] = f"its class {type(module).__name__} computes something else than nn.Linear"
        elif f"{name}.weight" in shared:
            skipped[name] = "its weight is shared with another module"
        elif is_named_by(name, in_float32):
            skipped[name] = "the model keeps it in float32"
        elif not config.fits(name, in_features):
            skipped[name] = f"its {in_features} input channels are no multiple of {config.group_size(name)}"
        else:
            linears[name] = module
    return linears, skipped


def is_dense_linear(module: nn.Module) -> bool:
    """Returns whether `module` is an `nn.Linear` or a `Conv1D` with a weight of numbers: not of codes, not a stack."""
    is_linear = isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, CRVQLinear)
    return is_linear and isinstance(module.weight, nn.Parameter)


@torch.no_grad()
def _computes_like_linear(module: nn.Linear, block: nn.Module) -> bool:
    """Returns whether a layer of a subclass computes what `nn.Linear` does, which is found by running it.

    On the meta device, where a checkpoint of codes is about to be loaded, it is taken to: the config of the checkpoint
    names what is dense.
    """
    with present(block):
        return module.weight.is_meta or _runs_like_linear(module)


def _runs_like_linear(module: nn.Linear) -> bool:
    """Returns whether a layer with numbers does that."""
    if [name for name, _ in module.named_parameters() if name not in ("weight", "bias")] or [*module.buffers()]:
        return False
    x = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 30  # what clips or rounds its input is to show
    try:
        exact = copy.deepcopy(module).float()
        found = exact(x := x.to(exact.weight.device))
        expected = F.linear(x, exact.weight, exact.bias)
        return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max()) and found.shape == expected.shape
    except Exception:  # whatever a forward raises that wants, or returns, something else than a tensor of numbers
        return False


def unfuse_experts_to_quantize_(model: nn.Module, config: CRVQConfig) -> None:
    """Unfuses the experts of `model` that `config` does not leave dense."""
    known, _ = find_fused_experts(model)
    unfuse_experts_(model, [name for name in known if not is_named_by(name, config.modules_to_not_convert or [])])


def unmatched_patterns(model: nn.Module, patterns: Iterable[str] | None) -> list[str]:
    """Returns those of the patterns that name no module of `model`: typing errors, say."""
    names = [name for name, _ in model.named_modules()]
    return [pattern for pattern in patterns or () if not any(is_named_by(name, [pattern]) for name in names)]


def replace_with_crvq_(model: nn.Module, names: Iterable[str], config: CRVQConfig) -> None:
    """Puts a `CRVQLinear` on the meta device in the place of every named layer, ready for loading a checkpoint.

    Args:
        model: changed in place.
        names: names of `nn.Linear` or `Conv1D` modules.
        config: gives the layers their shapes.

    Raises:
        ValueError: `names` is empty.
    """
    names = list(names)
    if not names:
        raise ValueError(f"No layer of {type(model).__name__} is to be quantized; check modules_to_not_convert.")
    for name in names:
        dense = model.get_submodule(name)
        bias = dense.bias
        layer = CRVQLinear.from_shape(
            config.of_layer(name).layer_shape(*linear_size(dense)),
            bias=bias is not None,
            bias_dtype=None if bias is None else bias.dtype,
            device=torch.device("meta"),
        )
        # Models' `_init_weights` would draw random numbers into the codes of a module that is not marked as done.
        layer._is_hf_initialized = layer.weight._is_hf_initialized = True
        _set_layer(model, name, layer)


def set_quantized_(model: nn.Module, name: str, weight: QuantizedWeight) -> CRVQLinear:
    """Replaces the dense layer `name` by one that holds `weight` and the dense layer's bias; returns the new layer."""
    layer = CRVQLinear.from_quantized(weight, model.get_submodule(name).bias)
    _set_layer(model, name, layer)
    return layer


def _set_layer(model: nn.Module, name: str, layer: CRVQLinear) -> None:
    """Puts `layer` in the place of a dense layer, remembering what kind that was."""
    dense = model.get_submodule(name)
    layer.conv1d = isinstance(dense, Conv1D)
    layer.train(dense.training)
    model.set_submodule(name, layer)


def to_dense(layer: CRVQLinear, dtype: torch.dtype) -> nn.Module:
    """Returns the dense layer that `layer` approximates: an `nn.Linear`, or a `Conv1D` where it replaced one.

    Args:
        layer: left as it is.
        dtype: of the new weight and bias.
    """
    weight = layer.dequantize(dtype)
    with torch.device("meta"):
        if layer.conv1d:
            dense = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return dense.train(layer.training)


def mark_quantized(model: nn.Module, flag: bool) -> None:
    """Sets the flag of transformers' models that forbids to cast them, on `model` and all models inside it.

    Some models ask whether their config has it, and then call a layer whose weight they would read otherwise.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = flag


def linear_size(module: nn.Module) -> tuple[int, int]:
    """Returns (in_features, out_features) of an `nn.Linear` or a `Conv1D`, whose weight is stored transposed."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features
