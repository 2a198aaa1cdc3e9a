"""The decoder blocks of a model: where they are, what reaches them, and running one of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the list of the model's decoder blocks.

    Optimum's patterns know the common architectures; any other model is taken to keep its blocks in the `ModuleList`
    that holds the most parameters.

    Raises:
        ValueError: the model is an encoder-decoder, or has no list of blocks.
    """
    from optimum.gptq.utils import get_block_name_with_pattern  # half a second that loading a model can do without

    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder model; crvq quantizes decoder-only models, such as Llama or Qwen."
        )
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    try:
        name = get_block_name_with_pattern(model)
    except ValueError:  # an architecture that optimum does not know
        name = ""
    if name not in lists:  # also where optimum took a prefix of some other name for a match
        name = max(lists, key=lambda key: sum(p.numel() for p in lists[key].parameters()), default="")
    if not name:
        raise ValueError(f"{kind} has no list of decoder blocks (an nn.ModuleList), so crvq cannot quantize it.")
    return name, lists[name]


class _Done(Exception):
    """Ends a forward pass of which everything of interest has been seen."""


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states `[batch, seqlen, hidden_size]` of a block's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def to_device(value: Any, device: torch.device | str) -> Any:
    """Returns `value` with every tensor in it (in tuples, lists and dicts) on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two arguments are equal: tensors and plain values by value, other objects by their class."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (bool, int, float, str)):
        return one == other
    return type(one) is type(other)


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Runs the model with `forwards` in place of those its blocks have."""
    replaced = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward in zip(blocks, replaced, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


class BlockRunner:
    """Runs the blocks of a model one at a time, on hidden states that are kept elsewhere.

    What a model hands to its blocks beside the hidden states (rotary embeddings, masks) depends on the block and on
    the shape of the batch, not on the text, so it is recorded once per shape.

    Attributes:
        blocks: the decoder blocks, in order.
    """

    def __init__(self, model: nn.Module):
        """Args: model: a causal language model in eval mode."""
        self.model = model
        self.blocks = find_blocks(model)[1]
        self._arguments: dict[tuple[int, ...], list[tuple[tuple, dict[str, Any]]]] = {}
        self._returns_tuple: bool | None = None

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Returns what the first block receives, `[batch, seqlen, hidden_size]`, and records the other arguments.

        Args:
            tokens: `[batch, seqlen]`, int64.

        Raises:
            ValueError: the other arguments differ from those for an earlier batch of this shape.
        """
        arguments: list[tuple[tuple, dict[str, Any]]] = [((), {})] * len(self.blocks)
        embedded: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            block_forward = self.blocks[index].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                arguments[index] = (args[1:], kwargs)
                if index == 0:
                    embedded.append(hidden)
                    if self._returns_tuple is None:  # some architectures' blocks return a tuple: ask one of them
                        first = block_forward(hidden, *args[1:], **kwargs)
                        self._returns_tuple = isinstance(first, tuple)
                if index == len(self.blocks) - 1:
                    raise _Done
                return (hidden,) if self._returns_tuple else hidden

            return forward

        with _replaced_forwards(self.blocks, [recorder(i) for i in range(len(self.blocks))]):
            try:
                self.model(input_ids=tokens.to(self.model.device), use_cache=False)
            except _Done:
                pass
        known = self._arguments.setdefault(tuple(tokens.shape), arguments)
        if known is not arguments and not _equal(known, arguments):
            raise ValueError(
                f"The blocks of {type(self.model).__name__} are given something that depends on the text beside the "
                "hidden states, which block-by-block calibration does not support; use dataset=None."
            )
        return embedded[0]

    def run(self, index: int, hidden: Tensor, device: torch.device | str) -> Tensor:
        """Returns the output of block `index`, `[batch, seqlen, hidden_size]`, on `device`.

        Args:
            index: which block; it must be on `device`.
            hidden: `[batch, seqlen, hidden_size]`.
            device: where the block is.
        """
        shape = tuple(hidden.shape[:2])
        if shape not in self._arguments:
            self.embed(torch.zeros(shape, dtype=torch.int64))
        args, kwargs = to_device(self._arguments[shape][index], device)
        return hidden_of(self.blocks[index](hidden.to(device), *args, **kwargs))

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """While inside, autograd keeps the inputs of blocks only, and each is run again when its gradient is due."""
        forwards = [partial(checkpoint, block.forward, use_reentrant=False) for block in self.blocks]
        with _replaced_forwards(self.blocks, forwards):
            yield

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits `[batch, seqlen, vocab_size]` the model makes of its last block's output.

        `embed` must have been called before.

        Args:
            hidden: `[batch, seqlen, hidden_size]`, output of the last block.
        """
        forwards = [
            lambda states, *args, **kwargs: (states,) if self._returns_tuple else states for _ in self.blocks[:-1]
        ] + [lambda *args, **kwargs: (hidden,) if self._returns_tuple else hidden]
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.model.device)
        with _replaced_forwards(self.blocks, forwards):
            return self.model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def linear_stages(block: nn.Module, names: list[str], forward: Callable[[], Any]) -> list[list[list[str]]]:
    """Returns the order in which to quantize the linears of a block: stages of groups of names.

    The linears of a group read the same tensor and share one Hessian (q, k and v; gate and up). A stage holds the
    groups that are quantized before the block is run again: linears of the same kind (their name but for numbers, so
    all experts' `down_proj`) and all that share an input with one of these. Linears that one run does not reach (an
    expert without tokens) join the stage of their kind, each in a group of its own.

    Args:
        block: the block.
        names: its linears to quantize.
        forward: runs the block on some input.
    """
    order: list[tuple[str, tuple]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: order.append((name, (args[0].data_ptr(), args[0].shape, id(args[0]))))

    kept: list[Tensor] = []  # keeps inputs alive, so that no two of them share an address
    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    handles += [block.get_submodule(name).register_forward_pre_hook(lambda m, a: kept.append(a[0])) for name in names]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple, list[str]] = {}
    for name, key in order:
        if not any(name in group for group in groups.values()):
            groups.setdefault(key, []).append(name)
    reached = [group for group in groups.values()] + [[n] for n in names if all(n != seen for seen, _ in order)]
    stages: list[tuple[set[str], list[list[str]]]] = []
    for group in reached:
        kinds = {kind_of(name) for name in group}
        for stage_kinds, stage in stages:
            if stage_kinds & kinds:
                stage_kinds |= kinds
                stage.append(group)
                break
        else:
            stages.append((kinds, [group]))
    return [stage for _, stage in stages]


def kind_of(name: str) -> str:
    """Returns a module name without its numbers: `experts.3.up_proj` is of the kind `experts.up_proj`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@torch.no_grad()
def for_each_input(
    block: nn.Module, names: list[str], see: Callable[[str, Tensor], None], forwards: Iterator[Callable[[], Any]]
) -> None:
    """Shows every input of some linears of a block, stopping each run once all of them have been seen.

    Args:
        block: the block.
        names: linears to watch.
        see: called with a linear's name and its input.
        forwards: each runs the block on one batch.
    """
    waiting: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])
            waiting.discard(name)
            if not waiting:
                raise _Done

        return watch

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for forward in forwards:
            waiting.update(names)
            try:
                forward()
            except _Done:
                pass
            waiting.clear()
    finally:
        for handle in handles:
            handle.remove()


def survey(
    block: nn.Module, names: list[str], forward: Callable[[], Any]
) -> tuple[list[list[list[str]]], dict[str, float]]:
    """Returns what one run of a block tells about its linears.

    Args:
        block: the block.
        names: its linears to quantize.
        forward: runs the block on a sequence.

    Returns:
        The stages to quantize them in, see `linear_stages`.
        For each linear that the sequence reaches, the largest sum of squares over a channel of its inputs.
    """
    energies: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        energies[name] = float(x.float().flatten(0, -2).square().sum(0).max()) if x.numel() else 0.0

    return linear_stages(block, names, lambda: for_each_input(block, names, see, iter([forward]))), energies
