"""Mixture-of-experts layers: from one fused 3-D parameter to ordinary linear layers, and back.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
`down_proj` `[experts, hidden, intermediate]`. Nothing that looks for linear layers sees them, although they are most
of the model. Unfused, each expert is three `nn.Linear`s that calibration, quantization and saving treat like all
others: `experts.0.gate_proj`, `experts.0.up_proj`, `experts.0.down_proj`, ...
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

logger = logging.getLogger("crvq")

FUSED_NAMES = {"gate_up_proj", "down_proj"}


class Expert(nn.Module):
    """The three projections of one expert; `UnfusedExperts` runs them."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Makes linear layers that share the memory of `gate` and `up` `[I, H]` and `down` `[H, I]`."""
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)


class UnfusedExperts(nn.Module):
    """Computes what a fused experts module computes, expert by expert.

    Attributes:
        skeleton: 1-tuple with the fused module it replaced, on the meta device: it knows the activation, and the
            model gets it back when it is dequantized. A tuple, so that its parameters do not count as the model's.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Takes over the parameters of `fused` without copying them."""
        super().__init__()
        intermediate = fused.down_proj.shape[2]
        for index in range(fused.down_proj.shape[0]):
            gate_up = fused.gate_up_proj.detach()[index]
            expert = Expert(gate_up[:intermediate], gate_up[intermediate:], fused.down_proj.detach()[index])
            self.add_module(str(index), expert)
        self.num_experts = len(self._modules)
        self.skeleton = (_skeleton(fused),)
        self.train(fused.training)

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
        apply_gate = self.skeleton[0]._apply_gate
        for index in top_k_index.unique().tolist():
            if index == self.num_experts:
                continue
            expert = self._modules[str(index)]
            token, choice = torch.where(top_k_index == index)
            x = hidden_states[token]
            x = expert.down_proj(apply_gate(torch.cat([expert.gate_proj(x), expert.up_proj(x)], dim=-1)))
            result.index_add_(0, token, (x * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def fuse(self) -> nn.Module:
        """Returns a fused module with the experts' weights, which must be dense by now."""
        experts = list(self._modules.values())
        fused = copy.deepcopy(self.skeleton[0])
        gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]).detach() for expert in experts]
        fused.gate_up_proj = nn.Parameter(torch.stack(gate_up))
        fused.down_proj = nn.Parameter(torch.stack([expert.down_proj.weight.detach() for expert in experts]))
        return fused.train(self.training)


def find_fused_experts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the fused experts of a model.

    Returns:
        known: module by name, those whose layout `UnfusedExperts` reproduces.
        unknown: reason by name, those that must stay as they are.
    """
    known, unknown = {}, {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not any(key in FUSED_NAMES and parameter.dim() == 3 for key, parameter in parameters.items()):
            continue
        reason = _unknown_layout(module, parameters)
        if reason:
            unknown[name] = reason
        else:
            known[name] = module
    return known, unknown


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
    for name, reason in unknown.items():
        logger.warning("Experts %s stay dense: %s.", name, reason)
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


def _unknown_layout(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """Returns why `UnfusedExperts` would not compute what `module` does, or an empty string."""
    if not (hasattr(module, "_apply_gate") and hasattr(module, "config") and getattr(module, "has_gate", False)):
        return f"{type(module).__name__} is not a gated experts module of transformers"
    if getattr(module, "has_bias", False) or set(parameters) != FUSED_NAMES:
        return f"{type(module).__name__} has other parameters than gate_up_proj and down_proj: {sorted(parameters)}"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return f"{type(module).__name__} stores its weights transposed or interleaved"
    if len(list(module.parameters())) != len(FUSED_NAMES):
        return f"{type(module).__name__} has submodules with parameters, such as a norm"
    num_experts, hidden, intermediate = parameters["down_proj"].shape
    if tuple(parameters["gate_up_proj"].shape) != (num_experts, 2 * intermediate, hidden):
        return (
            f"gate_up_proj {list(parameters['gate_up_proj'].shape)} does not fit "
            f"down_proj {list(parameters['down_proj'].shape)}"
        )
    return ""


def _linear(weight: Tensor) -> nn.Linear:
    """Returns a linear layer without bias that holds `weight` `[out, in]` itself."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


def _skeleton(fused: nn.Module) -> nn.Module:
    """Returns a copy of `fused` whose parameters are on the meta device."""
    memo: dict[int, object] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in fused.parameters()}
    memo[id(fused.config)] = fused.config  # shared by all layers of the model
    return copy.deepcopy(fused, memo)
