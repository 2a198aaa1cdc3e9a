"""Blocks whose weights stay in files: read when a block is run, dropped when it has been.

An absent block has its parameters on the meta device. Whoever runs it, or a model around it, need not know; whoever
looks at its weights does so inside of `present`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_READ = "_read_weights"


def leave_absent_(block: nn.Module, read: Callable[[nn.Module], nn.Module]) -> None:
    """Makes a block one whose weights are read whenever it is run.

    Args:
        block: its tensors that are to be read are on the meta device.
        read: returns, for the block as it is by then, a module that has them, by the same names.
    """
    forward = block.forward

    @functools.wraps(forward)
    def reading(*args: Any, **kwargs: Any) -> Any:
        with present(block):
            return forward(*args, **kwargs)

    block.__dict__[_READ] = read
    block.forward = reading


def is_absent(block: nn.Module) -> bool:
    """Returns whether the weights of a block stay in files; inside of `present` they are also at hand."""
    return _READ in block.__dict__


def any_absent(model: nn.Module) -> bool:
    """Returns whether a model has absent blocks."""
    return any(map(is_absent, model.modules()))


@contextmanager
def present(block: nn.Module) -> Iterator[None]:
    """Has the weights of a block at hand while inside; of one that is not absent they are anyway."""
    left = _fill(block)
    try:
        yield
    finally:
        for tensors, key, tensor, _ in left:
            tensors[key] = tensor


def bring_(block: nn.Module) -> None:
    """Reads the weights of an absent block for good."""
    if is_absent(block):
        _fill(block)
        del block.__dict__[_READ], block.forward


@torch.no_grad()
def _fill(block: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, str]]:
    """Puts weights in the place of tensors on the meta device; returns where, which key, what was there, its name."""
    left = []
    if not is_absent(block):
        return left
    for path, module in block.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    left.append((tensors, key, tensor, f"{path}.{key}".lstrip(".")))
    if left:
        fresh = block.__dict__[_READ](block)
        found = {**dict(fresh.named_parameters(remove_duplicate=False)), **dict(fresh.named_buffers())}
        for tensors, key, _, name in left:
            tensors[key] = found[name]
    return left
