"""How far a model's predictions are from those of another, its dense one say: KL divergence and equal choices."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from .perplexity import CHUNK, windows_of


@dataclass(frozen=True)
class Agreement:
    """Result of `agreement`.

    Attributes:
        kl: mean KL divergence of the model's predictions from the other's, nats per token, 0 if they are the same.
        same: share of tokens that both hold to be the most likely.
        tokens: predictions compared, `windows * (seqlen - 1)`.
        windows: windows read.
        seqlen: tokens per window.
        seconds: wall time.
    """

    kl: float
    same: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float


@torch.no_grad()
def agreement(
    model: nn.Module,
    other: nn.Module,
    tokens: Tensor,
    seqlen: int | None = None,
    windows: int | None = 10,
    progress: bool = True,
) -> Agreement:
    """Returns how far `model` is from `other` in what it predicts along a text, token by token.

    The windows are those of `perplexity`. The text needs no labels, and how well `other` knows it matters little.

    Args:
        model: a causal language model, on any device.
        other: another one, of the same vocabulary.
        tokens: `[tokens]`, int64.
        seqlen: as for `perplexity`.
        windows: as for `perplexity`.
        progress: show a progress bar.

    Raises:
        ValueError: as `perplexity`, for either model; the two have different vocabularies.
    """
    rows = windows_of(model, tokens, seqlen, windows)
    windows_of(other, tokens, rows.shape[1], windows)
    start, modes = time.perf_counter(), (model.training, other.training)
    model.eval(), other.eval()
    divergence, same = 0.0, 0
    try:
        for row in transformers_logging.tqdm(rows, desc="agreement", leave=False) if progress else rows:
            found, wanted = (_logits(each, row) for each in (model, other))
            if found.shape != wanted.shape:
                raise ValueError(
                    f"The model predicts {found.shape[-1]} tokens and the other {wanted.shape[-1]}; give two models "
                    "of one vocabulary, such as a quantized one and the one it was made of."
                )
            for part, target in zip(found.split(CHUNK), wanted.to(found.device).split(CHUNK), strict=True):
                part, target = part.float().log_softmax(-1), target.float().log_softmax(-1)
                divergence += F.kl_div(part, target, reduction="sum", log_target=True).item()
                same += (part.argmax(-1) == target.argmax(-1)).sum().item()
    finally:
        model.train(modes[0]), other.train(modes[1])
    count, length = rows.shape
    compared = count * (length - 1)
    return Agreement(divergence / compared, same / compared, compared, count, length, time.perf_counter() - start)


def _logits(model: nn.Module, row: Tensor) -> Tensor:
    """Returns the logits `[seqlen - 1, V]` of what follows the tokens of `row`, `[seqlen]`, but the last."""
    return model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1]
