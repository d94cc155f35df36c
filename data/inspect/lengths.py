"""The lengths of the documents of prepared data: quantiles, and a histogram as PNG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from recipes.files import atomic_file

_QUANTILES = {"shortest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "longest": 1.0}
_N_BINS = 40
_COLORS = ("#0072b2", "#d55e00")  # of train and heldout


def length_table(lengths: Mapping[str, np.ndarray], row_length: int) -> Table:
    """Quantiles of the lengths in tokens, one column a side, and the share that fills a row."""
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
    """Edges of the histogram's bins: integers, about evenly spaced in logarithms."""
    return np.unique(np.geomspace(1, row_length + 1, _N_BINS + 1).round().astype(np.int64))


def write_histogram(path: Path, lengths: Mapping[str, np.ndarray], row_length: int) -> None:
    """Plot the number of documents by length, one line a side, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Document lengths")
    for (side, values), color in zip(lengths.items(), _COLORS, strict=True):
        if len(values):
            label = f"{side}: {len(values):,} documents, median {int(np.median(values)):,}"
            ax.hist(values, length_bins(row_length).tolist(), histtype="step", log=True, color=color, label=label)
    ax.axvline(row_length, color="gray", linewidth=1, linestyle="--", label=f"row length {row_length:,}")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(True, alpha=0.3)
    ax.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
