"""The experts of a mixture on codes: stored one by one, and run one after the other as vLLM routes tokens to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from ..config import CRVQConfig
from .linear import multiply, runnable
from .slicing import channels_of_groups, share_of_groups, take_groups, take_rows
from .stored import StoredLayer, register_placeholders, remove_placeholders

# vLLM's names of the layers of an expert, gate, up and down, and those of the parameters it loads them into.
GATE, UP, DOWN = "w1", "w3", "w2"
_PLACES = {"w13_": (GATE, UP), "w2_": (DOWN,)}


class CRVQExpertsMethod(FusedMoEMethodBase):
    """Runs the experts of one block, which the checkpoint has codes for."""

    def __init__(self, config: CRVQConfig, prefix: str, moe: FusedMoEConfig) -> None:
        """Raises ValueError for what these experts cannot do."""
        super().__init__(moe)
        self.config, self.prefix = config, prefix
        if moe.moe_parallel_config.use_ep:
            raise ValueError(
                "CRVQ experts cannot be shared out over processes expert by expert; leave out "
                "--enable-expert-parallel, tensor parallelism cuts each of them."
            )
        if get_current_vllm_config().lora_config is not None:
            raise ValueError(
                f"{prefix} has CRVQ experts, beside which vLLM cannot run LoRA adapters, even if they have none for "
                "experts; leave out --enable-lora."
            )
        if moe.has_bias:
            raise ValueError(f"{prefix} has experts with biases, which CRVQ cannot serve in vLLM; use `crvq serve`.")

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Prepares `layer` for loading; the arguments are vLLM's."""
        parallel = self.moe.moe_parallel_config
        self.rank, self.tp = parallel.tp_rank, parallel.tp_size
        inner = intermediate_size_per_partition * self.tp
        first, second = (hidden_size, inner), (inner, hidden_size)
        names = (GATE, UP) if self.moe.is_act_and_mul else (GATE,)
        layer.codes = {
            (expert, name): StoredLayer(f"{self.prefix}.{expert}.{name}", self.config, *sizes)
            for expert in range(num_experts)
            for name, sizes in [*((name, first) for name in names), (DOWN, second)]
        }
        self.names = names

        def load(tensor_name, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
            layer.codes[expert_id, shard_id].put(tensor_name, loaded_weight)
            return True if return_success else None

        for place, sizes in (("w13_", first), ("w2_", second)):
            register_placeholders(layer, place, self.config.layer_shape(*sizes), load)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turns what has been loaded into layers as the kernels read them."""
        device = [remove_placeholders(layer, place) for place in ("w13_", "w2_")][0]
        experts = 1 + max(expert for expert, _ in layer.codes)
        layer.experts = nn.ModuleList(
            nn.ModuleDict({name: runnable(weight, device) for name, weight in self._take(layer, expert).items()})
            for expert in range(experts)
        )
        del layer.codes

    def _take(self, layer: nn.Module, expert: int) -> dict[str, Any]:
        """Returns the weights that this process has of one expert."""
        weights = {name: layer.codes.pop((expert, name)).weight() for name in (*self.names, DOWN)}
        if self.tp == 1:
            return weights
        down = weights[DOWN]
        groups = share_of_groups(down.num_groups, self.rank, self.tp)
        channels = channels_of_groups(down.channel_order, down.in_group_size, groups)
        return {name: take_rows(weights[name], channels) for name in self.names} | {DOWN: take_groups(down, groups)}

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        """Returns nothing: that is for vLLM's own kernels."""
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Returns the weighted sum of the chosen experts' outputs, `[tokens, H]` in the dtype of `x`.

        Which experts run depends on data, so compiled programs have one opaque operator here.

        Args:
            layer: has the experts.
            x: `[tokens, H]`.
            topk_weights: `[tokens, k]`, weight of each choice.
            topk_ids: `[tokens, k]`, the experts chosen.
            shared_experts: vLLM runs these itself.
            shared_experts_input: as well.
        """
        return torch.ops.crvq_vllm.run_experts(x, topk_weights, topk_ids, self.prefix)

    def run(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Does what `apply` says."""
        result = torch.zeros_like(x)
        if _must_not_wait(x):
            for index, expert in enumerate(layer.experts):
                weight = (topk_weights * (topk_ids == index)).sum(dim=1, keepdim=True)
                result += self._weighted(layer, expert, x, weight)
            return result
        for index in topk_ids.unique().tolist():
            token, choice = torch.where(topk_ids == index)
            y = self._weighted(layer, layer.experts[index], x[token], topk_weights[token, choice, None])
            result.index_add_(0, token, y)
        return result

    def _weighted(self, layer: nn.Module, expert: nn.ModuleDict, x: Tensor, weight: Tensor) -> Tensor:
        """Returns what an expert makes of tokens `[n, H]`, times a weight for each, `[n, 1]`."""
        if layer.apply_router_weight_on_input:
            x, weight = (x * weight).to(x.dtype), (weight != 0).to(x.dtype)
        inner = torch.cat([multiply(x, expert[name]) for name in self.names], dim=-1)
        hidden = inner.new_empty(len(x), inner.shape[1] // len(self.names))
        config = ApplyMoEActivationConfig(
            clamp_limit=layer.swiglu_limit,
            alpha=1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
            beta=layer.swiglu_beta or 0.0,
            activation_situ_beta=self.moe.activation_situ_beta,
            activation_situ_linear_beta=self.moe.activation_situ_linear_beta,
        )
        hidden = apply_moe_activation(layer.activation, hidden, inner, activation_config=config)
        return (multiply(hidden, expert[DOWN]) * weight).to(x.dtype)


def run_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    """Runs the experts of the layer `name` of the model whose forward is going on; see `CRVQExpertsMethod.apply`."""
    layer = get_forward_context().no_compile_layers[name].routed_experts
    return layer.quant_method.run(layer, x, topk_weights, topk_ids)


def _must_not_wait(x: Tensor) -> bool:
    """Returns whether a CUDA graph is being recorded: which experts are chosen cannot be asked then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _register() -> Library:
    library = Library("crvq_vllm", "DEF")
    direct_register_custom_op(
        "run_experts",
        run_experts,
        fake_impl=lambda x, topk_weights, topk_ids, name: torch.empty_like(x),
        target_lib=library,
    )
    return library


_LIBRARY = _register()
