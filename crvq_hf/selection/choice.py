"""What of a model is quantized: what its config says, less what has to stay dense; and saying what stays dense."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ..blocks.finding import kind_of, named_blocks
from ..blocks.runner import Inputs
from ..config import CRVQConfig
from ..modeling.embedding import find_embeddings
from ..modeling.replace import linear_size, quantizable_linears
from .budget import within_budget
from .trial import try_out

logger = logging.getLogger("crvq")

MOST_BITS = 4  # stored bits per weight; what would take more saves next to nothing
WORTH_SAYING = 0.02  # of the weights of a block


def choose_layers(
    model: PreTrainedModel, config: CRVQConfig, sample: Inputs | None = None
) -> tuple[CRVQConfig, set[str]]:
    """Returns how to quantize a model, with all that has to stay dense, and says what that is.

    Dense stay layers whose weight other code reads or whose outputs choose experts, both found by running the model on
    a few tokens, and layers that would take more than `MOST_BITS`.

    Args:
        model: dense, its experts unfused.
        config: how to quantize; a budget in it is spent on the layers that are left.

    Returns:
        A config without a budget, whose `modules_to_not_convert` also names the layers found.
        Names of the embeddings and heads that cannot be stored in 8 bits, because other code reads their numbers.

    Raises:
        ValueError: there is no layer to quantize, or the budget `bits` cannot be met.
    """
    linears, reasons = quantizable_linears(model, config)
    rows = find_embeddings(model) if config.embedding_bits == 8 else {}
    found = try_out(model, linears, rows, sample)
    if found.failure:
        logger.warning(
            "%s could not be run on a few tokens (%s); whose weights other code reads was looked up in its code.",
            type(model).__name__,
            found.failure,
        )
    dense = {name: "other code reads its weight" for name in found.read if name in linears}
    dense |= {name: "it chooses experts" for name in [*found.routing, *_named_routers(linears)]}
    linears = {name: module for name, module in linears.items() if name not in dense}
    spent = within_budget(config, map(linear_size, linears.values()))
    costly = costly_layers(linears, spent)
    if costly:
        dense |= {name: f"codes would take more than {MOST_BITS} bits per weight" for name in costly}
        linears = {name: module for name, module in linears.items() if name not in costly}
        spent = within_budget(config, map(linear_size, linears.values()))
    if not linears:
        raise ValueError(_nothing_to_quantize(model, reasons | dense))
    if dense:
        spent = copy.copy(spent)
        spent.modules_to_not_convert = [*(config.modules_to_not_convert or []), *sorted(dense)]
    _say(model, linears, reasons | dense)
    for name in found.read & rows.keys():
        logger.warning("%s stays as it is: other code reads its numbers.", name)
    return spent, found.read & rows.keys()


def _nothing_to_quantize(model: nn.Module, skipped: dict[str, str]) -> str:
    """Returns a sentence on why no layer can be quantized.

    Args:
        model: has the layers.
        skipped: why each is left dense, by name.
    """
    counts = Counter(skipped.values())
    examples = {why: name for name, why in reversed(skipped.items())}
    told = "; ".join(f"{counts[why]} such as {examples[why]}, because {why}" for why, _ in counts.most_common(3))
    if not told:
        return f"{type(model).__name__} has no layer to quantize; its blocks have no linear layers."
    check = "check modules_to_not_convert: " if any("modules_to_not_convert" in why for why in counts) else ""
    return (
        f"{type(model).__name__} has no layer to quantize; {check}its linear layers stay dense, {told}. "
        "Codes are for groups of in_group_size (4, 8 or 16) input channels."
    )


def dense_share(model: nn.Module, quantized: Iterable[nn.Module]) -> float:
    """Returns the share of the weights of the decoder blocks that are in none of the `quantized` layers.

    Weights are parameters of two or more dimensions; before quantizing, `quantized` are the layers that will be.
    """
    inside = sum(math.prod(linear_size(layer)) for layer in quantized)
    modules = {id(layer) for layer in quantized}
    outside = {
        id(parameter): parameter.numel()
        for block in named_blocks(model).values()
        for module in block.modules()
        if id(module) not in modules
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    }
    return sum(outside.values()) / max(1, inside + sum(outside.values()))


def _named_routers(names: Iterable[str]) -> list[str]:
    """Returns the layers in what is called a router: only the outputs of its last one reach a choice."""
    return [name for name in names if any("router" in part for part in name.split("."))]


def costly_layers(linears: dict[str, nn.Module], config: CRVQConfig) -> set[str]:
    """Returns the layers that would take more than `MOST_BITS`.

    In a toy all layers do, because of their codebooks. Where more than a few do, codebooks are not counted.
    """
    sizes = {name: linear_size(module) for name, module in linears.items()}
    sizes = {name: size for name, size in sizes.items() if size[0] % config.in_group_size == 0}
    shapes = {name: config.layer_shape(*size) for name, size in sizes.items()}
    weights = {name: math.prod(size) for name, size in sizes.items()}
    costly = {name for name, shape in shapes.items() if 8 * shape.nbytes > MOST_BITS * weights[name]}
    if sum(weights[name] for name in costly) <= WORTH_SAYING * sum(weights.values()):
        return costly
    codebooks = {name: shape.num_codebooks * shape.codebook_size for name, shape in shapes.items()}
    bits = {name: codebooks[name] * shape.in_group_size * shape.codebook_bits for name, shape in shapes.items()}
    return {name for name in costly if 8 * shapes[name].nbytes - bits[name] > MOST_BITS * weights[name]}


def _say(model: nn.Module, linears: dict[str, nn.Module], reasons: dict[str, str]) -> None:
    """Logs what stays dense in the blocks, a line for each kind of layer or parameter, with its share of a block."""
    quantized = {id(module) for module in linears.values()}
    kinds: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    sizes: dict[int, int] = defaultdict(int)
    for index, (path, block) in enumerate(named_blocks(model).items()):
        for name, module in block.named_modules(prefix=path):
            reason = reasons.get(name, "")
            for key, parameter in module.named_parameters(recurse=False):
                sizes[index] += parameter.numel() if parameter.dim() > 1 else 0
                if parameter.dim() > 1 and id(module) not in quantized:
                    whose = reason or f"crvq does not know the parameters of {type(module).__name__}"
                    kind = kind_of(name if reason else f"{name}.{key}").removeprefix(f"{kind_of(path)}.")
                    kinds[kind, whose][index] += parameter.numel()
    for (kind, reason), counts in kinds.items():
        share = max(count / sizes[index] for index, count in counts.items())
        if share > WORTH_SAYING or not reason.startswith("crvq does not know"):
            logger.warning(
                "%s of %d block(s) stays dense, %.1f %% of the weights of a block: %s.",
                kind,
                len(counts),
                100 * share,
                reason,
            )
