"""Tensors in the nested arguments and outputs of blocks: tuples, lists and dicts of them, and whatever else."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Returns `tree` with every tensor changed, in new tuples, lists and dicts of the old types.

    Args:
        tree: tuples (named ones too), lists and dicts of tensors and of anything else, which is taken over as it is.
        change: called with every tensor, in a fixed order.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, change) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, change) for item in tree)
    if isinstance(tree, MutableMapping):
        changed = copy.copy(tree)
        for key, item in tree.items():
            changed[key] = map_tensors(item, change)
        return changed
    return tree


def copy_containers(tree: Any) -> Any:
    """Returns `tree` with the same tensors in new tuples, lists and dicts."""
    return map_tensors(tree, lambda tensor: tensor)


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns the tensors of `tree`, in the order of `map_tensors`."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found


def mappings_of(tree: Any) -> Iterator[MutableMapping]:
    """Yields the dicts in `tree`, those in other dicts after them."""
    if isinstance(tree, MutableMapping):
        yield tree
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from mappings_of(item)


def hidden_of(tree: Any) -> Tensor:
    """Returns the hidden states of what a block gives or is given: the first floating point tensor.

    Raises:
        ValueError: there is none.
    """
    for tensor in tensors_of(tree):
        if tensor.is_floating_point():
            return tensor
    raise ValueError("there is no floating point tensor in it")
