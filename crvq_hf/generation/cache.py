"""A static cache that a CUDA graph can advance: every length is a tensor, none a number in Python."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


class WholeSlidingLayer(StaticLayer):
    """A layer of sliding-window attention that keeps all tokens; the mask, which the model makes, hides old ones.

    transformers' own keeps only the window, and counts its tokens in a Python integer: a graph would freeze that.
    """

    is_sliding = True


def static_cache(config: PreTrainedConfig, length: int) -> StaticCache:
    """Returns an empty cache for `length` tokens; memory is taken when the first are put into it.

    Raises:
        ValueError: a layer keeps something else than keys and values of all tokens or of a window.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = WholeSlidingLayer(max_cache_len=length)
        elif type(layer) is not StaticLayer:
            raise ValueError(f"layers of the cache are {type(layer).__name__}s")
    return cache


def lengths(cache: StaticCache) -> list[Tensor]:
    """Returns the number of tokens that each layer of a cache in use holds, 0-dimensional int64."""
    return [layer.cumulative_length for layer in cache.layers]
