"""A dense model in memory becomes a quantized one: what is quantized, with which settings, and what is recorded."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..blocks.absent import is_absent
from ..calibration.samples import SHORT, completed, given_samples
from ..calibration.tokens import tokenizer_for
from ..checkpoint.planned import Beside, bytes_in
from ..checkpoint.sources import known_options, load_tokenizer
from ..config import ROW_BITS, CRVQConfig
from ..dataset.grammar import shareable_dataset
from ..modeling.embedding import Rows, quantize_embeddings_
from ..modeling.linear import CRVQLinear
from ..modeling.replace import is_dense_linear, mark_quantized, unfuse_experts_to_quantize_
from ..modeling.stacks import unfuse_stacks_
from ..naming import is_named_by
from ..resources.device import compute_device
from ..resources.settings import leave_inference_mode_, own_settings
from ..selection.choice import choose_layers, dense_share
from ..selection.stacked_weights import find_stacks
from .block_loop import quantize_blocks_
from .plan import check_plan


def quantize_model(
    model: PreTrainedModel,
    tokenizer: Any = None,
    config: CRVQConfig | None = None,
    options: dict[str, Any] | None = None,
    beside: Beside | None = None,
) -> PreTrainedModel:
    """Quantizes a model that is in memory; afterwards it can be saved like any other.

    Args:
        model: changed in place, and put into evaluation mode. It must be on one device; the CPU will do, blocks move
            to the compute device one at a time.
        tokenizer: tokenizer or its name, or processor, for calibration text or sound; what came with the model by
            default.
        config: how to quantize, the defaults of `CRVQConfig` if None.
        options: what `from_pretrained` needs to load that tokenizer, as `revision`, `subfolder`, `trust_remote_code`.
        beside: what says, for `config.fit`, the bytes of the files beside the model, see `checkpoint.planned`; None
            for those of the tokenizer.

    Returns:
        `model`.

    Raises:
        ValueError: the model has adapters, is no transformers model, already quantized, spread over devices, or has
            nothing to quantize; or what it needs does not fit in memory or on the disk.
    """
    config = CRVQConfig() if config is None else config
    _check_plain(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is already quantized ({model.quantization_method}); start from the dense model."
        )
    absent = {id(p) for module in model.modules() if is_absent(module) for p in module.parameters()}
    devices = {str(parameter.device) for parameter in model.parameters() if id(parameter) not in absent}
    if len(devices) > 1 or devices == {"meta"}:
        raise ValueError(
            f"The model to quantize must be on one device, found it on {sorted(devices)}; "
            "load it with device_map='cpu'."
        )
    recorded = quantize_(model.eval(), config, tokenizer, options, beside)
    # `import crvq_hf` has put the class there; it knows transformers' hooks, and so stands above this file.
    AutoHfQuantizer.from_config(recorded, pre_quantized=True).attach(model)
    return model


@own_settings()
def quantize_(
    model: PreTrainedModel,
    config: CRVQConfig,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    beside: Beside | None = None,
) -> CRVQConfig:
    """Quantizes the layers of `model` in place; returns the config to store with it.

    Args:
        model: as for `quantize_model`; transformers does not know yet that it is quantized.
        config: how to quantize.
        tokenizer: for calibration text; by default the config's, else the one that came with the model.
        options: that the model was loaded with, for its tokenizer; see `checkpoint.sources`.
        beside: as for `quantize_model`.

    Raises:
        ValueError: as `quantize_blocks_`, or the budget `bits` or `fit` cannot be met.
    """
    leave_inference_mode_(model)
    unfuse_experts_to_quantize_(model, config)
    patterns = config.modules_to_not_convert or []
    unfuse_stacks_(model, find_stacks(model, leave=lambda name: is_named_by(name, patterns)))
    mark_quantized(model, True)  # some models then call a layer whose weight they would read else
    try:
        options = known_options(model) | (options or {})
        beside = beside or _tokenizer_beside(model, config, tokenizer, options)
        tokenizer = tokenizer_for(model, config, config.tokenizer if tokenizer is None else tokenizer, options)
        samples = given_samples(model, tokenizer, config, options)
        tried = completed(model, samples[:1], SHORT, compute_device(config.device))
        config, dense_rows = choose_layers(model, config, *tried, beside=beside)
        check_plan(model, config)
        quantize_blocks_(model, tokenizer, config, samples, dense_rows)
    except BaseException:
        mark_quantized(model, False)
        raise
    if config.embedding_bits == ROW_BITS:
        quantize_embeddings_(model, dense_rows)
    layers = [module for module in model.modules() if isinstance(module, CRVQLinear)]
    model.crvq_report = getattr(model, "crvq_report", {}) | {"dense_share": dense_share(model, layers)}
    return _recorded_config(model, config)


def _tokenizer_beside(
    model: PreTrainedModel, config: CRVQConfig, tokenizer: Any, options: dict[str, Any]
) -> Beside | None:
    """Returns what says the bytes of a tokenizer's files, None if there is none or it does not matter."""
    tokenizer = tokenizer or config.tokenizer or model.name_or_path
    if config.fit is None or not tokenizer:
        return None
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = load_tokenizer(tokenizer, model.name_or_path, options)
        except (OSError, ValueError, KeyError):  # where there has to be one, this is said elsewhere
            return None
    nbytes = bytes_in(tokenizer.save_pretrained)
    return lambda layers: {"tokenizer": nbytes}


def _check_plain(model: Any) -> None:
    """Raises ValueError if a model is not transformers' own class, or has adapters."""
    peft = sys.modules.get("peft")  # who has not imported it has no adapters
    kinds = () if peft is None else (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer)
    if isinstance(model, nn.Module) and any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has PEFT adapters, which would be quantized too; merge them first: "
            "model = model.merge_and_unload()."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"quantize_model takes a transformers model, got {type(model).__name__}; give the model that is inside."
        )


def _recorded_config(model: nn.Module, config: CRVQConfig) -> CRVQConfig:
    """Returns the config to store with a quantized model: no runtime fields, no texts or local paths of the user."""
    recorded = CRVQConfig.from_dict(config.to_dict())
    recorded.dataset = shareable_dataset(recorded.dataset)
    dense = [name for name, module in model.named_modules() if is_dense_linear(module)]
    if not any(isinstance(module, Rows) for module in model.modules()):
        recorded.embedding_bits = 16  # also where fewer were asked for and nothing could take them
    recorded.modules_to_not_convert = sorted({*(config.modules_to_not_convert or []), *dense}) or None
    return recorded
