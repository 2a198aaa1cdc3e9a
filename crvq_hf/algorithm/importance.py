"""Phase 1 of CRVQ: how important each input channel is, and the channel order that follows."""

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["weight_activation", "weight", "random"]


def channel_importance(
    rule: Importance,
    weight: Tensor,
    residual: Tensor,
    hessian: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the importance `[K]` of every input channel (CRVQ section 3, "channel importance").

    Args:
        rule: `"weight_activation"`: mean squared quantization error of the channel's weights, times the mean squared
            activation; `"weight"`: mean magnitude of the channel's weights; `"random"`: the ablation.
        weight: `[N, K]`, fp32.
        residual: `[N, K]`, fp32, `weight` minus its quantization with one plain codebook.
        hessian: `[K, K]`, fp32, `X^T X / rows`.
        generator: source of `"random"`, on the CPU.
    """
    if rule == "weight_activation":
        return residual.square().mean(0) * hessian.diagonal()
    if rule == "weight":
        return weight.abs().mean(0)
    draws = torch.rand(weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    return draws.to(weight.device)


def channel_order(importance: Tensor) -> Tensor:
    """Returns the channel order `[K]`, int64, new to old: channels by falling importance, ties by position.

    The critical channels are its beginning; the rest stays sorted, so that a group holds channels of like importance.
    """
    return importance.argsort(descending=True, stable=True)
