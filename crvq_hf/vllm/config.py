"""`CRVQServing`: what vLLM asks about a CRVQ checkpoint, and which method each of its layers gets."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..checkpoint.headers import DTYPES, TensorInfo, read_headers
from ..config import QUANT_METHOD, CRVQConfig
from .experts import CRVQExpertsMethod
from .linear import CRVQLinearMethod
from .names import ExactRenaming, StoredNames, names_of_experts, original_names
from .vocabulary import Int8RowsMethod


class CRVQServing(QuantizationConfig):
    """The config of a CRVQ checkpoint as vLLM wants it.

    Attributes:
        crvq: what config.json says.
        stored: what the checkpoint has, by the names of vLLM's layers as soon as vLLM has told how it renames them.
        original: a `WeightsMapper` from the names in the checkpoint to those that vLLM expects in one.
    """

    def __init__(self, crvq: CRVQConfig) -> None:
        super().__init__()
        self.crvq = crvq
        self.stored = StoredNames(set())
        self.original = WeightsMapper()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CRVQServing:
        """Returns the config that config.json describes.

        Raises:
            ValueError: it is none that can be, or of an unknown format.
        """
        return cls(CRVQConfig.from_dict(config))

    def get_name(self) -> str:
        """Returns "crvq"."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the dtypes that a model can have."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the oldest GPU that Triton's kernels run on, as vLLM counts them."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no names: all is in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Looks into the checkpoint, of which only headers are read.

        Raises:
            ValueError: it has no codes, or lacks a tensor.
        """
        tensors = _headers(model_name, revision)
        names = StoredNames.of_checkpoint(tensors, self.crvq)
        self.original = WeightsMapper(orig_to_new_renaming=[ExactRenaming(original_names(hf_config, tensors))])
        self.stored = names.renamed(self.original)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follows vLLM where it renames the layers of a model."""
        self.stored = self.stored.renamed(hf_to_vllm_mapper)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Returns what makes of names of tensors in the checkpoint those that vLLM expects."""
        return self.original

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns the method for one layer of vLLM; None for what is dense and no linear layer.

        Raises:
            ValueError: a part of it is quantized and another dense, or it cannot be run as vLLM is asked to.
        """
        check_parallel(get_current_vllm_config())
        if isinstance(layer, LinearBase):
            names = [prefix] if prefix in self.stored.quantized else self._parts(prefix)
            if not self.stored.all_quantized(names, prefix):
                return UnquantizedLinearMethod()
            return CRVQLinearMethod(self.stored.config(names, self.crvq), prefix)
        if isinstance(layer, VocabParallelEmbedding):
            is_head = isinstance(layer, ParallelLMHead)
            return Int8RowsMethod(prefix) if self.stored.has_rows(prefix, is_head) else None
        if isinstance(layer, RoutedExperts):
            layers = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
            given = [name for name in layers if name is not None]
            names = names_of_experts(prefix, layer.moe_config.num_logical_experts, given)
            if self.stored.all_quantized(names, prefix):
                return CRVQExpertsMethod(self.stored.config(names, self.crvq), prefix, layer.moe_config)
        return None

    def _parts(self, prefix: str) -> list[str]:
        """Returns the names of the layers that vLLM makes one of."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]


def check_parallel(vllm: VllmConfig) -> None:
    """Refuses what CRVQ layers cannot do of what vLLM is asked for, before any layer is made.

    Raises:
        ValueError: the degree of tensor parallelism does not divide the channels between the layers of a block.
    """
    size, config = vllm.parallel_config.tensor_parallel_size, vllm.model_config.hf_text_config
    for name in ("intermediate_size", "moe_intermediate_size"):
        channels = getattr(config, name, None)
        if isinstance(channels, int) and channels % size:
            fitting = [n for n in range(1, size) if channels % n == 0]
            raise ValueError(
                f"tensor_parallel_size={size} does not divide the {channels} channels that {name} says; give one that "
                f"does, such as {fitting[-1]}."
            )


def _headers(model: str, revision: str | None) -> dict[str, TensorInfo]:
    """Returns all tensors of a checkpoint in a folder or on the hub by name."""
    if os.path.isdir(model):
        return read_headers(model)
    tensors = {}
    for name, info in get_safetensors_params_metadata(model, revision=revision).items():
        start, end = info["data_offsets"]
        if info["dtype"] in DTYPES:
            tensors[name] = TensorInfo(tuple(info["shape"]), info["dtype"], end - start, model)
    if not tensors:
        raise ValueError(f"The headers of the safetensors files of {model} cannot be read; download it first.")
    return tensors
