"""What a program has set in PyTorch around a run must not reach its result: set what a run needs, and put it back."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def own_settings() -> Iterator[None]:
    """Gradients are on, the default dtype is float32, the default device the CPU, and autocast off.

    Whatever `torch.no_grad`, `torch.inference_mode`, `torch.set_default_dtype` and their like say outside.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # looked at first, as it takes a little time at every call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


def leave_inference_mode_(model: nn.Module) -> None:
    """Replaces parameters and buffers that were made in inference mode, which cannot be trained, by copies.

    Those that are shared stay shared. Nothing of other models is touched.
    """
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, tensor.requires_grad)
                    copy.__dict__.update(tensor.__dict__)
                    copies[id(tensor)] = copy
                tensors[name] = copies[id(tensor)]
