"""One picture of a quantized model: errors by layer, bits by block, bytes of the checkpoint, time."""

import io
import math
from typing import Any

from ..checkpoint.breakdown import PARTS, Breakdown

COLORS = dict(zip(PARTS, ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7"), strict=True))
EMBEDDINGS = "#F0E442"
DENSE = "#999999"
WIDTH = 10.0  # inches
DPI = 140
MOST_NUMBERS = 14  # columns up to which the cells of the heat map show their number
OWN_BAR = 0.01  # share of the checkpoint from which on a kind of unquantized tensors has a bar of its own
SMALL = 8  # font size


def draw(numbers: Breakdown, title: str, errors: str, seconds: dict[str, float]) -> bytes:
    """Returns the picture as a PNG.

    Args:
        numbers: of the model.
        title: what stands above it, one line or more.
        errors: what the errors are.
        seconds: time of the run by phase.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import style

    with style.context(["default", {"text.parse_math": False}]):  # not the user's own; a $ in a name is a $
        return _draw(numbers, title, errors, seconds)


def _draw(numbers: Breakdown, title: str, errors: str, seconds: dict[str, float]) -> bytes:
    from matplotlib.figure import Figure  # not pyplot, which would want a display

    lines = title.count("\n") + 1
    rows = _bars_of_bytes(numbers)
    bars = max(len(rows), len(seconds))
    heights = [0.22 * lines + 0.1, 0.26 * len(numbers.kinds) + 0.75, 2.0, 0.23 * bars + 0.5]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.9), dpi=DPI, layout="constrained")
    parts = figure.subfigures(4, 1, height_ratios=heights)
    parts[0].text(0.01, 0.5, title, ha="left", va="center", fontsize=10)
    _draw_errors(parts[1], numbers, errors)
    _draw_bits(parts[2].subplots(), numbers)
    left, right = parts[3].subplots(1, 2)
    _draw_bytes(left, rows, numbers.file_bytes)
    _draw_seconds(right, seconds)
    for axes in (left, right):
        axes.set_ylim(bars - 0.5, -0.5)  # bars of the same thickness, from the top
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_errors(part: Any, numbers: Breakdown, errors: str) -> None:
    """Draws the heat map: kinds of layers by blocks."""
    axes = part.subplots()
    known = [error for row in numbers.errors for error in row if not math.isnan(error)]
    axes.set_facecolor("#e8e8e8")  # a block without such a layer
    image = axes.imshow(numbers.errors, aspect="auto", cmap="YlOrRd", vmin=0, vmax=max(known), interpolation="none")
    blocks, step = len(numbers.blocks), max(1, math.ceil(len(numbers.blocks) / 20))
    axes.set_xticks(range(0, blocks, step), [str(block) for block in numbers.blocks[::step]], fontsize=SMALL)
    axes.set_yticks(range(len(numbers.kinds)), [kind.name for kind in numbers.kinds], fontsize=SMALL)
    if blocks <= MOST_NUMBERS:
        for y, row in enumerate(numbers.errors):
            for x, error in enumerate(row):
                color = "white" if error > 0.6 * max(known) else "black"
                if not math.isnan(error):
                    axes.text(x, y, f"{error:.3f}", ha="center", va="center", fontsize=SMALL, color=color)
    several = f", mean of up to {numbers.per_cell} experts" if numbers.per_cell > 1 else ""
    axes.set_title(f"{errors}{several}", fontsize=10, loc="left")
    axes.set_xlabel("block", fontsize=SMALL)
    part.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=SMALL)


def _draw_bits(axes: Any, numbers: Breakdown) -> None:
    """Draws the bits per weight of every block, stacked by what they are spent on."""
    places = range(len(numbers.blocks))
    bottom = [0.0 for _ in places]
    for part in PARTS:
        bits = numbers.block_bits[part]
        axes.bar(places, bits, 0.85, bottom=bottom, color=COLORS[part], label=part)
        bottom = [low + more for low, more in zip(bottom, bits, strict=True)]
    step = max(1, math.ceil(len(places) / 20))
    axes.set_xticks(places[::step], [str(block) for block in numbers.blocks[::step]], fontsize=SMALL)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.tick_params(labelsize=SMALL)
    axes.set_title("Stored bits per weight of the quantized layers", fontsize=10, loc="left")
    axes.set_xlabel("block", fontsize=SMALL)
    axes.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    axes.spines[["top", "right"]].set_visible(False)


def _bars_of_bytes(numbers: Breakdown) -> list[tuple[str, float, str]]:
    """Returns name, bytes and color of every bar: the parts of the quantized layers, then what else there is."""
    rows = [(part, nbytes, COLORS[part]) for part, nbytes in numbers.quantized_bytes.items()]
    if numbers.embedding_bytes:
        rows.append(("embeddings, quantized", numbers.embedding_bytes, EMBEDDINGS))
    large = {name: n for name, n in numbers.dense_bytes.items() if n >= OWN_BAR * numbers.file_bytes}
    rows += [(f"{name}, dense", nbytes, DENSE) for name, nbytes in large.items()]
    return [*rows, ("other dense tensors", sum(numbers.dense_bytes.values()) - sum(large.values()), DENSE)]


def _draw_bytes(axes: Any, rows: list[tuple[str, float, str]], total: int) -> None:
    labels = [f"{nbytes / 1e6:,.{1 if nbytes >= 1e6 else 3}f} MB, {nbytes / total:.1%}" for _, nbytes, _ in rows]
    _draw_bars(axes, [name for name, _, _ in rows], [nbytes for _, nbytes, _ in rows], labels, [c for *_, c in rows])
    axes.set_title(f"Whole checkpoint, {total / 1e6:,.1f} MB", fontsize=10, loc="left")


def _draw_seconds(axes: Any, seconds: dict[str, float]) -> None:
    labels = [f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s" for value in seconds.values()]
    _draw_bars(axes, list(seconds), list(seconds.values()), labels, ["#444444"] * len(seconds))
    axes.set_title(f"Time, {sum(seconds.values()):,.0f} s in all", fontsize=10, loc="left")


def _draw_bars(axes: Any, names: list[str], values: list[float], labels: list[str], colors: list[str]) -> None:
    """Draws horizontal bars from the top, each with a label at its end and no axis below."""
    bars = axes.barh(range(len(names)), values, color=colors, height=0.7)
    axes.bar_label(bars, labels, fontsize=SMALL, padding=3)
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    axes.set_xticks([])
    axes.margins(x=0.45)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
