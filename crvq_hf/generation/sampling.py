"""The choice of the next token, in operations that a CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Processors that neither wait for the device nor look at how many tokens there are.
KNOWN = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)


def next_tokens(logits: Tensor, tokens: Tensor, processors: LogitsProcessorList, do_sample: bool) -> Tensor:
    """Returns the chosen tokens, `[B]` int64.

    Sampling divides the probabilities by exponential noise and takes the largest, as `torch.multinomial` does for one
    sample, but without its checks, for which the host has to wait. The noise is of PyTorch's default generator, so
    that `torch.manual_seed` makes it reproducible. On a CPU the tokens are those of `generate`; elsewhere, and from
    the second call on, they are other ones of the same distribution.

    Args:
        logits: `[B, vocabulary]`, any floating dtype.
        tokens: `[B, length]` int64, what is written so far; columns still to be written repeat an earlier token.
        processors: of the types in `KNOWN`.
        do_sample: whether to draw; else the most likely token is taken.
    """
    scores = processors(tokens, logits.to(torch.float32, copy=True))
    if not do_sample:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    noise = torch.empty_like(probabilities).exponential_()
    return torch.div(probabilities, noise, out=noise).argmax(dim=-1)


def settings(processors: LogitsProcessorList) -> tuple[Any, ...]:
    """Returns what a graph freezes of processors: their types and numbers, of tensors the shapes."""
    return tuple(
        (type(processor), *((name, _frozen(value)) for name, value in sorted(vars(processor).items())))
        for processor in processors
    )


def take_over_(processors: LogitsProcessorList, others: LogitsProcessorList) -> None:
    """Copies what tensors `others`, of equal `settings`, have into those of `processors`."""
    for processor, other in zip(processors, others, strict=True):
        for name, value in vars(processor).items():
            if isinstance(value, Tensor):
                value.copy_(getattr(other, name))


def _frozen(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)
