"""A CUDA graph's double on a CPU: records the operations of a step on their tensors, and runs them again.

As in a graph, tensors stay where they are, what Python computed stays what it was, and the host sees no value.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crvq_hf.generation.graph import GraphError

# What makes the host wait for a GPU.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class Recorder(TorchDispatchMode):
    """Runs operations and records them; fails at those that the host would wait in.

    Attributes:
        calls: function, arguments, and the tensors that it made: neither views of its arguments nor these themselves.
        before: by place in memory, a tensor that is written to and what it held.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        masks = [t for t in tree_leaves(args[1]) if is_tensor(t) and t.dtype == torch.bool] if name == "index" else []
        if name in WAITS or masks:
            raise RuntimeError(f"the host would wait in {name}")
        given = {address(tensor) for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                part = (address(value), value.storage_offset(), value.shape, value.stride())
                self.before.setdefault(part, (value, value.clone()))
        result = func(*args, **kwargs)
        made = [t if is_tensor(t) and address(t) not in given else None for t in tree_leaves(result)]
        self.calls.append((func, args, kwargs, made))
        return result

    def replay(self):
        for func, args, kwargs, made in self.calls:
            for old, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def address(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def watch(step, state) -> None:
    """Does what `graph.watch` does, without a device."""
    saved = [tensor.clone() for tensor in state]
    try:
        with Recorder():
            step()
    except RuntimeError as error:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        step()
        raise GraphError(str(error)) from error


def capture(step):
    """Returns what runs `step` again as it was recorded; as in a graph, capturing changes nothing."""
    noise, recorder = torch.get_rng_state(), Recorder()
    with recorder:
        step()
    for tensor, value in reversed(recorder.before.values()):  # parts may overlap
        tensor.copy_(value)
    torch.set_rng_state(noise)
    return recorder.replay
