"""vLLM's embeddings and heads with rows of int8, each with a scale."""

from __future__ import annotations

from typing import Any

import torch
from crvq_kernels import dequantize_rows, rows_linear
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..modeling.embedding import ROW_SCALE


class Int8RowsMethod(QuantizeMethodBase):
    """Runs the embeddings and heads of vLLM that the checkpoint has in 8 bits."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Any = None,
        **extra: Any,
    ) -> None:
        """Gives `layer` its parameters; vLLM's own loader cuts their rows and fills up the vocabulary with zeros."""
        rows = sum(output_partition_sizes)
        layer.scale_dtype = params_dtype
        sizes = {"weight": ((rows, input_size_per_partition), torch.int8), ROW_SCALE: ((rows,), torch.float16)}
        for name, (size, dtype) in sizes.items():
            parameter = nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": weight_loader, "input_dim": 1})
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Has the scales in the dtype of the model, as `Int8Embedding` has them.

        Raises:
            ValueError: they are not finite.
        """
        scales = layer.get_parameter(ROW_SCALE)
        if not scales.isfinite().all():
            raise ValueError(f"{self.prefix}.{ROW_SCALE} holds NaN or infinite values; the checkpoint is damaged.")
        scales.data = scales.data.to(layer.scale_dtype)

    def embedding(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """Returns rows `[..., H]` in the dtype of the model for token numbers `[...]`."""
        scales = layer.weight_row_scale
        return dequantize_rows(F.embedding(tokens, layer.weight), scales[tokens], scales.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns logits `[..., V]` in the dtype of `x`, `[..., H]`."""
        y = rows_linear(x, layer.weight, layer.weight_row_scale)
        return y if bias is None else y + bias

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Lets a head have the rows of the embedding; returns it."""
        for name in ("weight", ROW_SCALE):
            setattr(layer, name, embed_tokens.get_parameter(name))
        return layer
