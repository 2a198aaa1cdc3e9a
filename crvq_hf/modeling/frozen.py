"""`FrozenParameter`: what holds the tensors of a quantized layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


class FrozenParameter(nn.Parameter):
    """A parameter that `model.requires_grad_(True)` passes by: most hold integers, which have no gradients."""

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Returns the parameter as it is, without gradient."""
        return self


def as_traced(tensor: Tensor) -> Tensor:
    """Returns a tensor as what traces programs takes it: a frozen parameter as a plain tensor while a mode is on.

    Tracers (`make_fx`, `torch.func.linearize`) know tensors and parameters, and turn every subclass away.
    """
    if torch.compiler.is_compiling() or type(tensor) is not FrozenParameter:
        return tensor
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    if not (before_dispatch or torch._C._len_torch_dispatch_stack()):
        return tensor
    with _disable_current_modes():
        return tensor.detach()


def freeze_(layer: nn.Module) -> None:
    """Makes all parameters of a quantized layer but its bias frozen ones, in place; what shares them goes on to."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name != "bias" and type(parameter) is nn.Parameter:
            parameter.requires_grad_(False).__class__ = FrozenParameter
