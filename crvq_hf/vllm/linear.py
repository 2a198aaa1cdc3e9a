"""The linear layers of vLLM on codes: one of them holds one or several layers of the checkpoint, side by side.

The layers that vLLM fuses (q, k and v; gate and up) keep codebooks, scales and channel orders of their own. With
tensor parallelism, rows are cut as vLLM cuts them. Where vLLM cuts columns, a layer has every n-th group of channels
if the layer before it can hand on just these (`down_proj` after `gate_up_proj`). Elsewhere each process is sent all of
the input and computes its share of the output rows.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import crvq_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase

from ..config import CRVQConfig
from ..modeling.linear import CRVQLinear
from ..quantized_weight import QuantizedWeight
from .slicing import channels_of_groups, share_of_groups, share_of_rows, take_groups, take_rows
from .stored import StoredLayer, register_placeholders, remove_placeholders

# Between these, models do nothing but multiply gate and up channel by channel.
BEFORE, AFTER = "gate_up_proj", "down_proj"
_SHARDS = {"q": 0, "k": 1, "v": 2}


class CRVQLinearMethod(LinearMethodBase):
    """Runs the linear layers of vLLM that the checkpoint has codes for."""

    def __init__(self, config: CRVQConfig, prefix: str) -> None:
        self.config, self.prefix = config, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Prepares `layer` for loading; the arguments are vLLM's."""
        layer.codes = _Codes(
            self.config, self.prefix, layer, input_size_per_partition, output_partition_sizes, input_size, output_size
        )
        shape = self.config.layer_shape(input_size, output_size)
        register_placeholders(layer, "", shape, layer.codes.load)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turns what has been loaded into layers as the kernels read them."""
        codes, device = layer.codes, remove_placeholders(layer, "")
        has_bias = getattr(layer, "bias", None) is not None
        layer.parts = nn.ModuleList(runnable(weight, device) for weight in codes.take(has_bias))
        layer.weight = layer.parts[0].packed  # adapters look here for the device
        layer.sizes = [part.out_features for part in layer.parts]
        layer.all_rows = codes.output_size if codes.gathers_input else None
        layer.first_row = codes.first_row
        del layer.codes

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns what this process has of the product, `[..., N]`, in the dtype of `x`."""
        if layer.all_rows is not None:
            x = tensor_model_parallel_all_gather(x)
            rows = multiply(x, layer.parts[0])
            y = F.pad(rows, (layer.first_row, layer.all_rows - layer.first_row - rows.shape[-1]))
            return y if bias is None else y + bias
        biases = [None] * len(layer.parts) if bias is None else bias.split(layer.sizes)
        ys = [multiply(x, part, piece) for part, piece in zip(layer.parts, biases, strict=True)]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


def runnable(weight: QuantizedWeight, device: torch.device) -> CRVQLinear:
    """Returns a layer on `device` that holds `weight` as the kernels there read it."""
    return CRVQLinear.from_quantized(weight, None).to(device).tile_()


def multiply(x: Tensor, part: CRVQLinear, bias: Tensor | None = None) -> Tensor:
    """Returns `[..., N]` for `x` `[..., K]`; of compiled programs one opaque operator.

    Elsewhere on a CPU, the layer itself, which has its tensors packed for the kernel once for all calls.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        y = part(x)
        return y if bias is None else y + bias
    operands = part.packed, part.weight_codebooks, part.weight_scale, part.weight_order, bias
    return crvq_kernels.linear(x, *operands, part.nbits, part.num_critical_groups)


class _Codes:
    """The layers of the checkpoint that one layer of vLLM is made of, while they are loaded, and how they are cut.

    Attributes:
        gathers_input: whether the layer runs on all of the input, of which each process has a part.
        first_row: where the rows of this process begin in the output, if so.
    """

    # By config and name, so that a layer finds the one that it hands its output on to.
    _all: WeakValueDictionary = WeakValueDictionary()

    def __init__(
        self,
        config: CRVQConfig,
        prefix: str,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
    ) -> None:
        self.config, self.prefix = config, prefix
        self.in_features, self.output_size, self.sizes = input_size, output_size, output_partition_sizes
        self.cuts_rows = sum(output_partition_sizes) != output_size
        self.cuts_columns = input_size_per_partition != input_size
        self.rank, self.tp = layer.tp_rank, layer.tp_size if self.cuts_rows or self.cuts_columns else 1
        # Where there are fewer heads of keys and values than processes, several have the same.
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        self.replicas = [replicas if place and replicas > 1 else 1 for place in range(len(self.sizes))]
        self.parts: dict[tuple[int, ...], StoredLayer] = {}
        self.gathers_input, self.first_row = False, 0
        self._groups: Tensor | None = None  # what this process has where columns are cut, if it has not all of them
        self._all[id(config), prefix] = self

    def load(self, name: str, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        """Takes a tensor of the checkpoint, for all of the layer or the parts of it that `shard` says."""
        self.part(shard).put(name, tensor)

    def part(self, shard: Any) -> StoredLayer:
        """Returns the layer of the checkpoint that is the sections `shard` of this one."""
        if shard is None:
            sections = tuple(range(len(self.sizes)))
        else:
            sections = shard if isinstance(shard, tuple) else (_SHARDS.get(shard, shard),)
        if sections not in self.parts:
            if not all(isinstance(section, int) and section < len(self.sizes) for section in sections):
                raise ValueError(f"{self.prefix} has a part {shard!r}, which CRVQ layers in vLLM cannot have.")
            rows = sum(self._stored_rows(section) for section in sections)
            name = self.prefix if len(sections) == len(self.sizes) else f"{self.prefix}, part {shard}"
            self.parts[sections] = StoredLayer(name, self.config, self.in_features, rows)
        return self.parts[sections]

    def take(self, has_bias: bool) -> list[QuantizedWeight]:
        """Returns the weights of this process, in the order of the output."""
        loaded = dict(sorted(self.parts.items()))
        missing = {*range(len(self.sizes))} - {section for sections in loaded for section in sections}
        if missing:
            raise ValueError(
                f"The checkpoint lacks part {min(missing)} of {self.prefix}; it is incomplete, save or download it "
                "again."
            )
        weights = {sections: part.weight() for sections, part in loaded.items()}
        self.parts = {}  # what was loaded is in memory no longer than need be
        if self.cuts_columns:
            (weight,) = weights.values()
            if self._groups is not None:
                return [take_groups(weight, self._groups)]
            rows = share_of_rows(weight.out_features, self.rank, self.tp)
            self.gathers_input, self.first_row = True, rows.start
            return [take_rows(weight, torch.arange(rows.start, rows.stop))]
        if self.tp == 1:
            return list(weights.values())
        channels = self._channels_after(has_bias)
        if channels is not None:
            return [take_rows(weight, channels) for weight in weights.values()]
        return [take_rows(weight, self._rows(sections)) for sections, weight in weights.items()]

    def _stored_rows(self, section: int) -> int:
        return self.sizes[section] * (self.tp if self.cuts_rows else 1) // self.replicas[section]

    def _rows(self, sections: tuple[int, ...]) -> Tensor:
        """Returns which rows of the layer of the checkpoint this process has, as vLLM cuts its sections."""
        rows, start = [], 0
        for section in sections:
            first = start + self.rank // self.replicas[section] * self.sizes[section]
            rows.append(torch.arange(first, first + self.sizes[section]))
            start += self._stored_rows(section)
        return torch.cat(rows)

    def _channels_after(self, has_bias: bool) -> Tensor | None:
        """Returns the channels that the next layer wants of this one, in their order; None where it takes all.

        vLLM cuts biases, and adapters beside the layer, in the order of the checkpoint: then ours has to be that too.
        """
        name, dot, last = self.prefix.rpartition(".")
        after = self._all.get((id(self.config), f"{name}{dot}{AFTER}")) if last == BEFORE else None
        if after is None or not after.parts or has_bias or get_current_vllm_config().lora_config is not None:
            return None
        (part,) = after.parts.values()
        weight = part.weight()
        after._groups = share_of_groups(weight.num_groups, self.rank, self.tp)
        return channels_of_groups(weight.channel_order, weight.in_group_size, after._groups)
