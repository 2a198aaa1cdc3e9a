"""What a checkpoint has codes for, by the names that vLLM gives its layers; no vLLM.

A CRVQ checkpoint has the names of transformers' modules. vLLM expects those of the original checkpoints, which are
others for some mixtures of experts (Mixtral's `block_sparse_moe.experts.0.w1`) and for towers that see images:
transformers knows how to come from the original names to its own, and here that is turned round.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from ..checkpoint.headers import TensorInfo, check_embeddings, embedding_modules, layer_sizes, quantized_modules
from ..config import QUANT_METHOD, CRVQConfig

_EXPERT_LAYER = re.compile(r"experts\.\*\.(\w+)\.weight$")


@dataclass
class StoredNames:
    """Names of modules in a checkpoint.

    Attributes:
        quantized: those with codes.
        rows: embeddings and heads in 8 bits; a head that is tied to its embedding is not stored.
        others: all others that have a weight.
        configs: of those with codes that have settings of their own.
    """

    quantized: set[str]
    rows: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    configs: dict[str, CRVQConfig] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, tensors: dict[str, TensorInfo], config: CRVQConfig) -> StoredNames:
        """Returns the names in a checkpoint, given all of its tensors by name.

        Raises:
            ValueError: nothing is quantized, a tensor is missing, or embeddings are in codes.
        """
        if config.has_coded_embeddings:
            raise ValueError(
                f"vLLM cannot run embeddings of {config.embedding_bits:g} bits, only of 8 or 16; serve this model "
                "with `crvq serve`, or quantize it again with another embedding_bits."
            )
        quantized = quantized_modules(tensors)
        if not quantized:
            raise ValueError(
                f"The config says {QUANT_METHOD!r}, but none of the {len(tensors)} tensors of the checkpoint belongs "
                "to a CRVQ layer; remove quantization_config from config.json if the checkpoint is dense."
            )
        layer_sizes(tensors)  # which wants all tensors of each layer
        check_embeddings(tensors, config)
        rows = {*embedding_modules(tensors)}
        weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        own: dict[str, CRVQConfig] = {}
        for name in quantized if config.overrides else ():
            found = config.of_layer(name)
            # One object for all that are alike: layers find each other by it.
            own[name] = next((other for other in own.values() if other == found), found)
        return cls({*quantized}, rows, weights - rows - {*quantized}, own)

    def renamed(self, mapper: Any) -> StoredNames:
        """Returns the names as `mapper`, a `WeightsMapper` of vLLM, makes them out of names of tensors."""
        sets = ({*_renamed(names, mapper)} for names in (self.quantized, self.rows, self.others))
        configs = {new: config for name, config in self.configs.items() for new in _renamed([name], mapper)}
        return StoredNames(*sets, configs)

    def config(self, names: list[str], default: CRVQConfig) -> CRVQConfig:
        """Returns the config of the layers `names`, of which vLLM makes one.

        Raises:
            ValueError: they have several.
        """
        found = self.configs.get(names[0], default)
        for name in names[1:]:
            if self.configs.get(name, default) != found:
                raise ValueError(
                    f"vLLM makes one layer of {names[0]} and {name}, for which the overrides of the checkpoint set "
                    "different things; quantize again with the same for both, or serve the model with `crvq serve`."
                )
        return found

    def all_quantized(self, names: list[str], what: str) -> bool:
        """Returns whether the layers `names`, of which vLLM makes the one layer `what`, have codes: all, or none.

        Raises:
            ValueError: some have.
        """
        dense = [name for name in names if name not in self.quantized]
        if dense and len(dense) < len(names):
            raise ValueError(
                f"vLLM makes one layer, {what}, of {', '.join(names)}, of which {', '.join(dense)} "
                f"{'is' if len(dense) == 1 else 'are'} dense in the checkpoint and the others quantized; quantize "
                "again with none or all of them in modules_to_not_convert, or serve the model with `crvq serve`."
            )
        return not dense

    def has_rows(self, name: str, is_head: bool) -> bool:
        """Returns whether an embedding or a head has 8 bits.

        Args:
            name: of the layer, "" for an embedding that vLLM builds without one.
            is_head: whether it is a head; one that the checkpoint does not have at all is tied to the embedding.
        """
        if name in self.rows:
            return True
        if is_head:
            return bool(self.rows) and name not in self.others
        return not name and any("head" not in stored.rpartition(".")[2] for stored in self.rows)


def names_of_experts(prefix: str, num_experts: int, layers: Iterable[str]) -> list[str]:
    """Returns the names of all `layers` of the experts below `prefix`."""
    return [f"{prefix}.{expert}.{layer}" for expert in range(num_experts) for layer in layers]


def original_names(config: PreTrainedConfig, names: Iterable[str]) -> dict[str, str]:
    """Returns the names that original checkpoints have for the tensors `names` of a CRVQ one, where they differ.

    A head is left alone: vLLM's models that keep it elsewhere know both names.

    Args:
        config: of the model, whose class transformers has, or nothing differs.
        names: of tensors of a CRVQ checkpoint.
    """
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if kind is None:
        return {}
    with torch.device("meta"):
        conversions = get_model_conversion_mapping(kind(copy.deepcopy(config)), add_legacy=False)
    layers: dict[str, str] = {}
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            sources = [match[1] for match in map(_EXPERT_LAYER.search, conversion.source_patterns) if match]
            target = conversion.target_patterns[0].rpartition(".")[2]
            own = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}.get(target, [])
            if len(own) == len(sources):
                layers.update(zip(own, sources, strict=True))
    renamings = [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]
    originals = {}
    for name in names:
        original = name
        for renaming in renamings if name.startswith("model.") else ():
            original, _ = renaming.rename_source_key(original)
        for own, source in layers.items():
            original = re.sub(rf"(\.experts\.\d+)\.{own}(?=\.)", rf"\1.{source}", original)
        if original != name:
            originals[name] = original
    return originals


class ExactRenaming:
    """Renames tensors by their whole names; vLLM takes it where it takes transformers' renamings.

    vLLM renames again in the parts of a model, by names without what comes before: patterns could match there too.
    """

    def __init__(self, originals: dict[str, str]) -> None:
        self.originals = originals

    def rename_source_key(self, name: str) -> tuple[str, None]:
        """Returns the new name, and nothing, as transformers' renamings do where no pattern matched."""
        return self.originals.get(name, name), None


def _renamed(modules: Iterable[str], mapper: Any) -> list[str]:
    names = (mapper.map_name(f"{module}.weight") for module in modules)
    return [name.removesuffix(".weight") for name in names if name is not None]
