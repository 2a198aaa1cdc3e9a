"""A static cache that a CUDA graph can advance: its length is one tensor for all layers, and no number in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


class GraphLayer(StaticLayer):
    """Keys and values of all tokens, whether attention is to all or to a window: the model's mask hides old ones.

    transformers' own layer for a window counts tokens in a Python integer, which a graph would freeze; and each of its
    layers works out by itself where the next token goes.

    Attributes:
        cumulative_length: 0-dimensional int64, tokens before this forward; the cache's own, which advances it.
    """

    def __init__(self, length: int, seen: Tensor, is_sliding: bool) -> None:
        super().__init__(max_cache_len=length)
        self.cumulative_length = seen
        self.is_sliding = is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes `[B, heads, tokens, channels]` behind what is there; returns all, with room for what is to come."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where, tokens = self.cumulative_length.view(1), key_states.shape[-2]
        if tokens > 1:
            where = where + torch.arange(tokens, device=where.device)
        self.keys.index_copy_(2, where, key_states)
        self.values.index_copy_(2, where, value_states)
        return self.keys, self.values


class GraphCache(StaticCache):
    """A cache of `GraphLayer`s.

    Attributes:
        seen: 0-dimensional int64, how many tokens are in it.
    """

    def __init__(self, config: PreTrainedConfig, length: int, device: torch.device | str = "cpu") -> None:
        """Makes an empty cache for `length` tokens; memory is taken when the first are put into it.

        Raises:
            ValueError: a layer keeps something else than keys and values of all tokens or of a window.
        """
        super().__init__(config=config, max_cache_len=length)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        for index, layer in enumerate(self.layers):
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
                raise ValueError(f"layers of the cache are {type(layer).__name__}s")
            self.layers[index] = GraphLayer(length, self.seen, layer.is_sliding)

    def advance(self, tokens: int) -> None:
        """Counts what a forward, now over, has put into the layers."""
        self.seen.add_(tokens)
