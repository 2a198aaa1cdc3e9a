"""`BlockRunner`: the blocks of a model one at a time, what is between them done by the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .finding import Done
from .trees import copy_containers, hidden_of, map_tensors, mappings_of

Arguments = tuple[tuple, dict[str, Any]]
Inputs = dict[str, Tensor]  # what a model is given, by the names of its forward's arguments


class Gave(NamedTuple):
    """What a block leaves behind for those after it.

    Attributes:
        output: what it returned.
        shared: what it and those before it have put into dicts among their arguments: some leave tensors there for
            later blocks.
    """

    output: Any
    shared: list[dict]


class Leaf(NamedTuple):
    """One of the tensors of what a block gives.

    Attributes:
        dtype: its dtype.
        dim: along which dimension the texts of a batch are; None if it is the same for any number of them.
    """

    dtype: torch.dtype
    dim: int | None


@dataclass(frozen=True)
class State:
    """Some texts, or a sample of something else, on their way through the blocks.

    Attributes:
        inputs: what the model is given for them; of texts that is `input_ids` `[batch, seqlen]`, int64. Empty where
            another process has them.
        gaves: what the last block gave for them, of each list of blocks that they have entered: an encoder's, then its
            decoder's.
    """

    inputs: Inputs
    gaves: tuple[Gave, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if self.inputs else 0

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the last block gave, most often `[batch, seqlen, hidden_size]`."""
        return hidden_of(self.gaves[-1].output)

    def then(self, gave: Gave, number: int = 0) -> State:
        """Returns the state after another block, which is in list `number` and has given `gave`."""
        before = self.gaves[number].shared if number < len(self.gaves) else []
        shared = [old | new for old, new in zip_longest(before, gave.shared, fillvalue={})]
        return State(self.inputs, (*self.gaves[:number], Gave(gave.output, shared)))

    def part(self, start: int, stop: int, leaves: Sequence[Leaf]) -> State:
        """Returns the state of some of the texts, views.

        Args:
            start: the first.
            stop: after the last.
            leaves: of what the last blocks gave.
        """
        dims = iter(leaves)

        def cut(tensor: Tensor) -> Tensor:
            dim = next(dims).dim
            if dim is None:
                return tensor
            each = tensor.shape[dim] // len(self)
            return tensor.narrow(dim, start * each, (stop - start) * each)

        inputs = {name: tensor[start:stop] for name, tensor in self.inputs.items()}
        return State(inputs, map_tensors(self.gaves, cut))


def placed(inputs: Inputs, beside: Tensor) -> Inputs:
    """Returns inputs on the device of a parameter of the model, numbers in its dtype."""
    dtype = beside.dtype if beside.is_floating_point() else torch.float32
    return {
        name: tensor.to(beside.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def run_on(model: nn.Module, inputs: Inputs) -> Any:
    """Returns the output of a model without a cache.

    Of text, which is `input_ids` alone, a decoder reads the same as its encoder.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    if inputs.keys() == {"input_ids"} and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        options["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs, **options)


@contextmanager
def replaced_forwards(blocks: nn.ModuleList, forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Runs the model with `forwards` in place of those that its blocks of these numbers have."""
    replaced = {index: blocks[index].__dict__.get("forward") for index in forwards}
    try:
        for index, forward in forwards.items():
            blocks[index].forward = forward
        yield
    finally:
        for index, forward in replaced.items():
            blocks[index].__dict__.pop("forward", None)
            if forward is not None:
                blocks[index].forward = forward


def _shared(args: tuple, kwargs: dict[str, Any]) -> list[MutableMapping]:
    """Returns the dicts that a block is given."""
    return list(mappings_of((args, tuple(kwargs.values()))))


class BlockRunner:
    """Runs the blocks of a model one at a time, on what is kept elsewhere of the blocks before.

    What a block is given (hidden states, rotary embeddings, masks, inputs for this block alone) is what the model
    itself makes of its inputs and of what the last block gave: the model is run up to the block, and in place of those
    before it stands a function that returns at once what the last of them gave.

    Attributes:
        model: what is run: the model, or where it reads text the language model inside of it.
        blocks: of all lists.
        lists: of each block, the number of its list.
        order: numbers of those that the inputs reach, in the order in which they are run.
        keeps_all: whether all tensors that a block returns are handed on, or the hidden states alone, None in place of
            the others (attention weights, say).
        leaves: of a state's `gaves` after each of these, by its number.
        hidden_bytes: of the hidden states that a block gives, per element of its inputs (of text: per token).
        other_bytes: of all else that a block gives, per element, at most.
        positions: hidden states of the last block, per element.
        has_head: whether the model makes logits over its vocabulary.
        has_gradients: whether autograd can follow what all blocks compute.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, lists: Sequence[int], order: Sequence[int], keeps_all: bool
    ):
        """`rehearse` makes one and finds the attributes that are not given here."""
        self.model, self.blocks, self.lists, self.order = model, blocks, tuple(lists), tuple(order)
        self.keeps_all = keeps_all
        inside = {id(parameter) for parameter in blocks.parameters()}  # which move to other devices meanwhile
        self._outside = next((p for p in model.parameters() if id(p) not in inside), next(model.parameters()))
        self.leaves: dict[int, list[Leaf]] = {}
        self.hidden_bytes = self.other_bytes = self.positions = 0.0
        self.has_head = False
        self.has_gradients = True

    def arguments(self, index: int, state: State) -> Arguments:
        """Returns what block `index` is given, on the model's device, in the model's dtype.

        Args:
            index: which block.
            state: of the texts, as the block before it has left them.
        """
        (given,) = self._replay(state, self.order[: self.order.index(index)], index)
        return given

    def call(self, index: int, arguments: Arguments) -> Gave:
        """Runs a block; returns what it gave: its output, and what it has put into dicts among its arguments.

        Args:
            index: which block.
            arguments: on its device; new dicts and lists of the same tensors are handed to the block.
        """
        args, kwargs = copy_containers(arguments)
        shared = _shared(args, kwargs)
        before = [dict(mapping) for mapping in shared]
        output = self.blocks[index](*args, **kwargs)
        if not self.keeps_all:
            hidden = hidden_of(output)
            output = map_tensors(output, lambda tensor: tensor if tensor is hidden else None)
        return Gave(
            output,
            [
                {key: value for key, value in after.items() if key not in own or own[key] is not value}
                for own, after in zip(before, shared, strict=True)
            ],
        )

    def output(self, state: State) -> Any:
        """Returns what the model makes of its last block's output.

        Args:
            state: of the texts, after the last block.
        """
        return self._replay(state, self.order, None)

    def logits(self, state: State) -> Tensor:
        """Returns the logits `[batch, seqlen, vocab_size]` the model makes of its last block's output."""
        return self.output(state).logits

    @torch.no_grad()
    def _replay(self, state: State, earlier: Sequence[int], index: int | None) -> Any:
        """Runs the model, its `earlier` blocks giving at once what is in `state`.

        Returns:
            The output of the model; if `index` is a block, its arguments, in a list.
        """
        stopped: list[Arguments] = []
        home = self._outside.device
        gaves = map_tensors(state.gaves, lambda tensor: tensor.to(home))

        def give(gave: Gave, *args: Any, **kwargs: Any) -> Any:
            for own, left in zip(_shared(args, kwargs), gave.shared, strict=False):
                own.update(copy_containers(left))
            return copy_containers(gave.output)

        def stop(*args: Any, **kwargs: Any) -> Any:
            stopped.append((args, kwargs))
            raise Done

        forwards = {i: partial(give, gaves[self.lists[i]]) for i in earlier} | ({} if index is None else {index: stop})
        with replaced_forwards(self.blocks, forwards):
            try:
                return run_on(self.model, placed(state.inputs, self._outside))
            except Done:
                return stopped

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """While inside, autograd keeps the inputs of blocks only, and each is run again when its gradient is due."""
        forwards = {i: partial(checkpoint, block.forward, use_reentrant=False) for i, block in enumerate(self.blocks)}
        with replaced_forwards(self.blocks, forwards):
            yield
