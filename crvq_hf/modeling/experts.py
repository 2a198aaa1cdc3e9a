"""Mixture-of-experts layers: from one fused 3-D parameter to ordinary linear layers, and back.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
`down_proj` `[experts, hidden, intermediate]`. Nothing that looks for linear layers sees them, although they are most
of the model. Unfused, each expert is three `nn.Linear`s that calibration, quantization and saving treat like all
others: `experts.0.gate_proj`, `experts.0.up_proj`, `experts.0.down_proj`, ...

Attributes of these modules say what differs: transposed, gate and up in turn (`is_concatenated` is false), with
biases, without a gate (`up_proj` then), a norm after each expert. Whatever has other parameters is left to `stacks`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.finding import kind_of

logger = logging.getLogger("crvq")


class Expert(nn.Module):
    """The projections of one expert, two or three; `UnfusedExperts` runs them."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        """Args: layers: linear layers by name: `gate_proj` (or none), `up_proj`, `down_proj`."""
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class UnfusedExperts(nn.Module):
    """Computes what a fused experts module computes, expert by expert.

    What other code asks of the fused module, its skeleton answers (models' `_init_weights` touch `gate_up_proj`).

    Attributes:
        skeleton: 1-tuple with the fused module it replaced, on the meta device: it knows how its weights lie and the
            activation, and the model gets it back when it is dequantized. A tuple, so that its parameters do not count
            as the model's.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Takes over the parameters of `fused`, copying them only where they are transposed or interleaved."""
        super().__init__()
        self.num_experts = fused.down_proj.shape[0]
        for index in range(self.num_experts):
            down, bias = _parameters(fused, "down_proj", index)
            layers = {"down_proj": linear(down, bias)}
            if fused.has_gate:
                weight, bias = _parameters(fused, "gate_up_proj", index)
                layers = {
                    "gate_proj": linear(_part(fused, weight, 0), _part(fused, bias, 0)),
                    "up_proj": linear(_part(fused, weight, 1), _part(fused, bias, 1)),
                } | layers
            else:
                layers = {"up_proj": linear(*_parameters(fused, "up_proj", index))} | layers
            self.add_module(str(index), Expert(layers))
        if _has_norm(fused):
            self.post_expert_norm = fused.post_expert_norm
        self.skeleton = (_skeleton(fused),)
        self.train(fused.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "skeleton":
                raise
            return getattr(self.skeleton[0], name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: `[tokens, H]`.
            top_k_index: `[tokens, k]`, integer, experts chosen for each token; `num_experts` stands for none.
            top_k_weights: `[tokens, k]`, weight of each choice.

        Returns:
            `[tokens, H]`, dtype of `hidden_states`.
        """
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index == self.num_experts:
                continue
            expert = self._modules[str(index)]
            token, choice = torch.where(top_k_index == index)
            x = expert.down_proj(self._activate(expert, hidden_states[token]))
            if _has_norm(self.skeleton[0]):
                x = self.post_expert_norm(x)
            result.index_add_(0, token, (x * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def _activate(self, expert: Expert, x: Tensor) -> Tensor:
        """Returns what goes into `down_proj`, `[tokens, I]`."""
        fused = self.skeleton[0]
        if not fused.has_gate:
            return fused.act_fn(expert.up_proj(x))
        gate_up = _joined(fused, expert.gate_proj(x), expert.up_proj(x), dim=-1)
        return fused._apply_gate(gate_up)

    def fuse(self) -> nn.Module:
        """Returns a fused module with the experts' weights, which must be dense by now."""
        fused = copy.deepcopy(self.skeleton[0])
        experts = [self._modules[str(index)] for index in range(self.num_experts)]
        for name in dict(fused.named_parameters(recurse=False)):
            layer, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
            if layer == "gate_up_proj":
                pairs = [(getattr(e.gate_proj, kind), getattr(e.up_proj, kind)) for e in experts]
                parts = [_joined(fused, gate.detach(), up.detach(), dim=0) for gate, up in pairs]
            else:
                parts = [getattr(getattr(expert, layer), kind).detach() for expert in experts]
            whole = torch.stack(parts)
            whole = whole.mT.contiguous() if fused.is_transposed and kind == "weight" else whole
            setattr(fused, name, nn.Parameter(whole))
        if _has_norm(fused):
            fused.post_expert_norm = self.post_expert_norm
        return fused.train(self.training)


def _parameters(fused: nn.Module, name: str, index: int) -> tuple[Tensor, Tensor | None]:
    """Returns the weight `[out, in]` and the bias `[out]` or None of one expert's projection."""
    weight = getattr(fused, name).detach()[index]
    bias = getattr(fused, f"{name}_bias").detach()[index] if fused.has_bias else None
    return (weight.mT.contiguous() if fused.is_transposed else weight), bias


def _part(fused: nn.Module, rows: Tensor | None, which: int) -> Tensor | None:
    """Returns the rows of a fused projection that are gate (0) or up (1)."""
    if rows is None:
        return None
    if not fused.is_concatenated:
        return rows[which::2].contiguous()
    return rows.chunk(2)[which]


def _joined(fused: nn.Module, gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Returns gate and up along `dim` as the fused projection has them, one after the other or in turn."""
    if fused.is_concatenated:
        return torch.cat([gate, up], dim=dim)
    dim = dim % gate.dim()
    return torch.stack([gate, up], dim=dim + 1).flatten(dim, dim + 1)


def find_fused_experts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the fused experts of a model.

    Returns:
        known: module by name, those whose layout `UnfusedExperts` reproduces.
        unknown: reason by name, those that must stay as they are.
    """
    known, unknown, shared = {}, {}, shared_parameters(model)
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if "down_proj" not in parameters or parameters["down_proj"].dim() != 3 or not hasattr(module, "is_transposed"):
            continue  # what is fused in another way, `stacks` may take apart
        is_shared = any(f"{name}.{key}" in shared for key in parameters)
        reason = "their weights are shared with another module" if is_shared else _unknown_layout(module, parameters)
        if reason:
            unknown[name] = reason
        else:
            known[name] = module
    return known, unknown


def shared_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that more than one module has, or will have once the model is loaded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name, parameter in parameters.items() if uses[id(parameter)] > 1} | {*tied, *tied.values()}


def unfuse_experts_(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Replaces fused experts by `UnfusedExperts`, in place and without copying weights.

    Args:
        model: any model; one without experts stays as it is.
        names: experts modules to replace, all of known layout by default.

    Returns:
        Reason by name for every experts module whose layout is not known; it stays dense.
    """
    known, unknown = find_fused_experts(model)
    for name in known if names is None else names:
        model.set_submodule(name, UnfusedExperts(known[name]))
    for kind, reason in {(kind_of(name), reason): None for name, reason in unknown.items()}:
        logger.warning("Experts %s stay dense: %s.", kind, reason)
    return unknown


def fuse_experts_(model: nn.Module) -> None:
    """Puts the fused modules back in the place of all `UnfusedExperts`, whose layers must be dense by now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            model.set_submodule(name, module.fuse())


def check_fusable(model: nn.Module) -> None:
    """Checks that `fuse_experts_` will lose nothing.

    Raises:
        ValueError: experts have adapters of PEFT, for which fused experts have no place.
    """
    for name, module in model.named_modules():
        layers = [layer for expert in module.children() for layer in expert.children()]
        if isinstance(module, UnfusedExperts) and not all(isinstance(layer, nn.Linear) for layer in layers):
            raise ValueError(
                f"The experts of {name} have adapters, which would be lost where experts are fused, as they are in a "
                "dense model; unload the adapters first, or keep the model quantized."
            )


def _has_norm(module: nn.Module) -> bool:
    """Returns whether experts end in a norm of their own, which transformers knows from 5.23 on."""
    return getattr(module, "has_post_expert_norm", False)


def _unknown_layout(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """Returns why `UnfusedExperts` would not compute what `module` does, or an empty string."""
    kind = type(module).__name__
    first, size = ("gate_up_proj", 2) if module.has_gate else ("up_proj", 1)
    expected = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
    if set(parameters) != expected:
        return f"{kind} has other parameters than {sorted(expected)}: {sorted(parameters)}"
    norm = [*module.post_expert_norm.parameters()] if _has_norm(module) else []
    if len(list(module.parameters())) != len(expected) + len(norm):
        return f"{kind} has submodules with parameters"
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if parameter.dim() == 3}
    rows = {name: (b, a) if module.is_transposed else (a, b) for name, (_, a, b) in shapes.items()}
    hidden, intermediate = rows["down_proj"]
    if rows.get(first) != (size * intermediate, hidden):
        return f"{first} {list(parameters[first].shape)} does not fit down_proj {list(parameters['down_proj'].shape)}"
    return ""


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Returns a linear layer that holds `weight` `[out, in]` and `bias` `[out]` or None themselves."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _skeleton(fused: nn.Module) -> nn.Module:
    """Returns a copy of `fused` whose parameters are on the meta device."""
    memo: dict[int, object] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in fused.parameters()}
    memo[id(fused.config)] = fused.config  # shared by all layers of the model
    return copy.deepcopy(fused, memo)
