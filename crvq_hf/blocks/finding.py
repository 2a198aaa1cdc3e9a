"""The decoder blocks of a model: where they are, what reaches them, and running one of them at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the list of the model's decoder blocks.

    They are looked for in the text decoder of a model that has other parts too, and in all of one that reads no text.
    Optimum's patterns know the common architectures; any other model is taken to keep its blocks in the `ModuleList`
    that holds the most weights.

    Raises:
        ValueError: the model is an encoder-decoder, or has no list of blocks.
    """
    from optimum.gptq.utils import get_block_name_with_pattern  # half a second that loading a model can do without

    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model and has two lists of blocks, where one is wanted.")
    lists = _lists(_text_modules(model))
    if not lists:  # it reads no text; convolutions alone are no blocks
        all_lists = _lists(model.named_modules()).items()
        lists = {name: each for name, each in all_lists if any(hasattr(m, "in_features") for m in each.modules())}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    if prefix and any(name.startswith(prefix) for name in lists):
        lists = {name: module for name, module in lists.items() if name.startswith(prefix)}
    else:
        decoder, prefix = model, ""
    try:
        name = prefix + get_block_name_with_pattern(decoder)
    except ValueError:  # an architecture that optimum does not know
        name = ""
    if name not in lists:  # also where optimum took a prefix of some other name for a match
        name, _ = _largest_list(lists)
    if not name:
        raise ValueError(f"{kind} has no list of decoder blocks (an nn.ModuleList), so crvq cannot quantize it.")
    return name, lists[name]


def find_block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Returns the lists of the model's blocks by name, in the order in which they are run.

    That is one list for a decoder or an encoder, and two for an encoder with a decoder.

    Raises:
        ValueError: it has none.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return dict([find_blocks(model)])
    lists = {}
    for part in (model.get_encoder(), model.get_decoder()):
        prefix = next((name for name, module in model.named_modules() if module is part), "")
        name, blocks = _largest_list(dict(_text_modules(part)))  # T5Gemma 2 has a vision tower in its encoder
        if not prefix or not name:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model whose lists of blocks crvq does not find."
            )
        lists[f"{prefix}.{name}"] = blocks
    return lists


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns all blocks of a model by name, in the order in which they are run.

    Raises:
        ValueError: it has none.
    """
    lists = find_block_lists(model)
    return {f"{name}.{index}": block for name, blocks in lists.items() for index, block in enumerate(blocks)}


def _lists(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.ModuleList]:
    """Returns those of some modules, by name, that are lists with something in them."""
    return {name: module for name, module in modules if isinstance(module, nn.ModuleList) and len(module)}


def _largest_list(modules: dict[str, nn.Module]) -> tuple[str, nn.ModuleList | None]:
    """Returns name and module of the `ModuleList` that holds the most weights; an empty name if there is none."""
    lists = _lists(modules.items())
    name = max(lists, key=lambda key: _num_weights(lists[key]), default="")
    return name, lists.get(name)


def _num_weights(blocks: nn.ModuleList) -> int:
    """Returns how many weights blocks have, whether quantized or not: the list found must be the same one later."""
    sizes = {}
    for module in blocks.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            sizes[id(module)] = module.in_features * module.out_features
        else:
            sizes |= {id(parameter): parameter.numel() for parameter in module.parameters(recurse=False)}
    return sum(sizes.values())


def _text_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a model by name, but none of models inside of it that read images or sound."""
    for name, child in model.named_children():
        if hasattr(child, "main_input_name") and child.main_input_name != "input_ids":
            if not any(getattr(part, "main_input_name", None) == "input_ids" for part in child.modules()):
                continue
        yield f"{prefix}{name}", child
        yield from _text_modules(child, f"{prefix}{name}.")


class Done(Exception):
    """Ends a forward pass of which everything of interest has been seen."""


@torch.no_grad()
def linear_stages(block: nn.Module, names: list[str], forward: Callable[[], Any]) -> list[list[list[str]]]:
    """Returns the order in which to quantize the linears of a block: stages of groups of names.

    The linears of a group read the same tensor and share one Hessian (q, k and v; gate and up). A stage holds the
    groups that are quantized before the block is run again: linears of the same kind (their name but for numbers, so
    all experts' `down_proj`) and all that share an input with one of these. Linears that one run does not reach (an
    expert without tokens) join the stage of their kind, each in a group of its own, as do those used more than once.

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
    uses = Counter(name for name, _ in order)
    for name, key in order:
        if not any(name in group for group in groups.values()):
            groups.setdefault(key if uses[name] == 1 else (name,), []).append(name)
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
    block: nn.Module,
    names: list[str],
    see: Callable[[str, Tensor], None],
    forwards: Iterator[Callable[[], Any]],
    repeated: Collection[str] = (),
) -> None:
    """Shows every input of some linears of a block, stopping each run once all of them have been seen.

    Args:
        block: the block.
        names: linears to watch.
        see: called with a linear's name and its input.
        forwards: each runs the block on one batch.
        repeated: names of linears that a run may use more than once; it is not stopped if one of these is watched.
    """
    waiting: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])
            if name not in repeated:
                waiting.discard(name)
            if not waiting:
                raise Done

        return watch

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for forward in forwards:
            waiting.update(names)
            try:
                forward()
            except Done:
                pass
            waiting.clear()
    finally:
        for handle in handles:
            handle.remove()


def survey(
    block: nn.Module, names: list[str], forward: Callable[[], Any]
) -> tuple[list[list[list[str]]], dict[str, float], set[str]]:
    """Returns what one run of a block tells about its linears.

    Args:
        block: the block.
        names: its linears to quantize.
        forward: runs the block on a sequence.

    Returns:
        The stages to quantize them in, see `linear_stages`.
        For each linear that the sequence reaches, the largest sum of squares over a channel of its inputs.
        The names of those that are used more than once.
    """
    energies: dict[str, float] = {}
    repeated: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        energy = float(x.float().flatten(0, -2).square().sum(0).max()) if x.numel() else 0.0
        if name in energies:
            repeated.add(name)
        energies[name] = max(energy, energies.get(name, 0.0))

    stages = linear_stages(block, names, lambda: for_each_input(block, names, see, iter([forward]), names))
    return stages, energies, repeated
