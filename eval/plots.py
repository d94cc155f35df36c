"""Figures of the report: drawn once, kept as PNG and as SVG whose colours follow the page's light or dark theme."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.digits import telling_digits
from recipes.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn colour -> CSS variable of the page. The drawn ones suit a white page and are what the PNG files show.
INK, SOFT, GRID, PAPER = "#1b2430", "#5d6879", "#e2e6ec", "#fffffe"
THEME = {INK: "--ink", SOFT: "--soft", GRID: "--line", PAPER: "--card"}
HUMAN = "human"
# Okabe and Ito's colours: told apart with any colour vision.
MODEL_COLOURS = ("#7a8594", "#0072b2", "#d55e00", "#8d5aa8", "#b08900")
HUMAN_COLOUR = "#00896b"
THEME |= {colour: f"--series-{number}" for number, colour in enumerate(MODEL_COLOURS)} | {HUMAN_COLOUR: "--human"}

Report = Mapping[str, Any]
Drawing = Callable[[Report], "Figure | None"]


def series_colours(models: Sequence[str]) -> dict[str, str]:
    """One colour a model, in the order of the recipe, and one for humans."""
    return {name: MODEL_COLOURS[i % len(MODEL_COLOURS)] for i, name in enumerate(models)} | {HUMAN: HUMAN_COLOUR}


def new_figure(width: float, height: float, n_columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """An empty figure (inches) and its axes side by side, in the report's style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, n_columns, i + 1) for i in range(n_columns)]
    for ax in axes:
        ax.set_facecolor(PAPER)
        ax.tick_params(colors=SOFT, labelsize=9, length=0)
        ax.grid(True, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ax.spines.values():
            side.set_visible(False)
    return figure, axes


def set_titles(ax: "Axes", title: str, x: str = "", y: str = "") -> None:
    ax.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=10)
    ax.set_xlabel(x, fontsize=9, color=SOFT)
    ax.set_ylabel(y, fontsize=9, color=SOFT)


def set_legend(ax: "Axes", **options: Any) -> None:
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4, **options)


def draw_whisker(ax: "Axes", estimate: Mapping[str, Any], y: float, colour: str) -> None:
    """A dot with its interval, lying flat."""
    if estimate["value"] is None:
        return
    if estimate["low"] is not None:
        ax.plot([estimate["low"], estimate["high"]], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
    ax.plot([estimate["value"]], [y], "o", color=colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=1.2)


def label_rows(ax: "Axes", labels: Sequence[str], headroom: float = 0.6) -> None:
    """Label one row a system, the first on top; `headroom` in rows leaves place for the names of reference lines."""
    ax.set_yticks(range(len(labels)), labels, fontsize=9.5, color=INK)
    ax.set_ylim(len(labels) - 0.4, -headroom)
    ax.grid(False, axis="y")


def draw_reference(ax: "Axes", x: float, label: str) -> None:
    ax.axvline(x, color=SOFT, linewidth=1.1, linestyle=(0, (4, 3)))
    ax.annotate(
        label, (x, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
        fontsize=8.5, color=SOFT, va="top",
    )  # fmt: skip


def plain(value: float) -> dict[str, Any]:
    """A number without an interval, in the form of an estimate."""
    return {"value": value, "low": None, "high": None}


def draw_loss(report: Report) -> "Figure | None":
    """Held-out loss of count models and of every model."""
    part = report["perplexity"]
    rows = [(label, plain(part["ngrams"][name]), SOFT) for name, label in NGRAM_LABELS.items()]
    colours = series_colours(list(report["models"]))
    rows += [(name, figures["loss"], colours[name]) for name, figures in part["models"].items()]
    figure, (ax,) = new_figure(8.6, 0.7 + 0.34 * len(rows))
    digits = telling_digits((estimate["value"] for _, estimate, _ in rows), 2)
    for y, (_, estimate, colour) in enumerate(rows):
        draw_whisker(ax, estimate, y, colour)
        ax.annotate(
            f"{estimate['value']:.{digits}f}", (estimate["value"], y), xytext=(0, 7), textcoords="offset points",
            fontsize=8.5, color=INK, ha="center",
        )  # fmt: skip
    label_rows(ax, [label for label, *_ in rows])
    ax.margins(x=0.08)
    set_titles(ax, "", "nats a token (lower is better)")
    return figure


NGRAM_LABELS = {
    "unigram": "unigram",
    "bigram_add_one": "bigram, add-one",
    "bigram_kneser_ney": "bigram, Kneser-Ney",
}


def draw_turns(report: Report) -> "Figure | None":
    """Loss by turn, on the character's text and on the partner's."""
    models = report["perplexity"]["models"]
    figure, axes = new_figure(8.6, 3.0, 2)
    colours = series_colours(list(report["models"]))
    for ax, side in zip(axes, ("character", "partner"), strict=True):
        for name, figures in models.items():
            bins = [b for b in figures["by_turn"] if b[side]["value"] is not None]
            places = list(range(len(bins)))
            values = [b[side]["value"] for b in bins]
            ax.plot(places, values, "-o", color=colours[name], label=name, markersize=5, linewidth=1.8)
            banded = [i for i in places if bins[i][side]["low"] is not None]
            ax.fill_between(
                banded, [bins[i][side]["low"] for i in banded], [bins[i][side]["high"] for i in banded],
                color=colours[name], alpha=0.14, linewidth=0,
            )  # fmt: skip
            ax.set_xticks(places, [b["turns"] for b in bins])
        set_titles(ax, f"The {side}'s text", "number of the message", "nats a token" if side == "character" else "")
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    set_legend(axes[1])
    return figure


def draw_ranking(report: Report) -> "Figure | None":
    """Recall@1 by model and by score, with chance and the better of the two length-only rankings."""
    part = report["ranking"]
    labels = {"mean_logprob": "mean log-probability", "sum_logprob": "summed", "context_gain": "gain from context"}
    figure, axes = new_figure(8.6, 0.9 + 0.34 * len(part["models"]), 3)
    colours = series_colours(list(report["models"]))
    for ax, (score, label) in zip(axes, labels.items(), strict=True):
        for y, (name, figures) in enumerate(part["models"].items()):
            draw_whisker(ax, figures[score]["recall_at_1"], y, colours[name])
        label_rows(ax, list(part["models"]) if ax is axes[0] else [""] * len(part["models"]), headroom=1.0)
        draw_reference(ax, part["chance"]["recall_at_1"], "chance")
        set_titles(ax, label, "recall@1")
    right = max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        ax.set_xlim(0, right)
    return figure


def draw_scorer(report: Report) -> "Figure | None":
    """ROC curve, calibration, and the scorer's AUC beside baselines that read nothing."""
    part = report["engagement"]
    if part["roc"] is None or part["calibration"] is None:
        return None
    figure, (roc, calibration, auc) = new_figure(9.6, 3.1, 3)
    colour = MODEL_COLOURS[1]
    roc.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    rates = part["roc"]
    roc.plot(rates["false_positive_rate"], rates["true_positive_rate"], color=colour, linewidth=2)
    set_titles(roc, "ROC", "false positives", "true positives")
    roc.set_aspect("equal")
    calibration.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    for b in part["calibration"]["bins"]:
        calibration.plot(
            [b["predicted"]] * 2, [b["observed"]["low"], b["observed"]["high"]], color=colour, linewidth=1.6
        )
        calibration.plot(
            b["predicted"], b["observed"]["value"], "o", color=colour, markeredgecolor=PAPER, markeredgewidth=1
        )
    edges = [b["predicted"] for b in part["calibration"]["bins"]]
    edges += [b["observed"][k] for b in part["calibration"]["bins"] for k in ("low", "high")]
    pad = 0.04
    calibration.set_xlim(min(edges) - pad, max(edges) + pad)
    calibration.set_ylim(min(edges) - pad, max(edges) + pad)
    calibration.set_aspect("equal")
    set_titles(calibration, "Calibration", "predicted", "observed")
    rows = [("scorer", part["auc"])]
    rows += [(BASELINE_LABELS[name], figures["auc"]) for name, figures in part["baselines"].items()]
    for y, (name, estimate) in enumerate(rows):
        draw_whisker(auc, estimate, y, colour if name == "scorer" else SOFT)
    label_rows(auc, [name for name, _ in rows])
    draw_reference(auc, 0.5, "")
    set_titles(auc, "AUC", "0.5 is chance")
    return figure


BASELINE_LABELS = {
    "length": "length only",
    "turn_number": "turn number only",
    "length_and_turn_number": "length and turn",
}


def draw_preference(report: Report) -> "Figure | None":
    """Forest plot of win rates."""
    part = report["preference"]
    model, against = part["model"], part["against"]
    colours = series_colours(list(report["models"]))
    rows = [
        (f"{model} over {against}", part["win_rate"], colours[model]),
        ("  pairs of like length", part["win_rate_length_matched"], colours[model]),
        (f"{model} over human", part["win_rate_against_human"], colours[model]),
        (f"{against} over human", part["other_win_rate_against_human"], colours[against]),
        ("longer reply over shorter", part["longer_reply_wins"], SOFT),
    ]
    figure, (ax,) = new_figure(8.6, 2.7)
    for y, (_, estimate, colour) in enumerate(rows):
        draw_whisker(ax, estimate, y, colour)
    label_rows(ax, [label for label, *_ in rows], headroom=1.1)
    ax.axvspan(part["over_optimisation_threshold"], 2, color=GRID, alpha=0.55, linewidth=0)
    draw_reference(ax, 0.5, "no difference")
    draw_reference(ax, part["over_optimisation_threshold"], "suspect")
    ends = [e[k] for _, e, _ in rows for k in ("value", "low", "high") if e[k] is not None]
    ax.set_xlim(min([0.3, *ends]) - 0.03, max([0.72, *ends]) + 0.03)
    set_titles(ax, "The scorer prefers", "win rate")
    return figure


def draw_quality(report: Report) -> "Figure | None":
    """Length distribution, and four shares side by side."""
    systems = report["quality"]["systems"]
    colours = series_colours(list(report["models"]))
    figure, axes = new_figure(9.6, 2.9, 4)
    for name, figures in systems.items():
        lengths = sorted(figures["lengths"])
        if lengths:
            shares = [(i + 1) / len(lengths) for i in range(len(lengths))]
            axes[0].step(lengths, shares, where="post", color=colours[name], label=name, linewidth=1.8)
    axes[0].set_xlim(
        0, max([10, *(sorted(f["lengths"])[int(0.98 * (len(f["lengths"]) - 1))] for f in systems.values())])
    )
    set_titles(axes[0], "Reply length", "words", "share at most this long")
    set_legend(axes[0], loc="lower right")
    shown = {"distinct_2": "Distinct bigrams", "repetition": "Repeats itself", "stop_rate": "Ends by itself"}
    for ax, (key, title) in zip(axes[1:], shown.items(), strict=True):
        for y, (name, figures) in enumerate(systems.items()):
            draw_whisker(ax, figures[key], y, colours[name])
        label_rows(ax, list(systems) if ax is axes[1] else [""] * len(systems))
        ax.margins(x=0.12)
        ax.locator_params(axis="x", nbins=4)
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        set_titles(ax, title)
    return figure


def draw_sensitivity(report: Report) -> "Figure | None":
    """How much a replaced message moves the next token, by how far back it stands."""
    part = report["user_sensitivity"]["models"]
    figure, axes = new_figure(8.6, 2.8, len(part))
    colours = series_colours(list(report["models"]))
    top = 0.0
    for ax, (name, figures) in zip(axes, part.items(), strict=True):
        for side, style in (("user", "-o"), ("character", "--s")):
            points = [(d + 1, e) for d, e in enumerate(figures[side]["by_distance"]) if e["value"] is not None]
            ax.plot(
                [d for d, _ in points], [e["value"] for _, e in points], style, label=f"{side}'s message",
                color=colours[name] if side == "user" else SOFT, markersize=5, linewidth=1.8,
            )  # fmt: skip
            for d, e in points:
                if e["low"] is not None:
                    ax.plot([d, d], [e["low"], e["high"]], color=colours[name] if side == "user" else SOFT, linewidth=1)
                    top = max(top, e["high"])
        set_titles(ax, name, "messages back from the reply", "KL, nats" if ax is axes[0] else "")
        ax.set_xticks(range(1, 5))
    for ax in axes:
        ax.set_ylim(0, top * 1.3 or 1)
    set_legend(axes[-1])
    return figure


def draw_training(report: Report) -> "Figure | None":
    """Training and held-out loss of each stage that kept its metrics."""
    curves = report["training_curves"]
    if not curves:
        return None
    figure, axes = new_figure(min(9.6, 3.2 * len(curves)), 2.7, len(curves))
    for number, (ax, (stage, curve)) in enumerate(zip(axes, curves.items(), strict=True)):
        colour = MODEL_COLOURS[number % len(MODEL_COLOURS)]
        ax.plot(curve["step"], curve["loss"], color=colour, linewidth=1.1, alpha=0.9, label="training")
        if curve["heldout_step"]:
            ax.plot(curve["heldout_step"], curve["heldout_loss"], "o-", color=INK, markersize=3.5, linewidth=1.4,
                    label="held-out")  # fmt: skip
        set_titles(ax, stage, "step", "loss" if number == 0 else "")
        if curve["heldout_step"]:
            set_legend(ax)
    return figure


DRAWINGS: dict[str, tuple[str, Drawing]] = {  # name: (part of the report that it needs, how to draw it)
    "loss": ("perplexity", draw_loss),
    "loss_by_turn": ("perplexity", draw_turns),
    "ranking": ("ranking", draw_ranking),
    "scorer": ("engagement", draw_scorer),
    "preference": ("preference", draw_preference),
    "quality": ("quality", draw_quality),
    "user_sensitivity": ("user_sensitivity", draw_sensitivity),
    "training": ("training_curves", draw_training),
}


def draw_all(report: Report, directory: Path) -> dict[str, str]:
    """Write <directory>/<name>.png for every part that the report has; return the themed SVG of each."""
    directory.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for name, (part, draw) in DRAWINGS.items():
        figure = draw(report) if report.get(part) else None
        if figure is not None:
            with atomic_file(directory / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=160)
            figure.set_layout_engine("none")  # laid out already: once is enough
            svgs[name] = themed_svg(figure, name)
    return svgs


def themed_svg(figure: "Figure", name: str) -> str:
    """Inline SVG: text stays text, drawn colours become the page's CSS variables, width follows the page."""
    import matplotlib

    out = io.StringIO()
    # The salt keeps the ids of two figures on one page apart, and the output the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var({variable})")
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
