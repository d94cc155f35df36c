"""Figures of an ablation: loss against cache, loss by context and turn, recall by distance, loss by learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.plots import HUMAN_COLOUR, INK, MODEL_COLOURS, PAPER, SOFT, new_figure, plain, set_legend, set_titles
from recipes.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (*MODEL_COLOURS, HUMAN_COLOUR)

Report = Mapping[str, Any]


def arm_colours(report: Report) -> dict[str, str]:
    """One colour an arm, in the order of the recipe."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(report["arms"])}


def draw_cache(report: Report) -> "Figure":
    """What a smaller cache costs: loss difference over the bytes of the longest conversation's cache."""
    figure, (ax,) = new_figure(7.4, 4.0)
    length = list(next(iter(report["arms"].values()))["kv_bytes"])[-1]
    zero, places = plain(0.0), list[float]()
    for name, colour in arm_colours(report).items():
        mebibytes = report["arms"][name]["kv_bytes"][length] / 2**20
        estimate = report["loss"]["arms"][name]["difference"] or zero
        if estimate["low"] is not None:
            ax.plot([mebibytes] * 2, [estimate["low"], estimate["high"]], color=colour, linewidth=2.2)
        ax.plot([mebibytes], [estimate["value"]], "o", color=colour, markersize=8, markeredgecolor=PAPER)
        places.append(mebibytes)
        ax.annotate(
            name, (mebibytes, estimate["value"]), xytext=(8, 5), textcoords="offset points", fontsize=9, color=INK
        )
    ax.set_xscale("log")
    ax.set_xticks(places, [f"{place:.2g}" for place in places])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.16, y=0.12)
    ax.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    set_titles(
        ax, "", f"MiB of cache for a conversation of {int(length):,} tokens (16-bit)",
        f"nats a token more than {report['against']}",
    )  # fmt: skip
    return figure


def draw_loss(report: Report) -> "Figure":
    """Loss difference to the first arm, by tokens of context and by the number of the message."""
    figure, axes = new_figure(10.0, 4.2, 2)
    titles = {"by_context": ("Tokens before, in the dialogue", "tokens"), "by_turn": ("Number of the message", "turns")}
    for ax, (part, (title, key)) in zip(axes, titles.items(), strict=True):
        for name, style in _styles(report).items():
            bins = report["loss"]["arms"][name][part]
            if name != report["against"]:
                labels = [b[key] for b in bins]
                draw_series(ax, labels, [b["difference"] for b in bins], style)
        ax.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        set_titles(ax, title, "", f"nats a token more than {report['against']}" if part == "by_context" else "")
    _legend_below(figure, axes[0])
    return figure


def draw_recall(report: Report) -> "Figure":
    """Gain of a stated value and how often it ranks first, by distance."""
    figure, axes = new_figure(10.0, 4.2, 2)
    distances = report["recall"]["distances"]
    labels = [f"{at['distance']['mean']:.0f}" for at in distances]
    for name, style in _styles(report).items():
        for ax, key in zip(axes, ("gain", "accuracy"), strict=True):
            draw_series(ax, labels, [at["models"][name][key] for at in distances], style)
    axes[0].axhline(0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes[1].axhline(report["recall"]["chance"], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes[1].annotate(
        "chance", (0, report["recall"]["chance"]), xytext=(0, 4), textcoords="offset points", fontsize=8.5, color=SOFT
    )
    set_titles(axes[0], "What stating a value adds", "tokens from statement to answer", "nats")
    set_titles(
        axes[1], f"Stated value first of {report['recall']['n_candidates']}", "tokens from statement to answer", "share"
    )
    _legend_below(figure, axes[0])
    return figure


def draw_learning_rates(report: Report) -> "Figure":
    """Held-out loss of every run over its learning rate."""
    figure, (ax,) = new_figure(7.4, 3.8)
    rates: set[float] = set()
    for name, colour in arm_colours(report).items():
        runs = [run for run in report["arms"][name]["runs"] if run["heldout_loss"] is not None]
        rates |= {run["lr"] for run in runs}
        ax.plot(
            [run["lr"] for run in runs], [run["heldout_loss"] for run in runs], "-o", color=colour, label=name,
            markersize=5, linewidth=1.8, markeredgecolor=PAPER,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.1, y=0.12)
    set_titles(ax, "", "peak learning rate", "held-out loss, nats a token")
    set_legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_series(
    ax: "Axes", labels: Sequence[str], estimates: Sequence[Mapping[str, Any]], style: tuple[str, str, float]
) -> None:
    """A line over named places with its intervals; `style` is name, colour and shift, so that none hides another."""
    name, colour, shift = style
    known = [(i + shift, estimate) for i, estimate in enumerate(estimates) if estimate["value"] is not None]
    ax.plot(
        [place for place, _ in known], [estimate["value"] for _, estimate in known], "-o", color=colour, label=name,
        markersize=4.5, linewidth=1.4, markeredgecolor=PAPER, markeredgewidth=0.8,
    )  # fmt: skip
    for place, estimate in known:
        if estimate["low"] is not None:
            ax.plot([place] * 2, [estimate["low"], estimate["high"]], color=colour, linewidth=1.6, alpha=0.55)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(False, axis="x")


def _styles(report: Report) -> dict[str, tuple[str, str, float]]:
    """Name, colour and shift of every arm."""
    colours = arm_colours(report)
    return {
        name: (name, colour, 0.1 * (number - (len(colours) - 1) / 2))
        for number, (name, colour) in enumerate(colours.items())
    }


def _legend_below(figure: "Figure", ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9, labelcolor=INK
    )


DRAWINGS = {
    "cache": draw_cache,
    "loss": draw_loss,
    "recall": draw_recall,
    "learning_rates": draw_learning_rates,
}


def draw_ablation(report: Report, directory: Path) -> list[Path]:
    """Write <directory>/<name>.png of every figure, for `report` as plain JSON values."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in DRAWINGS.items():
        paths.append(directory / f"{name}.png")
        with atomic_file(paths[-1]) as file:
            draw(report).savefig(file, format="png", dpi=160)
    return paths
