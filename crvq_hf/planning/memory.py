"""What each phase of a run holds in memory at its most, added up from sizes.

Bytes per weight and per entry of a Hessian are those of the code that is named beside each; `python -m benchmarks
plan` compares the sums with what a run has held.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..algorithm.tables import SAMPLED_ROWS
from ..modeling.table import GROUP
from ..quantized_weight import LayerShape
from .sizes import BlockSizes, ModelSizes

_FLOAT, _DOUBLE, _INT = 4, 8, 4
# Of `fit_weight`, beyond the weight and the Hessian that it is given: bytes per weight while it searches (the weight
# in order, its vectors, target, quantized, gradient, and what a step of the codebooks makes), and per entry of the
# Hessian while that is put in order. Measured on layers of 128 to 8192 outputs.
_SEARCH, _CODES_SEARCHED, _ORDERED = 31, 32, 12
_ADAM = 2 * _FLOAT  # moments
_ALIVE = 0.7  # of what goes in and out of all layers of a block, while it is run without gradients
_LOGITS = 5  # of student and teacher, two gradients, and one in another dtype


@dataclass(frozen=True)
class Work:
    """How much a run is to do.

    Attributes:
        first: tokens that layers are fitted and blocks tuned on.
        all: tokens of the full-precision stream, those of end-to-end fine-tuning too.
        batch: tokens that go through a block at once.
        step: tokens of a step of fine-tuning.
        tunes_blocks: whether blocks are tuned.
        tunes_end_to_end: whether the model is tuned at the end.
        bfloat16: whether products are in bfloat16.
        codes_embeddings: whether embedding and head are put in codes.
    """

    first: int
    all: int
    batch: int
    step: int
    tunes_blocks: bool
    tunes_end_to_end: bool
    bfloat16: bool
    codes_embeddings: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of what products are made of."""
        return 2 if self.bfloat16 else _FLOAT


def _weights(layers: list[LayerShape]) -> int:
    return sum(layer.in_features * layer.out_features for layer in layers)


def _size(layer: LayerShape) -> int:
    return layer.in_features * layer.out_features


def _activations(block: BlockSizes, tokens: int) -> int:
    """Returns bytes of what goes into the layers of a block and comes out of them."""
    return _FLOAT * tokens * sum(layer.in_features + layer.out_features for layer in block.layers)


def running_bytes(block: BlockSizes, work: Work) -> int:
    """Returns what a dense block takes while it is run on a batch, in fp32, its bfloat16 copies counted."""
    copies = 2 * max(map(_size, block.layers), default=0) if work.bfloat16 else 0
    return _FLOAT * (block.weights + block.others) + copies + round(_ALIVE * _activations(block, work.batch))


def hessian_bytes(block: BlockSizes, work: Work) -> int:
    """Returns what the stage with the largest Hessians takes while they are summed (`HessianAccumulator`)."""
    return max((_stage_hessians(stage) for stage in block.stages), default=0) + running_bytes(block, work)


def _stage_hessians(stage: tuple[tuple[LayerShape, ...], ...]) -> int:
    return sum(_DOUBLE * group[0].in_features ** 2 for group in stage)


def fitting_bytes(block: BlockSizes, work: Work) -> int:
    """Returns what the most expensive layer takes while it is fitted, its block beside it (`fit_weight`)."""
    most, dense = 0, _FLOAT * (block.weights + block.others)
    for stage in block.stages:
        waiting = _stage_hessians(stage) if work.first else 0
        for group in stage:
            k = group[0].in_features
            waiting -= _DOUBLE * k * k if work.first else 0
            for layer in group:
                size, per_code = _size(layer), _SEARCH + _CODES_SEARCHED / layer.in_group_size
                fit = max(per_code * size + _FLOAT * k * k, _FLOAT * size + _ORDERED * k * k)
                most = max(most, dense + waiting + _FLOAT * k * k + round(fit))
                dense -= _FLOAT * size - layer.nbytes
    return most


def tuning_bytes(block: BlockSizes, work: Work) -> int:
    """Returns what the most expensive tuning of a block takes: that after the first stage, or that at the end."""
    most, layers = 0, block.layers
    for number in range(1, len(block.stages) + 1):
        done = [layer for stage in block.stages[:number] for group in stage for layer in group]
        left = layers[len(done) :]
        # Weight, gradient and moments of what is still dense, and what Adam makes of one of them.
        dense = (2 * _FLOAT + _ADAM) * _weights(left) + 2 * _FLOAT * max(map(_size, left), default=0)
        copies = work.itemsize * _weights(left) if work.bfloat16 else 0
        quantized = sum(map(_tunable_bytes, done)) + work.itemsize * _weights(done)
        gradient = (_FLOAT + work.itemsize) * max(map(_size, done))
        # Gradients of dense weights come after a backward has used up what was kept.
        most = max(most, dense + copies + quantized + (0 if left else gradient))
    return most + _FLOAT * block.others + 2 * _activations(block, work.step)


def _tunable_bytes(layer: LayerShape) -> int:
    """Returns what a layer takes in training, its codes and the groups that each codeword serves (`TunableLinear`)."""
    return layer.nbytes + 2 * _INT * layer.out_features * layer.num_virtual_groups


def kept_bytes(block: BlockSizes, work: Work) -> int:
    """Returns what the backward of a whole step needs of a block: its weights made of codes, and activations."""
    return work.itemsize * block.weights + 2 * _activations(block, work.step)


def end_to_end_bytes(model: ModelSizes, work: Work, free: int, share: float) -> int:
    """Returns what end-to-end fine-tuning takes (`finetune_end_to_end_`), the whole model on the device.

    Args:
        model: its sizes.
        work: how much to do.
        free: bytes that the device has.
        share: of them that may be kept for the backward; beyond it blocks are run twice.
    """
    numbers = _FLOAT * (model.outside + sum(block.others for block in model.blocks))
    codes = sum(_tunable_bytes(layer) for block in model.blocks for layer in block.layers)
    head = work.itemsize * model.hidden * model.vocabulary if work.bfloat16 else 0
    logits = _LOGITS * _FLOAT * work.step * model.vocabulary
    gradient = (_FLOAT + work.itemsize) * max(map(_size, model.largest.layers))
    kept = sum(kept_bytes(block, work) for block in model.blocks)
    if kept > share * free:
        kept = kept_bytes(model.largest, work) + _FLOAT * work.step * model.hidden * len(model.blocks)
    table = _tunable_table_bytes(model, work) if work.codes_embeddings else 0
    return numbers + codes + head + logits + gradient + kept + table


def table_bytes(model: ModelSizes) -> int:
    """Returns what putting an embedding in codes takes (`fit_table`): it and what is left of it, and a search in some
    of its rows, or all rows made dense again."""
    size = model.hidden * model.vocabulary
    per_weight = _SEARCH + _CODES_SEARCHED / GROUP
    return 2 * _FLOAT * size + max(
        _FLOAT * size, round(per_weight * model.hidden * min(model.vocabulary, SAMPLED_ROWS))
    )


def _tunable_table_bytes(model: ModelSizes, work: Work) -> int:
    """Returns what an embedding of codes takes in training (`TunableTable`): most rows have a code a group."""
    size = model.hidden * model.vocabulary
    return size * (2 * _INT // GROUP + 2 * work.itemsize + _FLOAT)


def stream_bytes(model: ModelSizes, work: Work) -> tuple[int, int]:
    """Returns bytes of the hidden states of the quantized stream and of the full-precision one (`Stream`)."""
    each = model.hidden * model.itemsize
    return each * work.first, each * work.all


def finished_bytes(model: ModelSizes) -> int:
    """Returns what the quantized model takes: codes, and all else in the model's dtype."""
    others = sum(block.others for block in model.blocks)
    return sum(block.nbytes for block in model.blocks) + model.itemsize * others + model.stored_outside
