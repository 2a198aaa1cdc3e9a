"""The streams of hidden states that run through the blocks: how they start, where they are kept, how they are cut."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks.runner import BlockRunner, Gave, State
from ..blocks.trees import map_tensors
from ..config import CRVQConfig
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


def _in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


class Stream:
    """This process's share of the texts on their way through the blocks, batch by batch, on the CPU.

    What the last block gave is kept; what the next one is given, the model makes of it when it is needed.

    Attributes:
        states: of each batch.
        hidden: the hidden states of all texts, that is `[sequences, seqlen, hidden_size]` for most models; None before
            the first block, or where this process has no texts.
    """

    def __init__(self, runner: BlockRunner, tokens: Tensor, allocate: Callable[..., Tensor] | None = None):
        """Starts before the first block.

        Args:
            runner: of the model.
            tokens: `[sequences, seqlen]`; there may be none.
            allocate: makes a tensor for the hidden states of all texts, of a shape and dtype; None: in memory.
        """
        self.runner, self.tokens, self._allocate = runner, tokens, allocate or _in_memory
        self.states = [State(batch) for batch in batches(tokens)]
        self.hidden: Tensor | None = None
        self._index: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes, at most."""
        return round(self.tokens.numel() * (self.runner.hidden_bytes + self.runner.other_bytes))

    def move(self, index: int, call: Callable[[State], Gave]) -> None:
        """Moves all texts past a block.

        Args:
            index: which block.
            call: runs it, on any device and in any floating point dtype.
        """
        start, lists = 0, self.runner.lists
        if self._index is not None and lists[index] != lists[self._index]:
            self.hidden = None  # an encoder's hidden states stay
        for number, state in enumerate(self.states):
            self.states[number] = self._kept(state.then(call(state), lists[index]), index, start)
            start += len(state)
        self._index = index

    def part(self, start: int, stop: int) -> State:
        """Returns the state of sequences `start` to `stop`, which are in one batch; views."""
        before = 0
        for state in self.states:
            if start < before + len(state):
                leaves = [] if self._index is None else self.runner.leaves[self._index]
                return state.part(start - before, stop - before, leaves)
            before += len(state)
        raise IndexError(f"there is no sequence {start}")

    def steps(self, count: int | None = None) -> list[State]:
        """Returns the states of each step of fine-tuning, see `steps`, of the first `count` sequences (None: all)."""
        states, start = [], 0
        for tokens in steps(self.tokens[:count]):
            states.append(self.part(start, start + len(tokens)) if len(tokens) else State(tokens))
            start += len(tokens)
        return states

    def _is_to_be_overwritten(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies where hidden states are put: a block may hand on what it was given."""
        own = self.hidden
        return own is not None and own.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def _kept(self, state: State, index: int, start: int) -> State:
        """Returns a state as it is kept: in the model's dtypes, new hidden states where those of all texts are."""
        leaves, hidden = iter(self.runner.leaves[index]), state.hidden

        def keep(tensor: Tensor) -> Tensor:
            leaf = next(leaves)
            if tensor is not hidden or leaf.dim is None:
                kept = tensor.to("cpu", leaf.dtype)
                return kept.clone() if self._is_to_be_overwritten(kept) else kept
            shape = list(tensor.shape)
            shape[leaf.dim] = len(self)
            if self.hidden is None or list(self.hidden.shape) != shape:
                self.hidden = self._allocate(tuple(shape), leaf.dtype)
            return self.hidden.narrow(leaf.dim, start, tensor.shape[leaf.dim])

        kept = State(state.tokens, map_tensors(state.gaves, keep))
        kept.hidden.copy_(hidden)  # last: what has been there may be among the other tensors
        return kept


def start_streams(runner: BlockRunner, tokens: Tensor, config: CRVQConfig, work: WorkFolder) -> tuple[Stream, Stream]:
    """Returns two streams before the first block: this process's share of all tokens, and of the first `nsamples`.

    Args:
        runner: of the model.
        tokens: `[sequences, seqlen]`, those of all processes.
        config: its `nsamples` is used.
        work: where the hidden states of the first are kept if they are large.

    Raises:
        ValueError: they do not fit in memory or on the disk.
    """
    first, tokens = share(tokens[: config.nsamples]), share(tokens)
    needed = round(first.numel() * runner.hidden_bytes + (first.numel() + tokens.numel()) * runner.other_bytes)
    more = round(tokens.numel() * runner.hidden_bytes)
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
    return Stream(runner, tokens, work.scratch if on_disk else None), Stream(runner, first)
