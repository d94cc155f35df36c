"""The plots of an ablation: loss against cache, loss by context and turn, recall by distance, loss by learning rate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.figure import DASHED, INK, SOFT, Drawing, Report, draw_estimates, new_figure, plain, series_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_cache(report: Report) -> "Figure":
    """What a smaller cache costs: loss difference over the cache bytes of the longest conversation."""
    figure, (ax,) = new_figure(7.4, 4.0)
    length = list(next(iter(report["arms"].values()))["kv_bytes"])[-1]
    places = []
    for name, color in series_colors(list(report["arms"])).items():
        mebibytes = report["arms"][name]["kv_bytes"][length] / 2**20
        estimate = report["loss"]["arms"][name]["difference"] or plain(0.0)
        draw_estimates(ax, [mebibytes], [estimate], color, markersize=8)
        offset: dict[str, Any] = {"xytext": (8, 5), "textcoords": "offset points"}
        ax.annotate(name, (mebibytes, estimate["value"]), fontsize=9, color=INK, **offset)
        places.append(mebibytes)
    _log_ticks(ax, places, [f"{place:.3g}" for place in places])
    ax.margins(x=0.16, y=0.12)
    ax.axhline(0, **DASHED)
    ax.set(
        xlabel=f"MiB of cache for a conversation of {int(length):,} tokens (16-bit)",
        ylabel=f"nats a token more than {report['against']}",
    )
    return figure


def draw_loss(report: Report) -> "Figure":
    """Loss difference to the first arm, by tokens of context and by the number of the message."""
    titles = {"by_context": ("Tokens before, in the dialogue", "tokens"), "by_turn": ("Number of the message", "turns")}
    figure, axes = new_figure(10.0, 4.2, 2)
    for ax, (part, (title, key)) in zip(axes, titles.items(), strict=True):
        series = {name: figures[part] for name, figures in report["loss"]["arms"].items() if name != report["against"]}
        labels = [b[key] for b in next(iter(series.values()))]
        _draw_series(ax, report, labels, {name: [b["difference"] for b in bins] for name, bins in series.items()})
        ax.axhline(0, **DASHED)
        ax.set(title=title)
    axes[0].set(ylabel=f"nats a token more than {report['against']}")
    _legend_below(figure, axes[0])
    return figure


def draw_recall(report: Report) -> "Figure":
    """Gain of a stated value and how often it ranks first, by distance."""
    recall = report["recall"]
    figure, axes = new_figure(10.0, 4.2, 2)
    labels = [f"{at['distance']['mean']:.0f}" for at in recall["distances"]]
    titles = {"gain": "What stating a value adds", "accuracy": f"Stated value first of {recall['n_candidates']}"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        series = {name: [at["models"][name][key] for at in recall["distances"]] for name in report["arms"]}
        _draw_series(ax, report, labels, series)
        ax.axhline(0 if key == "gain" else recall["chance"], **DASHED)
        ax.set(title=title, xlabel="tokens from statement to answer", ylabel="nats" if key == "gain" else "share")
    axes[1].annotate(
        "chance", (0, recall["chance"]), xytext=(0, 4), textcoords="offset points", fontsize=8.5, color=SOFT
    )
    _legend_below(figure, axes[0])
    return figure


def draw_learning_rates(report: Report) -> "Figure":
    """Held-out loss of every run over its learning rate."""
    figure, (ax,) = new_figure(7.4, 3.8)
    rates: set[float] = set()
    for name, color in series_colors(list(report["arms"])).items():
        runs = [run for run in report["arms"][name]["runs"] if run["heldout_loss"] is not None]
        rates |= {run["lr"] for run in runs}
        ax.plot([run["lr"] for run in runs], [run["heldout_loss"] for run in runs], "-o", color=color, label=name)
    _log_ticks(ax, sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    ax.margins(x=0.1, y=0.12)
    ax.set(xlabel="peak learning rate", ylabel="held-out loss, nats a token")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_series(ax: "Axes", report: Report, labels: Sequence[str], series: dict[str, Any]) -> None:
    """A line of estimates for each arm over the labels, shifted so that no interval hides another."""
    colors = series_colors(list(report["arms"]))
    shifts = {name: 0.1 * (number - (len(colors) - 1) / 2) for number, name in enumerate(colors)}
    for name, estimates in series.items():
        places = [i + shifts[name] for i in range(len(labels))]
        draw_estimates(ax, places, estimates, colors[name], "-o", label=name, linewidth=1.4)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(False, axis="x")


def _log_ticks(ax: "Axes", places: Sequence[float], labels: Sequence[str]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(places, labels)
    ax.set_xticks([], minor=True)


def _legend_below(figure: "Figure", ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


DRAWINGS: dict[str, Drawing] = {
    "cache": ("loss", draw_cache),
    "loss": ("loss", draw_loss),
    "recall": ("recall", draw_recall),
    "learning_rates": ("arms", draw_learning_rates),
}
