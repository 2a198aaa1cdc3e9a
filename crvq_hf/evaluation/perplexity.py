"""How good and how fast a model is: perplexity on a text, tokens per second."""

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..calibration.text import check_tokens, first_tokens, longest_text, read_text
from ..dataset.grammar import split_field

SEQLEN = 2048  # tokens per window where the model, and the text, have so many
CHUNK = 256  # positions whose logits are in fp32 at once


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    Attributes:
        value: exp of the mean negative log-likelihood per predicted token.
        tokens: tokens predicted, `windows * (seqlen - 1)`.
        windows: windows read.
        seqlen: tokens per window.
        seconds: wall time.
    """

    value: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float


def check_text(path: str) -> None:
    """Raises ValueError if `path`, which may name a field too, is that of no file."""
    if not os.path.isfile(split_field(path)[0]):
        raise ValueError(f"The text {path} is no file; give the path of a UTF-8 text file.")


def read_text_tokens(tokenizer: Any, path: str | os.PathLike, most: int | None = None) -> Tensor:
    """Returns the tokens of a text, `[tokens]`, int64, without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        path: a UTF-8 text file, or a table, see `read_text`.
        most: how many tokens from its start, no more than these are made; None for all.

    Raises:
        ValueError: there is no such file, it is empty, or holds no text.
    """
    path = os.fspath(path)
    check_text(path)
    tokens = first_tokens(tokenizer, read_text(path, tokenizer), most)
    if not len(tokens):
        raise ValueError(f"The text {path} is empty; give a file with text in it.")
    return tokens


def most_tokens(seqlen: int | None, windows: int) -> int:
    """Returns how many tokens `perplexity` can use of a text at most."""
    return max(1, (seqlen or SEQLEN) * windows)


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Tensor, seqlen: int | None = None, windows: int | None = 10, progress: bool = True
) -> Perplexity:
    """Returns the perplexity of a causal language model on a text.

    The text is cut into windows that do not overlap, from its start. Within a window every token but the first is
    predicted from all before it; the mean is over all predicted tokens. Memory is that of one window.

    Args:
        model: a causal language model, on any device.
        tokens: `[tokens]`, int64.
        seqlen: tokens per window, at least 2; None for 2048, or what the model and the text have.
        windows: how many windows to read at most, None for all.
        progress: show a progress bar.

    Raises:
        ValueError: `seqlen` or `windows` is out of range, the text is shorter than one window, or its tokens are of
            another model.
    """
    rows = windows_of(model, tokens, seqlen, windows)
    count, seqlen = rows.shape
    start, training = time.perf_counter(), model.training
    model.eval()
    total = 0.0
    try:
        bar = transformers_logging.tqdm(rows, desc="perplexity", unit="window", leave=False) if progress else rows
        for row in bar:
            total += _window_loss(model, row[None])
    finally:
        model.train(training)
    predicted = count * (seqlen - 1)
    mean = total / predicted
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, predicted, count, seqlen, time.perf_counter() - start)


def windows_of(model: nn.Module, tokens: Tensor, seqlen: int | None, windows: int | None) -> Tensor:
    """Returns the windows of a text, `[windows, seqlen]`; arguments and errors are those of `perplexity`."""
    longest = longest_text(model)
    check_tokens(model, tokens)
    if seqlen is None:
        seqlen = max(2, min(SEQLEN, longest or SEQLEN, len(tokens)))
    if seqlen < 2 or (longest is not None and seqlen > longest):
        raise ValueError(f"seqlen must be from 2 to the {longest or 'many'} tokens the model takes, got {seqlen}.")
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}.")
    if len(tokens) < seqlen:
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than one window of {seqlen}; give more text or lower seqlen."
        )
    count = len(tokens) // seqlen if windows is None else min(windows, len(tokens) // seqlen)
    return tokens[: count * seqlen].view(count, seqlen)


def _window_loss(model: nn.Module, row: Tensor) -> float:
    """Returns the summed negative log-likelihood, in nats, of all tokens of `row` `[1, seqlen]` but the first."""
    row = row.to(model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    targets = row[0, 1:].to(logits.device)
    chunks = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return sum(F.cross_entropy(part.float(), target, reduction="sum").item() for part, target in chunks)


@torch.no_grad()
def tokens_per_second(model: nn.Module, tokenizer: Any, new_tokens: int = 64) -> float:
    """Returns how many tokens per second the model writes: one sequence, greedy, after a prompt of a few tokens.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer.
        new_tokens: tokens to write, after a first run of two that is not counted.

    Raises:
        ValueError: `new_tokens` is less than 1.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}.")
    prompt = tokenizer("The", return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    start = 0.0
    for count in (2, new_tokens):
        _synchronize(model.device)
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        _synchronize(model.device)
    return new_tokens / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
