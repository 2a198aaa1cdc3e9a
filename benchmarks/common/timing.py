"""Times of calls that take turns, their ratios, and how far two results are apart."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from torch import Tensor

BATCH_SECONDS, MOST_CALLS = 0.003, 200  # calls that are timed together


def paired(
    calls: dict[Any, Callable], repetitions: int, now: Callable[[], float] = time.perf_counter, warm: bool = False
) -> dict[Any, list[float]]:
    """Returns the seconds per call, by the clock `now`, of every repetition; the calls take turns.

    With `warm` every turn begins with calls that are not timed: what others pushed out of the caches comes back.
    """

    def timed(call: Callable, count: int) -> float:
        start = now()
        for _ in range(count):
            call()
        return (now() - start) / count

    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = min(MOST_CALLS, int(BATCH_SECONDS / max(timed(call, 1), 1e-9)) + 1)
    times = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            if warm:
                timed(call, counts[name])
            times[name].append(timed(call, counts[name]))
    return times


def ratio(times: dict[Any, list[float]], slow: Any, fast: Any) -> float | None:
    """Returns how many times as fast `fast` is as `slow`, None if one of them was not timed."""
    if slow not in times or fast not in times:
        return None
    return short(median(a / b for a, b in zip(times[slow], times[fast], strict=True)))


def short(value: float) -> float:
    """Returns `value` to three digits."""
    return float(f"{value:.3g}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the L2 norm of the error over that of the expected values."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
