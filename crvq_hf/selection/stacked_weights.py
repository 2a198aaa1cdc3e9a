"""Finding parameters that are stacks of weights, by watching what a model does with them on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.pytorch_utils import Conv1D

from ..blocks.absent import is_absent, present
from ..blocks.finding import kind_of, named_blocks
from ..blocks.runner import replaced_forwards
from ..modeling.experts import shared_parameters
from ..modeling.stacks import IN_OUT, OUT_IN, PRODUCTS
from .trial import run_on_trial

logger = logging.getLogger("crvq")

_TRANSPOSING = ("transpose", "swapaxes", "T", "mT", "t")
_READING = ("shape", "device", "size", "dim", "ndim", "numel", "is_meta", "requires_grad")


class _Probe(Tensor):
    """A parameter in the hands of a model on trial: notes how it is multiplied by, or that something else is done.

    Attributes:
        notes: the shapes of the stack and layouts it was used with; None for any other use.
        stack: how it is seen as matrices, None before it is.
        index: whether this is one of them.
        flipped: whether they are transposed.
    """

    notes: set[tuple[torch.Size, str] | None]
    stack: torch.Size | None
    index: bool
    flipped: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":  # of an attribute
            name = func.__self__.__name__
        probes = [value for value in tree_leaves((args, kwargs)) if isinstance(value, _Probe)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if name in _READING:
            return result
        if len(probes) == 1 and probes[0] is args[0]:
            follows = args[0]._seen(name, result)
        else:
            follows = None
            is_product = len(probes) == 1 and len(args) > 1 and probes[0] is args[1] and name in PRODUCTS
            probes[0].notes.add(args[1]._use(name, args[0]) if is_product else None)
            return result
        if follows is None:
            probes[0].notes.add(None)
            return result
        probe = result.as_subclass(_Probe)
        probe.notes = probes[0].notes
        probe.stack, probe.index, probe.flipped = follows
        return probe

    def _seen(self, name: str, result: Any) -> tuple[torch.Size, bool, bool] | None:
        """Returns stack, index and flipped of what became of this probe, None if it can be followed no further."""
        if name in ("view", "reshape") and not self.index and not self.flipped and result.dim() == 3:
            return result.shape, False, False
        if name in _TRANSPOSING and self.stack and result.shape == (*self.shape[:-2], *self.shape[:-3:-1]):
            return self.stack, self.index, not self.flipped
        if name == "__getitem__" and self.stack and not self.index and result.shape == self.shape[1:]:
            return self.stack, True, self.flipped
        return None

    def _use(self, name: str, x: Tensor) -> tuple[torch.Size, str] | None:
        """Returns what to note of a product of `x` and this probe."""
        if not self.stack or not (self.index or (name != "linear" and x.dim() == 3)):
            return None
        return self.stack, OUT_IN if (name == "linear") != self.flipped else IN_OUT


class _Place(NamedTuple):
    """Where a parameter is: its name in the model, the module that has it, its name there."""

    name: str
    module: nn.Module
    key: str


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, _Probe) else value


def find_stacks(model: nn.Module, leave: Callable[[str], bool]) -> dict[str, tuple[torch.Size, str]]:
    """Returns the parameters in the blocks of a model that are stacks of matrices: (stack, layout) by name.

    What is found holds for all parameters of a kind, also where no token came by.

    Args:
        model: a transformers model in eval mode, dense, which is run on a few tokens.
        leave: says of the name of a parameter whether it is to be left alone.
    """
    shared = shared_parameters(model)
    named = named_blocks(model)
    found: dict[str, list[_Place]] = {path: [] for path in named}  # by block
    for path, block in named.items():
        for name, module in block.named_modules(prefix=path):
            if type(module).__module__.startswith("torch.nn") or isinstance(module, Conv1D):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}"
                if parameter.dim() in (2, 3) and full not in shared and not leave(full):
                    found[path].append(_Place(full, module, key))
    if not any(found.values()):
        return {}
    notes: dict[str, set] = {}
    blocks = nn.ModuleList(named.values())
    absent = {index: found[path] for index, path in enumerate(found) if is_absent(blocks[index])}
    others = [place for path, places in found.items() if not is_absent(named[path]) for place in places]

    def probing(index: int) -> Callable[..., Any]:
        forward = blocks[index].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with present(blocks[index]), _probed(absent[index], notes):
                return forward(*args, **kwargs)

        return run

    try:
        with _probed(others, notes), replaced_forwards(blocks, {index: probing(index) for index in absent}):
            run_on_trial(model)
    except Exception as error:  # whatever a model raises that cannot be given text alone
        logger.debug("Looking for stacked weights in %s failed: %s", type(model).__name__, error)
        return {}
    known = {place.name: notes.get(kind_of(place.name), set()) for places in found.values() for place in places}
    return {name: next(iter(uses)) for name, uses in known.items() if len(uses) == 1 and None not in uses}


@contextmanager
def _probed(places: list[_Place], notes: dict[str, set]) -> Iterator[None]:
    """Has probes in the places of parameters while inside, which note under the parameter's kind."""
    before = {id(place.module): (place.module, dict(place.module._parameters)) for place in places}
    try:
        for name, module, key in places:
            parameter = module._parameters.pop(key)
            probe = parameter.detach().as_subclass(_Probe)
            probe.notes = notes.setdefault(kind_of(name), set())
            probe.stack, probe.index, probe.flipped = parameter.shape if parameter.dim() == 3 else None, False, False
            module.__dict__[key] = probe
        yield
    finally:
        for _, module, key in places:
            module.__dict__.pop(key, None)
        for module, parameters in before.values():
            module._parameters.clear()
            module._parameters.update(parameters)
