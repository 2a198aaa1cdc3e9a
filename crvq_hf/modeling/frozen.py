"""`FrozenParameter`: what holds the tensors of a quantized layer."""

from __future__ import annotations

from torch import nn


class FrozenParameter(nn.Parameter):
    """A parameter that `model.requires_grad_(True)` passes by: most hold integers, which have no gradients."""

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Returns the parameter as it is, without gradient."""
        return self


def freeze_(layer: nn.Module) -> None:
    """Makes all parameters of a quantized layer but its bias frozen ones, in place; what shares them goes on to."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name != "bias" and type(parameter) is nn.Parameter:
            parameter.requires_grad_(False).__class__ = FrozenParameter
