"""`CRVQQuantizer`: how transformers quantizes, saves, loads and dequantizes a CRVQ model.

The only file that knows transformers' quantizer hooks. `from_pretrained` calls them in this order: `__init__`,
`validate_environment`, (the model is built on the meta device), `_process_model_before_weight_loading`,
`update_weight_conversions`, (the weights are loaded), `_process_model_after_weight_loading`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .blocks.finding import find_block_lists
from .checkpoint.blockwise import BlockFiles, LeftOut, files_if_large
from .checkpoint.loading import check_loaded, match_checkpoint
from .checkpoint.metadata import metadata_of
from .checkpoint.sources import heard_options
from .config import QUANT_METHOD, CRVQConfig
from .modeling.counting import QUANTIZED, count_weights_
from .modeling.embedding import (
    Rows,
    answer_dtypes_,
    dequantize_embeddings_,
    find_embeddings,
    replace_embeddings_,
)
from .modeling.experts import UnfusedExperts, check_fusable, fuse_experts_
from .modeling.frozen import freeze_
from .modeling.linear import CRVQLinear
from .modeling.replace import (
    mark_quantized,
    quantizable_linears,
    replace_with_crvq_,
    to_dense,
    unfuse_experts_to_quantize_,
)
from .modeling.stacks import StackedLinears, fuse_stacks_
from .modeling.vocabulary import fix_vocabulary_
from .resources.settings import own_settings


class CRVQQuantizer(HfQuantizer):
    """Connects CRVQ to `from_pretrained`, `save_pretrained` and `model.dequantize()`.

    A dense checkpoint is loaded as it is and quantized afterwards, block by block. A CRVQ checkpoint is loaded into
    `CRVQLinear` layers that stand exactly where the checkpoint has codes.
    """

    requires_calibration = False  # it does calibrate, but by itself: True would refuse dense checkpoints
    is_trainable = True  # adapters only
    is_compileable = True
    quantization_config: CRVQConfig
    _files: BlockFiles | None = None  # of a dense model that is larger than memory, while it is loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses to spread a model over several devices where its layers are about to be replaced.

        Raises:
            ValueError: on a device map that names several devices or the disk while the model is to be quantized,
                or is to be loaded as a dense one.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if self.pre_quantized and not self.quantization_config.dequantize:
            return
        if len(devices) > 1 or devices & {"disk", "meta"}:
            task = "dequantize a model" if self.pre_quantized else "quantize a model"
            raise ValueError(
                f"To {task} while loading, all of it must be on one device, but device_map spreads it over "
                f"{sorted(devices)}; pass device_map='cpu' (blocks move to the GPU one at a time)."
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Returns the renamings alone for a CRVQ checkpoint: it is stored in the model's own layout, nothing fused."""
        if not self.pre_quantized:
            return weight_conversions
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Returns whether a tensor is left in its file, which `get_quantize_ops` sees to."""
        return self._files is not None and self._files.block_of(param_name) != ""

    def get_quantize_ops(self) -> LeftOut:
        """Returns what is done with such a tensor."""
        return LeftOut()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Puts `CRVQLinear` layers where the checkpoint has codes; leaves a model to be quantized alone."""
        tp_size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        if tp_size > 1:
            raise ValueError(
                f"CRVQ layers cannot be split over devices, but tensor parallelism over {tp_size} was asked for; "
                "start one process without tp_plan and tp_size, device_map='auto' gives each of its GPUs whole blocks."
            )
        if not self.pre_quantized:
            find_block_lists(model)
            self._files = files_if_large(model, checkpoint_files or [])
            self._loading_options = heard_options(model, checkpoint_files)
            return
        if checkpoint_files is None:  # a state dict was given, so there are no headers to ask
            unfuse_experts_to_quantize_(model, self.quantization_config)
            names = list(quantizable_linears(model, self.quantization_config)[0])
            embeddings = list(find_embeddings(model, self.quantization_config.embedding_bits))
        else:
            names, embeddings = match_checkpoint(model, checkpoint_files, self.quantization_config)
        replace_with_crvq_(model, names, self.quantization_config)
        replace_embeddings_(model, embeddings, self.quantization_config.embedding_bits)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Quantizes a dense model, or checks a CRVQ model that has just been loaded."""
        if not self.pre_quantized:
            from .pipeline.quantize_model import quantize_  # whoever only loads a model needs none of it

            model.__dict__.pop("adjust_generation_fn", None)  # where it was not called
            options = self.__dict__.pop("_loading_options", {})  # a token may be among them
            if self._files is not None:
                self._files.leave_(model)
                self._files = None
            self.quantization_config = quantize_(model, self.quantization_config, options=options)
        else:
            check_loaded(model)
            if self.quantization_config.dequantize:
                return self._dequantize(model, model.dtype)
        self.attach(model)
        return model

    @own_settings()
    def attach(self, model: PreTrainedModel) -> None:
        """Makes `model` one that transformers knows to be quantized and can save."""
        model.config.quantization_config = self.quantization_config
        mark_quantized(model, True)
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        model.hf_quantizer = self
        model._weight_conversions = []  # saved as it is: the conversions know nothing of codes
        for module in model.modules():
            if isinstance(module, CRVQLinear):
                module.tile_().compute_dtype = model.dtype
            if isinstance(module, QUANTIZED):
                freeze_(module)
        answer_dtypes_(model)
        fix_vocabulary_(model)
        count_weights_(model)
        model.add_model_tags([QUANT_METHOD])
        model.push_to_hub = partial(_push_to_hub, model)
        self.is_compileable = not any(
            isinstance(module, (UnfusedExperts, StackedLinears)) for module in model.modules()
        )

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Turns every layer back into a dense one, in the dtype that the model has by now if none is given."""
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Turns every layer back into a dense one, as if the model had been loaded from a dense checkpoint."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        layers = {name: module for name, module in model.named_modules() if isinstance(module, CRVQLinear)}
        rows = [module for module in model.modules() if isinstance(module, Rows)]
        if any(layer.weight.is_meta or hasattr(layer, "_hf_hook") for layer in [*layers.values(), *rows]):
            raise ValueError(
                "Dequantizing needs the whole model on one device; load it without offloading, "
                "for example with device_map='cpu'."
            )
        check_fusable(model)
        for name, layer in layers.items():
            model.set_submodule(name, to_dense(layer, dtype))
        dequantize_embeddings_(model, dtype)
        fix_vocabulary_(model)
        count_weights_(model)
        fuse_experts_(model)
        fuse_stacks_(model)
        mark_quantized(model, False)
        model.__dict__.pop("push_to_hub", None)
        model._weight_conversions = None  # saved in the layout of the original checkpoint
        model.model_tags = [tag for tag in model.model_tags or [] if tag != QUANT_METHOD]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Returns what is saved and the metadata of its files, see `metadata_of`."""
        return metadata_of(model, self.quantization_config.format_version)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns that a CRVQ model can be saved."""
        return True


def register() -> None:
    """Makes transformers know "crvq"; may be called again after a reload."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    auto.register_quantization_config(QUANT_METHOD)(CRVQConfig)
    auto.register_quantizer(QUANT_METHOD)(CRVQQuantizer)
    others = [cls for cls in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if cls.__name__ != CRVQConfig.__name__]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, CRVQConfig)


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> Any:
    """Uploads `model` with a model card that tells what was measured; see `hub.push_model` for the options."""
    from .sharing.hub import push_model

    return push_model(model, repo_id, **options)
