"""Parameters that hold the tensors of a quantized layer: never trained, whoever asks for it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


class _PassesBy:
    """Stands in the place of a frozen parameter's method `requires_grad_`, which for integers would raise."""

    def __init__(self, parameter: nn.Parameter | None) -> None:
        self.parameter = None if parameter is None else weakref.ref(parameter)

    def __call__(self, requires_grad: bool = True) -> nn.Parameter | None:
        """Returns the parameter as it is, without gradient; None where it was unpickled."""
        return None if self.parameter is None else self.parameter()

    def __reduce__(self) -> tuple:
        return _PassesBy, (None,)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Returns `tensor` as a parameter without gradient, which `model.requires_grad_(True)` passes by.

    It is of no class of its own: what traces or wraps programs turns subclasses of `nn.Parameter` away.
    """
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)
    parameter.requires_grad_ = _PassesBy(parameter)
    return parameter


def freeze_(layer: nn.Module) -> None:
    """Makes all parameters of a quantized layer but its bias frozen ones, in place; what shares them goes on to."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name != "bias":
            frozen_parameter(parameter)


def as_traced(tensor: Tensor) -> Tensor:
    """Returns a tensor as tracers take it: a subclass of parameters as a plain tensor while a mode is on.

    Tracers (`make_fx`, `torch.func.linearize`) know tensors and parameters, and turn every subclass away.
    """
    if torch.compiler.is_compiling() or type(tensor) is nn.Parameter:
        return tensor
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    if not (before_dispatch or torch._C._len_torch_dispatch_stack()):
        return tensor
    with _disable_current_modes():
        return tensor.detach()
