"""A bit budget instead of knobs: which codebooks and how many critical channels spend it best."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from ..config import BUDGETED, CRVQConfig

_TOLERANCE = 0.01  # of the budget
# Channels and bits of a base code, from many bits per weight to few. Groups of 4 are better where they can have 6 bits
# (benchmarks/LOG.md); codes of more than 8 are slow to look up.
_BASE_CODES = ((4, 8), (4, 7), (4, 6), (8, 8), (8, 7), (8, 6), (8, 5), (8, 4))


def within_budget(config: CRVQConfig, sizes: Iterable[tuple[int, int]]) -> CRVQConfig:
    """Returns a config whose stored bits per weight are at most its `bits`, and at most 1 % less.

    The base codes are the finest that the budget allows. What is left goes into as few extended codebooks as can spend
    it, for as many critical channels as that makes: at equal bits, one extended codebook for 4 % of the channels beats
    three for 2 % (benchmarks/LOG.md).

    Args:
        config: returned as it is if its `bits` is None or there are no layers; else the fields in `BUDGETED` are
            chosen.
        sizes: in_features and out_features of every layer that a code of some size fits. Those that the chosen
            channels per code do not divide stay dense and do not count.

    Raises:
        ValueError: these layers cannot be stored in so few, or so many, bits.
    """
    all_counts = Counter(sizes)
    if config.bits is None or not all_counts:
        return config
    lowest = math.inf
    for d, nbits in _BASE_CODES:
        counts = Counter({size: count for size, count in all_counts.items() if size[0] % d == 0})
        if not counts:
            continue
        plain = _stored_bits(_with(config, d, nbits, 0, 0.0), counts)
        lowest = min(lowest, plain)
        if plain > config.bits:
            continue
        candidates = [_with(config, d, nbits, 0, 0.0)]
        for extended in range(max(1, math.ceil((config.bits - plain) * d / nbits)), 8):
            candidates += [_largest(config, d, nbits, extended, counts)]
            best = max((c for c in candidates if c), key=lambda c: _stored_bits(c, counts))
            if _stored_bits(best, counts) >= (1 - _TOLERANCE) * config.bits:
                return best
    raise ValueError(
        f"bits={config.bits:g} cannot be met within 1 % by these layers, whose least is {lowest:.3f} bits per weight; "
        f"give other bits, or set {', '.join(BUDGETED)} yourself."
    )


def _largest(config: CRVQConfig, d: int, nbits: int, extended: int, counts: Counter) -> CRVQConfig | None:
    """Returns the config with the most critical channels within the budget; None if one group is too much."""
    ratios = sorted(_ratios(counts, d))
    low, high = 0, len(ratios)  # the first `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if _stored_bits(_with(config, d, nbits, extended, ratios[middle]), counts) <= config.bits:
            low = middle + 1
        else:
            high = middle
    return _with(config, d, nbits, extended, ratios[low - 1]) if low else None


def _ratios(counts: Counter, d: int) -> set[float]:
    """Returns the critical ratios at which some layer gets one more critical group, rounded up to six digits."""

    def of(in_features: int) -> Iterator[float]:
        groups = in_features // d
        yield from (min(1.0, math.ceil(1e6 * group / groups) / 1e6) for group in range(1, groups + 1))

    return {ratio for in_features in {k for k, _ in counts} for ratio in of(in_features)}


def _with(config: CRVQConfig, *values: float) -> CRVQConfig:
    """Returns a copy of the config with the fields in `BUDGETED` set and no budget."""
    result = copy.copy(config)
    result.bits = None
    for name, value in zip(BUDGETED, values, strict=True):
        setattr(result, name, value)
    return result


def _stored_bits(config: CRVQConfig, counts: Counter) -> float:
    """Returns stored bits per weight, channel orders counted."""
    nbytes = sum(count * config.layer_shape(*size).nbytes for size, count in counts.items())
    return 8 * nbytes / sum(count * k * n for (k, n), count in counts.items())
