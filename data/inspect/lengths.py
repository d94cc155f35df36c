"""How long the documents of prepared data are: quantiles, and a histogram as PNG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from recipes.files import atomic_file

_QUANTILES = {"shortest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "longest": 1.0}
_N_BINS = 40
_EMPTY = 0.7  # where a bin without documents is drawn, for a logarithmic axis has no 0
# Ink, a softer one, the grid; and of Okabe and Ito's colors, told apart with any color vision, one for each side.
_INK, _SOFT, _GRID = "#1b2430", "#5d6879", "#e2e6ec"
_COLORS = ("#0072b2", "#d55e00")


def length_table(lengths: Mapping[str, np.ndarray], row_length: int) -> Table:
    """Quantiles of the lengths in tokens, a column for each side, and how many fill a row."""
    table = Table("document length in tokens", *lengths)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, share in _QUANTILES.items():
        quantiles = (np.quantile(side, share, method="lower") if len(side) else 0 for side in lengths.values())
        table.add_row(name, *(f"{quantile:,}" for quantile in quantiles))
    full = (f"{np.mean(side == row_length):.1%}" if len(side) else "-" for side in lengths.values())
    table.add_row(f"as long as a row ({row_length})", *full)
    return table


def length_bins(row_length: int) -> np.ndarray:
    """Edges of the bins, whole tokens: each holds lengths from an edge to below the next; about evenly wide in
    logarithms, and none narrower than a token."""
    return np.unique(np.geomspace(1, row_length + 1, _N_BINS + 1).round().astype(np.int64))


def write_histogram(path: Path, lengths: Mapping[str, np.ndarray], row_length: int) -> None:
    """Draw how many documents have which length, one line a side, both axes logarithmic: in most data the pieces of
    dialogues longer than a row outnumber all others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(7.2, 3.8), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    edges = length_bins(row_length)
    for (side, values), color in zip(lengths.items(), _COLORS, strict=True):
        if len(values):
            counts = np.histogram(values, edges)[0]
            label = f"{side}: {len(values):,} documents, median {int(np.median(values)):,}"
            ax.stairs(counts, edges, baseline=_EMPTY, color=color, linewidth=1.8, label=label)
            ax.stairs(counts, edges, baseline=_EMPTY, color=color, alpha=0.12, fill=True)
    ax.axvline(row_length, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        "a row", (row_length, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3), textcoords="offset points",
        fontsize=8.5, color=_SOFT, ha="right", va="top",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    shortest = min((int(side.min()) for side in lengths.values() if len(side)), default=1)
    ax.set_xlim(edges[np.searchsorted(edges, shortest, side="right") - 1], (row_length + 1) * 1.08)
    ax.set_ylim(bottom=_EMPTY, top=ax.get_ylim()[1] * 3)  # room for the legend
    ticks = [tick for power in range(7) for tick in (10**power, 2 * 10**power, 5 * 10**power) if tick <= row_length]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_title(
        "Length of the documents (a dialogue longer than a row is several)",
        loc="left",
        fontsize=10.5,
        color=_INK,
        fontweight="bold",
        pad=10,
    )
    ax.set_xlabel("tokens of a document; bins about evenly wide in logarithms", fontsize=9, color=_SOFT)
    ax.set_ylabel("documents in a bin", fontsize=9, color=_SOFT)
    ax.tick_params(colors=_SOFT, labelsize=9, length=0)
    ax.grid(True, color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
