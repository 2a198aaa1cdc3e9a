"""A model with quantized embeddings refuses to change the number of its tokens."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .embedding import Rows, parts_of


class FixedVocabulary:
    """Takes the place of a model's method `resize_token_embeddings` while its embeddings are quantized."""

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Returns the embedding if its size is not to change.

        Raises:
            ValueError: it is.
        """
        size = len(self.embedding.weight)
        wanted = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            raise ValueError(
                f"Quantized embeddings cannot be resized (from {size} tokens to {wanted}); call model.dequantize() "
                "first, or resize the dense model and quantize it again."
            )
        return self.embedding


def fix_vocabulary_(model: nn.Module) -> None:
    """Makes a model with quantized embeddings refuse to resize them, and one without able to again."""
    is_fixed = any(isinstance(module, Rows) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "resize_token_embeddings"):
            module.__dict__.pop("resize_token_embeddings", None)
            tables = [part for part in parts_of(module) if isinstance(part, nn.Embedding)] if is_fixed else []
            if tables:
                module.resize_token_embeddings = FixedVocabulary(tables[0])
