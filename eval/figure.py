"""Style and pieces of all plots, written as PNG and as SVG whose colors follow the page's light or dark theme."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn color -> CSS variable of the page. The drawn ones suit a white page and are what the PNG files show.
INK, SOFT, GRID, PAPER = "#1b2430", "#5d6879", "#e2e6ec", "#fffffe"
# Okabe and Ito's palette: distinct with any color vision.
SERIES_COLORS = ("#7a8594", "#0072b2", "#d55e00", "#8d5aa8", "#b08900")
HUMAN, HUMAN_COLOR = "human", "#00896b"
THEME = {INK: "--ink", SOFT: "--soft", GRID: "--line", PAPER: "--card", HUMAN_COLOR: "--human"}
THEME |= {color: f"--series-{number}" for number, color in enumerate(SERIES_COLORS)}
LABEL_CHARACTERS = 28  # of a name in a plot
DASHED: dict[str, Any] = {"color": SOFT, "linewidth": 1.1, "linestyle": (0, (4, 3))}
_STYLE: Any = {
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlecolor": INK,
    "axes.titlepad": 10, "axes.labelsize": 9, "axes.labelcolor": SOFT,
    "legend.frameon": False, "legend.fontsize": 9, "legend.labelcolor": INK, "legend.handlelength": 1.4,
    "lines.linewidth": 1.8, "lines.markersize": 5, "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name of the recipe is no formula
}  # fmt: skip

Report = Mapping[str, Any]
Drawing = tuple[str, Callable[[Report], "Figure | None"]]
"""(key of the report that it needs, the function that draws it)"""


def series_colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each name, in order."""
    colors = (*SERIES_COLORS, HUMAN_COLOR) if len(names) > len(SERIES_COLORS) else SERIES_COLORS
    return {name: colors[i % len(colors)] for i, name in enumerate(names)}


def system_colors(report: Report) -> dict[str, str]:
    """The colors of a report's models and of humans."""
    models = list(report["models"])
    return {name: SERIES_COLORS[i % len(SERIES_COLORS)] for i, name in enumerate(models)} | {HUMAN: HUMAN_COLOR}


def plot_label(name: str) -> str:
    """A model's name, cut to the room that a plot has, and without the leading underscore with which matplotlib leaves
    a line out of the legend."""
    cut = name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
    return f"\u200b{cut}" if cut.startswith("_") else cut


def new_figure(width: float, height: float, n_columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure (inches) and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, n_columns, squeeze=False)[0])


def plain(value: float) -> dict[str, Any]:
    """A number without an interval, in the form of an estimate."""
    return {"value": value, "low": None, "high": None}


def draw_estimates(
    ax: "Axes",
    places: Sequence[float],
    estimates: Sequence[Mapping[str, Any]],
    color: str,
    marker: str = "o",
    is_flat: bool = False,
    **options: Any,
) -> None:
    """Values at `places` with their intervals; `is_flat`: the values are along x. Undefined values are left out."""
    known = [(place, e) for place, e in zip(places, estimates, strict=True) if e["value"] is not None]
    for place, estimate in known:
        if estimate["low"] is not None:
            (ax.hlines if is_flat else ax.vlines)(place, estimate["low"], estimate["high"], color=color, linewidth=1.8)
    xy = [place for place, _ in known], [estimate["value"] for _, estimate in known]
    ax.plot(*(xy[::-1] if is_flat else xy), marker, color=color, markeredgecolor=PAPER, **options)


def draw_rows(
    ax: "Axes", rows: Sequence[tuple[str, Mapping[str, Any], str]], headroom: float = 0.6, is_labeled: bool = True
) -> None:
    """A forest plot of (label, estimate, color), the first row on top; `headroom` (rows) is for reference labels."""
    for y, (_, estimate, color) in enumerate(rows):
        draw_estimates(ax, [y], [estimate], color, is_flat=True, markersize=7)
    ax.set_yticks(range(len(rows)), [label if is_labeled else "" for label, *_ in rows], fontsize=9.5, color=INK)
    ax.set_ylim(len(rows) - 0.4, -headroom)
    ax.grid(False, axis="y")


def draw_reference(ax: "Axes", x: float, label: str) -> None:
    """A vertical dashed line."""
    ax.axvline(x, **DASHED)
    ax.annotate(
        label, (x, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
        fontsize=8.5, color=SOFT, va="top",
    )  # fmt: skip


def draw_all(drawings: Mapping[str, Drawing], report: Report, directory: Path) -> dict[str, str]:
    """Write <directory>/<name>.png of each drawing whose part the report has; return the themed SVG of each."""
    import matplotlib

    directory.mkdir(parents=True, exist_ok=True)
    svgs = {}
    with matplotlib.rc_context(_STYLE):
        for name, (part, draw) in drawings.items():
            figure = draw(report) if report.get(part) else None
            if figure is not None:
                with atomic_file(directory / f"{name}.png") as file:
                    figure.savefig(file, format="png", dpi=160)
                figure.set_layout_engine("none")  # laid out already: once is enough
                svgs[name] = themed_svg(figure, name)
    return svgs


def themed_svg(figure: "Figure", name: str) -> str:
    """Inline SVG: text stays text, drawn colors become the page's CSS variables, width follows the page."""
    import matplotlib

    out = io.StringIO()
    # The salt keeps the ids of two figures on one page apart, and the output the same from run to run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in THEME.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font: (?:bold |700 )?([\d.]+px)[^;\"]*", _font, svg)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg class="plot" viewBox="\1" role="img" aria-label="{name}">',
        svg,
        count=1,
    )


def _font(match: "re.Match[str]") -> str:
    weight = "600" if "bold" in match.group(0) or "700" in match.group(0) else "400"
    return f"font: {weight} {match.group(1)} var(--font)"
