"""The streams of hidden states that run through the blocks: how they start, where they are kept, how they are cut."""

import logging

import psutil
import torch
from torch import Tensor

from . import distributed
from .blocks import BlockRunner
from .config import CRVQConfig
from .workfolder import WorkFolder

logger = logging.getLogger("crvq")

MEMORY_SHARE = 0.25  # of free memory for the full-precision model's hidden states; beyond it they go to the disk
RUN_TOKENS = 2048  # tokens that go through a block at once


def batches(samples: Tensor) -> tuple[Tensor, ...]:
    """Returns views of `samples` `[nsamples, seqlen, ...]`, at least one sequence each: what a block runs at once."""
    return samples.split(max(1, RUN_TOKENS // samples.shape[1]))


def embed(runner: BlockRunner, tokens: Tensor, config: CRVQConfig, work: WorkFolder) -> tuple[Tensor, Tensor]:
    """Returns what the first block receives, twice, in the model's dtype, on the CPU.

    Args:
        runner: of the model.
        tokens: `[sequences, seqlen]`, those of all processes.
        config: its `nsamples` is used.
        work: where a large stream is kept.

    Returns:
        For this process's share of all `tokens`, `[sequences, seqlen, hidden_size]`, on the disk if large; for its
        share of the first `nsamples` of them.

    Raises:
        ValueError: they do not fit in memory or on the disk, or are too few for so many processes.
    """
    width, dtype = runner.model.config.get_text_config().hidden_size, runner.model.dtype
    first, tokens = distributed.share(tokens[: config.nsamples]), distributed.share(tokens)
    if not len(first):
        raise ValueError(
            f"{config.nsamples} calibration sequences cannot be shared by {distributed.world_size()} processes; "
            "raise nsamples or start fewer processes."
        )
    needed, more = (t.numel() * width * dtype.itemsize for t in (first, tokens))
    available = psutil.virtual_memory().available // distributed.local_size()
    on_disk = more > MEMORY_SHARE * available
    needed += 0 if on_disk else more
    where = f"{needed / 1e9:.2f} GB of memory" + (f" and {more / 1e9:.2f} GB of the disk" if on_disk else "")
    logger.info("Calibration activations take %s.", where)
    if needed > 0.9 * available:
        raise ValueError(
            f"The activations of {first.numel()} calibration tokens need {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free; lower nsamples or seqlen."
        )
    shape = (*tokens.shape, width)
    full = work.scratch(shape, dtype) if on_disk else torch.empty(shape, dtype=dtype)
    for batch, place in zip(batches(tokens), batches(full), strict=True):
        place.copy_(runner.embed(batch))
    return full, full[: len(first)].clone()
