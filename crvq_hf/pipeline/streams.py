"""The streams of hidden states that run through the blocks: how they start, where they are kept, how they are cut."""

import logging

import torch
from torch import Tensor

from ..config import CRVQConfig
from ..modeling.blocks import BlockRunner
from ..resources import distributed
from ..resources.workfolder import WorkFolder

logger = logging.getLogger("crvq")

MEMORY_SHARE = 0.25  # of free memory for the full-precision model's hidden states; beyond it they go to the disk
RUN_TOKENS = 2048  # tokens that go through a block at once
STEP_TOKENS = 256  # tokens of a step of fine-tuning: many small steps beat few large ones (benchmarks/LOG.md)


def _sizes(seqlen: int) -> tuple[int, int]:
    """Returns how many sequences are in a step of fine-tuning and in a batch, which is a number of steps."""
    step = max(1, STEP_TOKENS // seqlen)
    return step, step * max(1, RUN_TOKENS // (step * seqlen))


def batches(samples: Tensor) -> tuple[Tensor, ...]:
    """Returns views of `samples` `[sequences, seqlen, ...]`: what a block runs at once, at least one sequence."""
    return samples.split(_sizes(samples.shape[1])[1]) if len(samples) else ()


def share(samples: Tensor) -> Tensor:
    """Returns this process's sequences of `samples` `[sequences, seqlen, ...]`: every n-th batch, from its rank on.

    Whole batches, so that what a batch gives does not depend on the number of processes. There may be none.
    """
    return torch.cat([samples[:0], *batches(samples)[distributed.rank() :: distributed.world_size()]])


def steps(samples: Tensor) -> list[Tensor]:
    """Returns the sequences of each step of fine-tuning, in the order of one process.

    Args:
        samples: what `share` has returned, or as many other things, `[sequences of this process, seqlen, ...]`.

    Returns:
        Views; empty ones for the steps whose sequences another process has.
    """
    step, batch = _sizes(samples.shape[1])
    total = sum(distributed.gather(len(samples)))
    own = iter(samples.split(step))
    owners = [start // batch % distributed.world_size() for start in range(0, total, step)]
    return [next(own) if owner == distributed.rank() else samples[:0] for owner in owners]


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
        ValueError: they do not fit in memory or on the disk.
    """
    width, dtype = runner.model.config.get_text_config().hidden_size, runner.model.dtype
    first, tokens = share(tokens[: config.nsamples]), share(tokens)
    needed, more = (t.numel() * width * dtype.itemsize for t in (first, tokens))
    available = distributed.free_memory_bytes()
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
    full = work.scratch(shape, dtype) if on_disk else torch.empty(shape, dtype=dtype, device="cpu")
    for batch, place in zip(batches(tokens), batches(full), strict=True):
        place.copy_(runner.embed(batch))
    return full, full[: len(first)].clone()
