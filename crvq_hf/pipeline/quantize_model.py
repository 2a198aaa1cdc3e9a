"""A dense model in memory becomes a quantized one: what is quantized, with which settings, and what is recorded."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from ..config import CRVQConfig, shareable_dataset
from ..modeling.embedding import Int8Embedding, Int8Head, quantize_embeddings_
from ..modeling.linear import CRVQLinear
from ..modeling.replace import linear_size, quantizable_linears, unfuse_experts_to_quantize_
from ..resources.settings import leave_inference_mode_, own_settings
from .block_loop import quantize_blocks_
from .budget import within_budget
from .calibration import load_tokenizer


def quantize_model(model: PreTrainedModel, tokenizer: Any = None, config: CRVQConfig | None = None) -> PreTrainedModel:
    """Quantizes a model that is in memory; afterwards it can be saved like any other.

    Args:
        model: changed in place, and put into evaluation mode. It must be on one device; the CPU will do, blocks move
            to the compute device one at a time.
        tokenizer: tokenizer or its name, for calibration text; the one that came with the model by default.
        config: how to quantize, the defaults of `CRVQConfig` if None.

    Returns:
        `model`.

    Raises:
        ValueError: the model is already quantized, is spread over devices, or has nothing to quantize.
    """
    config = CRVQConfig() if config is None else config
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is already quantized ({model.quantization_method}); start from the dense model."
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or devices == {"meta"}:
        raise ValueError(
            f"The model to quantize must be on one device, found it on {sorted(devices)}; "
            "load it with device_map='cpu'."
        )
    recorded = quantize_(model.eval(), config, tokenizer)
    # `import crvq_hf` has put the class there; it knows transformers' hooks, and so stands above this file.
    AutoHfQuantizer.from_config(recorded, pre_quantized=True).attach(model)
    return model


@own_settings()
def quantize_(model: PreTrainedModel, config: CRVQConfig, tokenizer: Any = None) -> CRVQConfig:
    """Quantizes the layers of `model` in place; returns the config to store with it.

    Args:
        model: as for `quantize_model`; transformers does not know yet that it is quantized.
        config: how to quantize.
        tokenizer: for calibration text; by default the config's, else the one that came with the model.

    Raises:
        ValueError: as `quantize_blocks_`, or the budget `bits` cannot be met.
    """
    leave_inference_mode_(model)
    unfuse_experts_to_quantize_(model, config)
    linears, _ = quantizable_linears(model, config)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no layer to quantize; check modules_to_not_convert.")
    config = within_budget(config, map(linear_size, linears.values()))
    tokenizer = config.tokenizer if tokenizer is None else tokenizer
    quantize_blocks_(model, load_tokenizer(model, config, tokenizer), config)
    if config.embedding_bits == 8:
        quantize_embeddings_(model)
    return _recorded_config(model, config)


def _recorded_config(model: nn.Module, config: CRVQConfig) -> CRVQConfig:
    """Returns the config to store with a quantized model: no runtime fields, no texts or local paths of the user."""
    recorded = CRVQConfig.from_dict(config.to_dict())
    recorded.dataset = shareable_dataset(recorded.dataset)
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, CRVQLinear)
    ]
    if not any(isinstance(module, (Int8Embedding, Int8Head)) for module in model.modules()):
        recorded.embedding_bits = 16  # also where 8 were asked for and nothing could take them
    recorded.modules_to_not_convert = sorted({*(config.modules_to_not_convert or []), *dense}) or None
    return recorded
