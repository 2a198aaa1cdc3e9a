"""A size of the whole checkpoint instead of knobs: how it is divided between linear layers and embeddings.

Both lose less with more bits; what they lose is estimated by curves through points measured on one model. Of the bits
that embeddings can have, those are chosen with which the sum of both is least, linear layers taking all that is left.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.planned import LINEARS, Beside, PlannedCheckpoint
from ..config import EMBEDDING_BITS, CRVQConfig
from ..modeling.replace import linear_size
from .budget import MOST_BITS, fewest_bits, most_within_budget, spend

logger = logging.getLogger("crvq")

# How many times the dense model's perplexity SmolLM2-135M-Instruct has on WikiText-2, by stored bits of its linear
# layers (benchmarks/results/quality.csv: the default preset; at 1.14 bits the median of three seeds; 20.1 dense), and
# by bits of its embeddings where its blocks are dense (benchmarks/results/embeddings.csv).
_OF_LINEARS = ((1.141, 115.34 / 20.1), (1.993, 43.61 / 20.1), (2.998, 29.17 / 20.1))
_OF_EMBEDDINGS = ((2.0, 1.298), (2.5, 1.14), (3.0, 1.096), (3.5, 1.053), (4.0, 1.044), (8.0, 1.001))
_STEP, _MOST, _HALVINGS = 0.5, 8.0, 9  # bits per weight of linear layers that are tried, and how finely in between


@dataclass(frozen=True)
class Plan:
    """A way to store a model.

    Attributes:
        config: without a budget.
        dense: names of layers that stay dense, because they would take too many bits.
        parts: bytes by part of the checkpoint.
        weights: how many weights the quantized layers have.
    """

    config: CRVQConfig
    dense: set[str]
    parts: dict[str, int]
    weights: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole checkpoint."""
        return sum(self.parts.values())

    @property
    def bits(self) -> float:
        """Stored bits per weight of the quantized layers."""
        return 8 * self.parts[LINEARS] / self.weights

    @property
    def loss(self) -> float:
        """The logarithm of how many times the dense model's perplexity is expected."""
        of_embeddings = 0.0 if self.config.embedding_bits == 16 else _loss(_OF_EMBEDDINGS, self.config.embedding_bits)
        return _loss(_OF_LINEARS, self.bits) + of_embeddings


def within_size(
    model: PreTrainedModel,
    config: CRVQConfig,
    linears: Mapping[str, nn.Module],
    tables: Callable[[float], Collection[str]],
    beside: Beside | None = None,
) -> tuple[CRVQConfig, set[str]]:
    """Returns how to quantize a model so that its whole checkpoint has at most `config.fit` bytes; says what it plans.

    Args:
        model: dense, its experts unfused.
        config: its `fit` is spent.
        linears: layers to quantize, by name, at least one.
        tables: names of the embedding and the head that can be stored in so many bits.
        beside: bytes of other files of the checkpoint by what they are, given the names of the quantized layers.

    Returns:
        The config without a budget, and the names of layers that stay dense: they would take too many bits.

    Raises:
        ValueError: the model cannot be so small, or is no larger as it is.
    """
    search = _Search(config, PlannedCheckpoint(model, tables, beside), linears)
    choices = [bits for bits in EMBEDDING_BITS if bits == 16 or search.planned.tables(bits)]
    least = min((search.plan(search.fewest, bits) for bits in choices), key=lambda plan: plan.nbytes)
    most, dense_bytes = search.most(max(choices), math.inf), search.planned.dense_bytes(config)
    allowed = f"quantized it takes {_mb(least.nbytes)} to {_mb(most.nbytes)}, all files counted"
    if config.fit < least.nbytes:
        raise ValueError(f"fit={_mb(config.fit)} is too little for {type(model).__name__}: {allowed}; give more.")
    if config.fit >= dense_bytes:
        raise ValueError(
            f"fit={_mb(config.fit)} holds {type(model).__name__} as it is, in {_mb(dense_bytes)}; {allowed}; give "
            "less."
        )
    plans = [plan for bits in choices if (plan := search.most(bits, config.fit))]
    best = min(plans, key=lambda plan: (plan.loss, -plan.nbytes))
    _tell(config.fit, best, search.planned)
    return best.config, best.dense


class _Search:
    """Plans of one model.

    Args:
        config: with `fit`.
        planned: the checkpoint that is to be.
        linears: layers to quantize, by name.
    """

    def __init__(self, config: CRVQConfig, planned: PlannedCheckpoint, linears: Mapping[str, nn.Module]) -> None:
        self.config, self.planned, self.linears = config, planned, linears
        self.sizes = {name: linear_size(module) for name, module in linears.items()}
        self.fewest = fewest_bits(config, self.sizes)
        self._spent: dict[float, tuple[CRVQConfig | None, set[str]]] = {}

    def plan(self, bits: float, embedding_bits: float) -> Plan | None:
        """Returns the plan with at most so many bits per weight of linear layers; None if they cannot be met."""
        if bits not in self._spent:
            wanted = copy.copy(self.config)
            wanted.fit, wanted.bits = None, bits
            self._spent[bits] = spend(wanted, self.sizes, most_within_budget, max(MOST_BITS, 2 * bits))
        spent, dense = self._spent[bits]
        if spent is None:
            return None
        config = copy.copy(spent)
        config.embedding_bits = embedding_bits
        linears = {name: module for name, module in self.linears.items() if name not in dense}
        fitting = [size for name in linears if config.fits(name, (size := self.sizes[name])[0])]
        return Plan(config, dense, self.planned.parts(config, linears), sum(map(math.prod, fitting)))

    def most(self, embedding_bits: float, nbytes: float) -> Plan | None:
        """Returns the plan with the most bits of linear layers whose checkpoint has at most `nbytes`, None if none."""
        steps = (_STEP * i for i in range(1, round(_MOST / _STEP) + 1))
        above = best = None
        for low in sorted({self.fewest, *(bits for bits in steps if bits > self.fewest)}, reverse=True):
            best = self._within(low, embedding_bits, nbytes)
            if best is not None:
                break
            above = low
        for _ in range(_HALVINGS if best is not None and above is not None else 0):
            middle = (low + above) / 2
            found = self._within(middle, embedding_bits, nbytes)
            best, low, above = (best, low, middle) if found is None else (found, middle, above)
        return best

    def _within(self, bits: float, embedding_bits: float, nbytes: float) -> Plan | None:
        plan = self.plan(bits, embedding_bits)
        return plan if plan is not None and plan.nbytes <= nbytes else None


def _loss(points: Sequence[tuple[float, float]], bits: float) -> float:
    """Returns what so many bits add to the logarithm of the perplexity.

    Between the measured points, and beyond them, its logarithm is a straight line.
    """
    logs = [(x, math.log(math.log(times))) for x, times in points]
    (x, y), (other_x, other_y) = next((pair for pair in pairwise(logs) if bits <= pair[1][0]), logs[-2:])
    return math.exp(y + (bits - x) * (other_y - y) / (other_x - x))


def _tell(fit: int, plan: Plan, planned: PlannedCheckpoint) -> None:
    """Logs what a checkpoint will consist of."""
    logger.info("Planned for fit=%s: %s (%.1f %%).", _mb(fit), _mb(plan.nbytes), 100 * plan.nbytes / fit)
    stored = f"{plan.config.embedding_bits:g} bits per weight"
    bits = dict.fromkeys(planned.tables(plan.config.embedding_bits), stored)
    bits[LINEARS] = f"{plan.bits:.3f} bits per weight"
    for part, nbytes in plan.parts.items():
        logger.info("  %-27s %14s  %s", part, _mb(nbytes), bits.get(part, ""))
    logger.info(
        "Expected perplexity: %.2f times the dense model's, by a curve of SmolLM2-135M with the default preset.",
        math.exp(plan.loss),
    )


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.{3 if nbytes < 1e7 else 1}f} MB"
