"""A bit budget instead of knobs: which codebooks and how many critical channels spend it best, on which layers."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..config import BUDGETED, CRVQConfig
from ..naming import first_block, is_named_by

MOST_BITS = 4  # stored bits per weight; what would take more saves next to nothing
FEW = 0.02  # of the weights of a model or a block
_TOLERANCE = 0.01  # of the budget
# Channels and bits of a base code, from many bits per weight to few. Groups of 4 are better where they can have 6 bits
# (benchmarks/LOG.md); codes of more than 8 are slow to look up.
_BASE_CODES = ((4, 8), (4, 7), (4, 6), (8, 8), (8, 7), (8, 6), (8, 5), (8, 4))
# Bits that the first block has beyond the budget, as many of these as leave the others such a share of their critical
# channels, and at most, where it has at most such a share of all weights (benchmarks/LOG.md).
_FIRST_BLOCK_MORE, _KEPT = (1.0, 0.75, 0.5), 0.8
_FIRST_BLOCK_MOST, _FIRST_BLOCK_SHARE = 3.5, 0.04

Sizes = Mapping[str, tuple[int, int]]  # in_features and out_features of layers by name


def within_budget(config: CRVQConfig, sizes: Sizes) -> CRVQConfig:
    """Returns a config whose stored bits per weight are at most its `bits`, and at most 1 % less.

    The base codes are the finest that the budget allows. What is left goes into as few extended codebooks as can spend
    it, for as many critical channels as that makes: at equal bits, one extended codebook for 4 % of the channels beats
    three for 2 % (benchmarks/LOG.md). The first block, whose error all others have to live with, has a larger budget
    than they have, where it is but one of many.

    Args:
        config: returned as it is if its `bits` is None or there are no layers; else the fields in `BUDGETED` and
            `overrides` are chosen.
        sizes: in_features and out_features by name of every layer that a code of some size fits. Those that the
            chosen channels per code do not divide stay dense and do not count.

    Raises:
        ValueError: these layers cannot be stored in so few, or so many, bits.
    """
    if config.bits is None or not sizes:
        return config
    best = most_within_budget(config, sizes)
    if best is None or stored_bits(best, sizes) < (1 - _TOLERANCE) * config.bits:
        raise ValueError(
            f"bits={config.bits:g} cannot be met within 1 % by these layers, whose least is "
            f"{fewest_bits(config, sizes):.3f} bits per weight; give other bits, or set {', '.join(BUDGETED)} "
            "yourself."
        )
    return best


def most_within_budget(config: CRVQConfig, sizes: Sizes) -> CRVQConfig | None:
    """Returns what `within_budget` does, where it cannot spend the budget the most below it; None if that is nothing.

    Args:
        config: with `bits`.
        sizes: as for `within_budget`.
    """
    found = _most(config, Counter(sizes.values()))
    finer = None if found is None else _with_finer_first_block(config, found, sizes)
    return found if finer is None else finer


def _with_finer_first_block(config: CRVQConfig, found: CRVQConfig, sizes: Sizes) -> CRVQConfig | None:
    """Returns `found` with more critical channels in the first block and fewer in all others, within the budget.

    Base codes stay. None if the first block is too much of the model, or the others would lose too many.
    """
    name, first, rest = first_block(sizes), Counter(), Counter()
    for layer, size in sizes.items():
        if found.fits(layer, size[0]):
            (first if name is not None and is_named_by(layer, [name]) else rest)[size] += 1
    of_first, of_rest = _weights(first.elements()), _weights(rest.elements())
    if not first or of_first > _FIRST_BLOCK_SHARE * (of_first + of_rest):
        return None
    code = found.in_group_size, found.nbits_per_codebook, max(1, found.num_extended_codebooks)
    own, wanted = copy.copy(config), copy.copy(config)
    for more in _FIRST_BLOCK_MORE:
        own.bits = min(config.bits + more, _FIRST_BLOCK_MOST)
        most = _largest(own, *code, first) if own.bits > config.bits else None
        if most is None:
            continue
        spent = of_first * _stored_bits(most, first)
        wanted.bits = (config.bits * (of_first + of_rest) - spent) / of_rest
        others = _largest(wanted, *code, rest)
        if others is not None and others.critical_ratio >= _KEPT * found.critical_ratio:
            spent += of_rest * _stored_bits(others, rest)
            others.overrides = {name: {"critical_ratio": most.critical_ratio}}
            if spent >= (1 - _TOLERANCE) * config.bits * (of_first + of_rest):
                return others
    return None


def _most(config: CRVQConfig, all_counts: Counter) -> CRVQConfig | None:
    """Returns the one setting for all layers that spends most of the budget; None if none is within it."""
    best, most = None, 0.0
    for d, nbits in _BASE_CODES:
        counts = _fitting(all_counts, d)
        plain = _with(config, d, nbits, 0, 0.0)
        if not counts or _stored_bits(plain, counts) > config.bits:
            continue
        left = config.bits - _stored_bits(plain, counts)
        candidates = [plain]
        for extended in (0, *range(max(1, math.ceil(left * d / nbits)), 8)):
            candidates += [_largest(config, d, nbits, extended, counts)] if extended else []
            found = max((c for c in candidates if c), key=lambda c: _stored_bits(c, counts))
            stored = _stored_bits(found, counts)
            if extended and stored >= (1 - _TOLERANCE) * config.bits:
                return found
            if stored > most:
                best, most = found, stored
    return best


def fewest_bits(config: CRVQConfig, sizes: Sizes) -> float:
    """Returns the fewest stored bits per weight that any codes give layers of these sizes, infinity for no layers."""
    counts, fewest = Counter(sizes.values()), math.inf
    for d, nbits in _BASE_CODES:
        if fitting := _fitting(counts, d):
            fewest = min(fewest, _stored_bits(_with(config, d, nbits, 0, 0.0), fitting))
    return fewest


def stored_bits(config: CRVQConfig, sizes: Sizes) -> float:
    """Returns stored bits per weight of the layers that the codes of `config` fit, channel orders counted."""
    fitting = {name: size for name, size in sizes.items() if config.fits(name, size[0])}
    nbytes = sum(config.of_layer(name).layer_shape(*size).nbytes for name, size in fitting.items())
    return 8 * nbytes / max(1, _weights(fitting.values()))


def spend(
    config: CRVQConfig,
    sizes: Sizes,
    within: Callable[..., CRVQConfig | None] = within_budget,
    most_bits: float = MOST_BITS,
) -> tuple[CRVQConfig | None, set[str]]:
    """Returns a config whose budget `bits` is spent, and the layers that then stay dense: they would cost too much.

    Args:
        config: any, one without a budget too.
        sizes: in_features and out_features of the layers by name.
        within: `within_budget` or `most_within_budget`; what it returns or raises is.
        most_bits: stored bits per weight of a layer from which on it stays dense.
    """
    spent = within(config, sizes)
    costly = set() if spent is None else _costly(sizes, spent, most_bits)
    if costly:
        spent = within(config, {name: size for name, size in sizes.items() if name not in costly})
    return spent, costly


def _costly(sizes: Sizes, config: CRVQConfig, most_bits: float) -> set[str]:
    """Returns the layers that would take more than `most_bits`.

    In a toy all layers do, because of their codebooks. Where more than a few do, codebooks are not counted.
    """
    sizes = {name: size for name, size in sizes.items() if config.fits(name, size[0])}
    shapes = {name: config.of_layer(name).layer_shape(*size) for name, size in sizes.items()}
    weights = {name: math.prod(size) for name, size in sizes.items()}
    costly = {name for name, shape in shapes.items() if 8 * shape.nbytes > most_bits * weights[name]}
    if sum(weights[name] for name in costly) <= FEW * sum(weights.values()):
        return costly
    codebooks = {name: shape.num_codebooks * shape.codebook_size for name, shape in shapes.items()}
    bits = {name: codebooks[name] * shape.in_group_size * shape.codebook_bits for name, shape in shapes.items()}
    return {name for name in costly if 8 * shapes[name].nbytes - bits[name] > most_bits * weights[name]}


def _weights(sizes: Iterable[tuple[int, int]]) -> int:
    return sum(map(math.prod, sizes))


def _fitting(counts: Counter, d: int) -> Counter:
    """Returns those of the sizes whose channels can be cut into groups of `d`."""
    return Counter({size: count for size, count in counts.items() if size[0] % d == 0})


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
    result.bits = result.fit = result.overrides = None
    for name, value in zip(BUDGETED, values, strict=True):
        setattr(result, name, value)
    return result


def _stored_bits(config: CRVQConfig, counts: Counter) -> float:
    """Returns stored bits per weight, channel orders counted."""
    nbytes = sum(count * config.layer_shape(*size).nbytes for size, count in counts.items())
    return 8 * nbytes / sum(count * k * n for (k, n), count in counts.items())
