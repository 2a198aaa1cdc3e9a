"""The sizes of a model, from its shapes alone: which layers of a block are quantized when, and what else there is."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..blocks.finding import kind_of, linear_stages, named_blocks
from ..blocks.runner import run_on
from ..config import CRVQConfig
from ..modeling.embedding import find_embeddings
from ..modeling.experts import UnfusedExperts, find_fused_experts
from ..modeling.replace import linear_size, quantizable_linears
from ..modeling.table import stored_bytes
from ..naming import is_named_by
from ..quantized_weight import LayerShape
from ..selection.budget import spend
from ..selection.size import within_size

logger = logging.getLogger("crvq")

# Stages of groups of layers: those of a group read the same tensor and share a Hessian.
Stages = tuple[tuple[tuple[LayerShape, ...], ...], ...]


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block.

    Attributes:
        stages: of the layers that are quantized, in the order in which they are.
        others: how many numbers are in all other parameters.
    """

    stages: Stages
    others: int

    @property
    def layers(self) -> list[LayerShape]:
        """All layers that are quantized."""
        return [layer for stage in self.stages for group in stage for layer in group]

    @property
    def weights(self) -> int:
        """How many weights these have."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that they take when they are quantized."""
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        name: class of the model.
        blocks: of each block.
        outside: how many numbers are in parameters outside of the blocks.
        itemsize: bytes of each number in the dense model.
        hidden: channels between blocks.
        vocabulary: tokens that it has logits for, 0 where it has no head.
        stored_outside: bytes of what is outside of the blocks, embedding and head as they will be stored.
    """

    name: str
    blocks: tuple[BlockSizes, ...]
    outside: int
    itemsize: int
    hidden: int
    vocabulary: int
    stored_outside: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense model."""
        return self.itemsize * (self.outside + sum(block.weights + block.others for block in self.blocks))

    @property
    def largest(self) -> BlockSizes:
        """The block with the most weights."""
        return max(self.blocks, key=lambda block: block.weights + block.others)


def sizes_of(model: PreTrainedModel, config: CRVQConfig) -> ModelSizes:
    """Returns the sizes of a model on the meta device; its experts are taken apart in place.

    What only running it with numbers shows is not known: layers whose weight other code reads count as quantized, and
    experts in parameters of unusual kinds as dense.

    Args:
        model: on the meta device.
        config: how to quantize, its budget spent or not.
    """
    for name, experts in find_fused_experts(model)[0].items():
        if not is_named_by(name, config.modules_to_not_convert or []):
            model.set_submodule(name, UnfusedExperts(experts))
    linears, _ = quantizable_linears(model, config)
    if config.fit is None:
        config, costly = spend(config, {name: linear_size(module) for name, module in linears.items()})
    else:
        config, costly = within_size(model, config, linears, lambda bits: find_embeddings(model, bits))
    linears, _ = quantizable_linears(model, config)
    shapes = {
        name: config.of_layer(name).layer_shape(*linear_size(module))
        for name, module in linears.items()
        if name not in costly
    }
    blocks, inside = [], set()
    for path, block in named_blocks(model).items():
        own = {name.removeprefix(f"{path}."): shape for name, shape in shapes.items() if name.startswith(f"{path}.")}
        parameters = {id(p): p.numel() for p in block.parameters()}
        inside |= parameters.keys()
        weights = sum(shape.in_features * shape.out_features for shape in own.values())
        blocks.append(BlockSizes(_stages(model, block, own, blocks), sum(parameters.values()) - weights))
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    outside = {id(p): p for p in model.parameters() if id(p) not in inside}
    tables = {id(part.weight): part.weight for part in find_embeddings(model, config.embedding_bits).values()}
    stored = sum(stored_bytes(*weight.shape, config.embedding_bits) for weight in tables.values())
    return ModelSizes(
        name=type(model).__name__,
        blocks=tuple(blocks),
        outside=sum(p.numel() for p in outside.values()),
        itemsize=model.dtype.itemsize,
        hidden=getattr(text, "hidden_size", 0) or max(shape.in_features for shape in shapes.values()),
        vocabulary=0 if head is None else getattr(head, "out_features", 0),
        stored_outside=stored + sum(p.nbytes for key, p in outside.items() if key not in tables),
    )


def _stages(model: nn.Module, block: nn.Module, shapes: dict[str, LayerShape], earlier: list[BlockSizes]) -> Stages:
    """Returns the stages of a block, found by running the model without numbers; else by the names of its layers."""
    for other in earlier:  # most blocks are like one before
        if sorted(map(repr, shapes.values())) == sorted(map(repr, other.layers)):
            return other.stages
    try:
        tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
        stages = linear_stages(block, [*shapes], lambda: run_on(model, {"input_ids": tokens}))
    except Exception as error:  # whatever a model raises that has no numbers: to choose experts, say
        logger.debug("The stages of %s are taken from names: %s", type(block).__name__, error)
        stages = _stages_by_name(shapes)
    return tuple(tuple(tuple(shapes[name] for name in group) for group in stage) for stage in stages)


def _stages_by_name(shapes: dict[str, LayerShape]) -> list[list[list[str]]]:
    """Returns the stages of layers of which nothing is known: those beside each other of one width share an input."""
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for name, shape in shapes.items():
        parent, _, own = name.rpartition(".")
        is_last = own in ("o_proj", "out_proj", "wo", "w2", "down_proj", "c_proj", "dense")
        groups.setdefault((parent, shape.in_features, is_last), []).append(name)
    stages: dict[tuple[str, bool], list[list[str]]] = {}
    for (parent, _, is_last), names in groups.items():
        stages.setdefault((kind_of(parent), is_last), []).append(names)
    return [*stages.values()]
