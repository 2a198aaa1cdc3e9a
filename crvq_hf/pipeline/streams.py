"""The streams of hidden states that run through the blocks: how they start, where they are kept, how they are cut."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks.runner import BlockRunner, Gave, Inputs, State
from ..blocks.trees import map_tensors
from ..config import CRVQConfig
from ..resources import distributed
from ..resources.workfolder import WorkFolder

logger = logging.getLogger("crvq")

MEMORY_SHARE = 0.25  # of free memory for the full-precision model's hidden states; beyond it they go to the disk
RUN_TOKENS = 2048  # tokens that go through a block at once
STEP_TOKENS = 256  # tokens of a step of fine-tuning: many small steps beat few large ones (benchmarks/LOG.md)


# Text, `[sequences, seqlen]`, or samples of anything else, each of which is a batch and a step of its own.
Samples = Tensor | list[Inputs]


def _sizes(samples: Samples) -> tuple[int, int]:
    """Returns how many samples are in a step of fine-tuning and in a batch, which is a number of steps."""
    if isinstance(samples, list):
        return 1, 1
    seqlen = samples.shape[1]
    step = max(1, STEP_TOKENS // seqlen)
    return step, step * max(1, RUN_TOKENS // (step * seqlen))


def _cut(samples: Samples, size: int) -> list[Samples]:
    """Returns samples in pieces of `size`; views."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def batches(samples: Samples) -> list[Samples]:
    """Returns views of `samples`: what a block runs at once, at least one of them."""
    return _cut(samples, _sizes(samples)[1])


def share(samples: Samples) -> Samples:
    """Returns this process's part of `samples`: every n-th batch, from its rank on.

    Whole batches, so that what a batch gives does not depend on the number of processes. There may be none.
    """
    own = batches(samples)[distributed.rank() :: distributed.world_size()]
    return sum(own, []) if isinstance(samples, list) else torch.cat([samples[:0], *own])


def steps(samples: Samples) -> list[Samples]:
    """Returns the samples of each step of fine-tuning, in the order of one process.

    Args:
        samples: what `share` has returned, or as many other things.

    Returns:
        Views; empty ones for the steps whose samples another process has.
    """
    step, batch = _sizes(samples)
    total = sum(distributed.gather(len(samples)))
    own = iter(_cut(samples, step))
    owners = [start // batch % distributed.world_size() for start in range(0, total, step)]
    return [next(own) if owner == distributed.rank() else samples[:0] for owner in owners]


def num_elements(samples: Samples) -> int:
    """Returns how many numbers a model is given; of text, how many tokens."""
    if isinstance(samples, list):
        return sum(tensor.numel() for inputs in samples for tensor in inputs.values())
    return samples.numel()


def _inputs(samples: Samples) -> Inputs:
    """Returns what a model is given of a batch or a step; empty if that is."""
    if isinstance(samples, list):
        return samples[0] if samples else {}
    return {"input_ids": samples} if len(samples) else {}


def _in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


class Stream:
    """This process's share of the texts on their way through the blocks, batch by batch, on the CPU.

    What the last block gave is kept; what the next one is given, the model makes of it when it is needed.

    Attributes:
        states: of each batch.
        hidden: the hidden states of all texts, that is `[sequences, seqlen, hidden_size]` for most models; None before
            the first block, where this process has no texts, or where the samples are something else.
    """

    def __init__(self, runner: BlockRunner, samples: Samples, allocate: Callable[..., Tensor] | None = None):
        """Starts before the first block.

        Args:
            runner: of the model.
            samples: there may be none.
            allocate: makes a tensor for the hidden states of all texts, of a shape and dtype; None: in memory.
        """
        self.runner, self.samples, self._allocate = runner, samples, allocate or _in_memory
        self.states = [State(_inputs(batch)) for batch in batches(samples)]
        self.hidden: Tensor | None = None
        self._index: int | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes, at most."""
        return round(num_elements(self.samples) * (self.runner.hidden_bytes + self.runner.other_bytes))

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
        """Returns the state of samples `start` to `stop`, which are in one batch; views."""
        if isinstance(self.samples, list):
            return self.states[start]
        before = 0
        for state in self.states:
            if start < before + len(state):
                leaves = [] if self._index is None else self.runner.leaves[self._index]
                return state.part(start - before, stop - before, leaves)
            before += len(state)
        raise IndexError(f"there is no sample {start}")

    def steps(self, count: int | None = None) -> list[State]:
        """Returns the states of each step of fine-tuning, see `steps`, of the first `count` samples (None: all)."""
        states, start = [], 0
        for samples in steps(self.samples[:count]):
            states.append(self.part(start, start + len(samples)) if len(samples) else State({}))
            start += len(samples)
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

        kept = State(state.inputs, map_tensors(state.gaves, keep))
        kept.hidden.copy_(hidden)  # last: what has been there may be among the other tensors
        return kept


def start_streams(
    runner: BlockRunner, samples: Samples, config: CRVQConfig, work: WorkFolder
) -> tuple[Stream, Stream]:
    """Returns two streams before the first block: this process's share of all samples, and of the first `nsamples`.

    Args:
        runner: of the model.
        samples: those of all processes.
        config: its `nsamples` is used.
        work: where the hidden states of the first are kept if they are large.

    Raises:
        ValueError: they do not fit in memory or on the disk.
    """
    first, samples = share(samples[: config.nsamples]), share(samples)
    few, many = num_elements(first), num_elements(samples)
    needed = round(few * runner.hidden_bytes + (few + many) * runner.other_bytes)
    more = round(many * runner.hidden_bytes)
    available = distributed.free_memory_bytes()
    on_disk = more > MEMORY_SHARE * available and not isinstance(samples, list)
    needed += 0 if on_disk else more
    where = f"{needed / 1e9:.2f} GB of memory" + (f" and {more / 1e9:.2f} GB of the disk" if on_disk else "")
    logger.info("Calibration activations take %s.", where)
    if needed > 0.9 * available:
        what = f"{len(samples)} calibration samples" if isinstance(samples, list) else f"{few} calibration tokens"
        lower = "nsamples and e2e_nsamples" if isinstance(samples, list) else "nsamples or seqlen"
        raise ValueError(
            f"The activations of {what} need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; "
            f"lower {lower}."
        )
    return Stream(runner, samples, work.scratch if on_disk else None), Stream(runner, first)
