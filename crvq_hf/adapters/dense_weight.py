"""`DenseWeight`: what a quantized layer shows as its weight to code that reads one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

_READ_BELOW = (Tensor.numpy, Tensor.tolist, Tensor.__deepcopy__)  # read memory themselves


class WeightIsFrozen(ValueError):
    """Something would change the weight of a quantized layer, or train it."""

    def __init__(self) -> None:
        super().__init__(
            "This would change or train the weight of a quantized layer, which can only be read; leave such layers "
            "out, or call model.dequantize() first."
        )


class DenseWeight(Tensor):
    """A dense weight that is made anew for each operation that needs its numbers, so that it takes no memory.

    Its views are of this class too, and so are `data` and `detach()`; all else that is computed from it is a plain
    tensor. It passes for an `nn.Parameter`. What would change it, or make it trainable, raises `WeightIsFrozen`:
    no such change could reach the codes.
    """

    _make: Callable[[], Tensor]
    _on: torch.device

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], like: Tensor, device: torch.device) -> DenseWeight:
        """Returns a stand-in for what `make` returns, which has the shape, strides and dtype of `like`.

        To PyTorch it is a meta tensor that says it is on `device`. So it refuses `other.data = weight`, which asks
        nobody here; did it take this for a tensor on a CPU, `other` would have no memory behind it.
        """
        options = {"strides": like.stride(), "dtype": like.dtype, "device": "meta", "dispatch_device": True}
        weight = Tensor._make_wrapper_subclass(cls, like.shape, **options)
        weight._make, weight._on = make, device
        weight._is_param = True  # isinstance(weight, nn.Parameter) asks for it
        return weight

    def __repr__(self) -> str:
        return f"DenseWeight(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):
            touched = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        else:
            touched = func == Tensor.data.__set__ and isinstance(args[0], cls)
        if touched:
            raise WeightIsFrozen
        if func in _READ_BELOW:
            args = tuple(value._dense() if isinstance(value, cls) else value for value in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._on
        kwargs = kwargs or {}
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                if any(isinstance(leaf, cls) for leaf in tree_flatten(value)[0]):
                    raise WeightIsFrozen

        def compute() -> Any:
            return func(*tree_map_only(cls, cls._dense, args), **tree_map_only(cls, cls._dense, kwargs))

        is_view = any(value.alias_info is not None for value in func._schema.returns)
        if not (is_view and isinstance(args[0], cls)):
            return compute()
        meta = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device="meta")
        views, spec = tree_flatten(func(meta, *args[1:], **kwargs))
        lazy = [
            cls(lambda at=at: tree_flatten(compute())[0][at], like, args[0].device) for at, like in enumerate(views)
        ]
        return tree_unflatten(lazy, spec)

    def _dense(self) -> Tensor:
        return self._make()


def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Returns the arguments of the schema of `func` that are given by name, with their values."""
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
