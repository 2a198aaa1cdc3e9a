"""Nested arguments of blocks."""

from collections import UserDict, namedtuple

import pytest
import torch

from crvq_hf.blocks.trees import copy_containers, hidden_of, map_tensors, mappings_of, tensors_of

Pair = namedtuple("Pair", "one other")


class Shared(UserDict):
    """As transformers' dict of keys and values that blocks share: no `dict`."""


def tree():
    a, b = torch.arange(3), torch.rand(2, 2)
    return a, b, ([a, None], {"x": (b, "text"), "y": Pair(a, 2)}, Shared({1: (a, b)}), torch.Size([2, 3]))


def test_tensors_are_changed_and_all_else_is_as_it_was():
    a, b, nested = tree()
    changed = map_tensors(nested, lambda tensor: tensor + 1)
    pairs = zip(tensors_of(changed), tensors_of(nested), strict=True)
    assert all(torch.equal(one, other + 1) for one, other in pairs)
    assert [id(tensor) for tensor in tensors_of(nested)] == [id(tensor) for tensor in (a, b, a, a, b)]
    (first, mapping, shared, size) = changed
    assert first[1] is None and mapping["x"][1] == "text" and mapping["y"].other == 2 and size == (2, 3)
    assert [type(item) for item in changed] == [list, dict, Shared, torch.Size] and type(mapping["y"]) is Pair
    assert shared[1][0] is not a


def test_copies_share_tensors_and_nothing_else():
    a, b, nested = tree()
    copied = copy_containers(nested)
    copied[0].append(b)
    copied[1]["new"] = b
    copied[2][2] = (b,)
    assert len(nested[0]) == 2 and "new" not in nested[1] and 2 not in nested[2]
    assert copied[2][1][0] is a


def test_dicts_are_found_in_order():
    _, _, nested = tree()
    assert list(mappings_of(({"inner": nested},))) == [{"inner": nested}, nested[1], nested[2]]


def test_hidden_states_are_the_first_floating_point_tensor():
    a, b, nested = tree()
    assert hidden_of((a, [b, b + 1])) is b
    with pytest.raises(ValueError, match="no floating point tensor"):
        hidden_of((a, None))
