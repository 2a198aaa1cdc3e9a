"""The picture of `peers --plot`: perplexity by stored bits, a color for each quantizer."""

from pathlib import Path
from typing import Any

UNQUANTIZED = 20.10  # `crvq eval` of the dense model
OURS = "CRVQ"
COLORS = {
    OURS: "#D55E00",
    "HQQ": "#0072B2",
    "quanto": "#56B4E9",
    "llama.cpp": "#009E73",
    "GPTQ": "#CC79A7",
    "AutoRound": "#7A5C00",
}
SMALL = 8  # font size
HIGHEST = 30_000  # perplexity at the upper edge; what is worse stands there as an arrow, with its number
# Where a label may be, in points right of and above its point: the first free place is taken.
PLACES = [(7, 0), (-7, 0), (0, 7), (0, -7), (6, 8), (-6, 8), (6, -8), (-6, -8)]
PLACES += [(10, 18), (10, -18), (-10, 18), (-10, -18)]


def draw(path: Path, peers: list[dict[str, str]], ours: list[dict[str, str]]) -> None:
    """Writes the picture as a PNG.

    Args:
        path: of the picture; its folder is made.
        peers: rows of results/peers.csv.
        ours: rows of results/quality.csv.
    """
    from matplotlib import style

    with style.context("default"):  # not the user's own
        figure = _draw(peers, ours)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)


def _draw(peers: list[dict[str, str]], ours: list[dict[str, str]]) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which would want a display
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 6.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    points = [_point(OURS, row["name"], row) for row in _current(ours)]
    points += [_point(*_family(row["name"]), row) for row in peers]
    for family, _, bits, value in points:
        marker, size = ("*", 130) if family == OURS else ("^" if value == HIGHEST else "o", 34)
        axes.scatter(bits, value, s=size, color=COLORS[family], marker=marker, zorder=3, clip_on=False)
    for family in dict.fromkeys(family for family, *_ in points):
        axes.scatter([], [], s=34, color=COLORS[family], marker="*" if family == OURS else "o", label=family)
    axes.legend(loc="center right", frameon=False, fontsize=SMALL + 1, labelcolor="linecolor")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0.9, max(bits for *_, bits, _ in points) + 0.35)
    axes.set_ylim(UNQUANTIZED * 0.6, HIGHEST)
    axes.axhline(UNQUANTIZED, color="#666666", linewidth=1, linestyle="--")
    text = f"unquantized, {UNQUANTIZED:.2f}"
    axes.text(0.92, UNQUANTIZED * 1.02, text, va="bottom", fontsize=SMALL, color="#666666")
    axes.set_xlabel("stored bits per weight of the quantized layers")
    axes.set_ylabel("perplexity on WikiText-2 (log scale)")
    axes.set_title("SmolLM2-135M: what the same bits buy; lower left is better", loc="left", fontsize=11, pad=12)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(figure, axes, points)
    return figure


def _current(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns one row a name, of the last commit it was measured at: the median of its seeds."""
    named: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        row = row | {"name": row["name"].partition(", seed ")[0]}
        same = named.setdefault(row["name"], [])
        if same and same[0]["commit"] != row["commit"]:
            same.clear()
        same.append(row)
    return [sorted(same, key=lambda row: float(row["perplexity"]))[len(same) // 2] for same in named.values()]


def _point(family: str, name: str, row: dict[str, str]) -> tuple[str, str, float, float]:
    """Returns family, label, bits and perplexity of a row; if it is off the scale, its label says what it is."""
    bits, value = float(row["bits_per_weight"]), float(row["perplexity"])
    if value >= HIGHEST:
        name += f": {value:,.0f}" if value < 1e6 else f": {value:.1e}".replace("e+0", "e")
    return family, name, bits, min(value, HIGHEST)


def _family(name: str) -> tuple[str, str]:
    """Returns the key of `COLORS` that a peer's name begins with, and the rest as it stands in the picture."""
    family = next(family for family in COLORS if name.startswith(family))
    return family, name.removeprefix(f"{family} ").replace(", groups of ", " g")


def _label(figure: Any, axes: Any, points: list[tuple[str, str, float, float]]) -> None:
    """Writes the name of each point where it covers neither a point nor another name; ours first."""
    figure.draw_without_rendering()
    taken = []
    for _, _, bits, value in points:
        x, y = axes.transData.transform((bits, value))
        taken.append((x - 6, y - 6, x + 6, y + 6))
    line = axes.transData.transform((0, UNQUANTIZED))[1]
    frame = axes.get_window_extent()
    for family, name, bits, value in sorted(points, key=lambda point: point[0] != OURS):
        style = {"fontsize": SMALL, "color": COLORS[family], "weight": "bold" if family == OURS else "normal"}
        for dx, dy in PLACES:
            place = {"ha": _side(dx, "right", "left"), "va": _side(dy, "top", "bottom"), "textcoords": "offset points"}
            text = axes.annotate(name, (bits, value), (dx, dy), **place, **style)
            box = text.get_window_extent().extents
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            crossed = box[1] < line + 2 and line - 2 < box[3]
            if inside and not crossed and not any(_overlap(box, other) for other in taken):
                break
            if (dx, dy) != PLACES[-1]:
                text.remove()
        taken.append(tuple(box))


def _side(distance: int, negative: str, positive: str) -> str:
    """Returns the side of a label that faces its point."""
    return "center" if distance == 0 else positive if distance > 0 else negative


def _overlap(one: Any, other: Any) -> bool:
    """Whether two boxes (left, bottom, right, top) share an area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
