"""The plots of the evaluation's report."""

from typing import TYPE_CHECKING, Any

from eval.figure import (
    DASHED,
    GRID,
    INK,
    SERIES_COLORS,
    SOFT,
    Drawing,
    Report,
    draw_estimates,
    draw_reference,
    draw_rows,
    new_figure,
    plain,
    plot_label,
    system_colors,
)
from eval.number_text import telling_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NGRAM_LABELS = {
    "unigram": "unigram",
    "bigram_add_one": "bigram, add-one",
    "bigram_kneser_ney": "bigram, Kneser-Ney",
}
BASELINE_LABELS = {
    "length": "length only",
    "turn_number": "turn number only",
    "length_and_turn_number": "length and turn",
}


def draw_loss(report: Report) -> "Figure":
    """Held-out loss of count models and of every model."""
    part, colors = report["perplexity"], system_colors(report)
    rows = [(label, plain(part["ngrams"][name]), SOFT) for name, label in NGRAM_LABELS.items()]
    rows += [(plot_label(name), figures["loss"], colors[name]) for name, figures in part["models"].items()]
    figure, (ax,) = new_figure(8.6, 0.7 + 0.34 * len(rows))
    digits = telling_digits((estimate["value"] for _, estimate, _ in rows), 2)
    for y, (_, estimate, _) in enumerate(rows):
        ax.annotate(
            f"{estimate['value']:.{digits}f}", (estimate["value"], y), xytext=(0, 7), textcoords="offset points",
            fontsize=8.5, color=INK, ha="center",
        )  # fmt: skip
    draw_rows(ax, rows)
    ax.margins(x=0.08)
    ax.set(xlabel="nats a token (lower is better)")
    return figure


def draw_turns(report: Report) -> "Figure":
    """Loss by turn, on the character's text and on the partner's."""
    figure, axes = new_figure(8.6, 3.0, 2)
    colors = system_colors(report)
    for ax, side in zip(axes, ("character", "partner"), strict=True):
        for name, figures in report["perplexity"]["models"].items():
            bins = [b for b in figures["by_turn"] if b[side]["value"] is not None]
            ax.plot([b[side]["value"] for b in bins], "-o", color=colors[name], label=plot_label(name))
            banded = [i for i, b in enumerate(bins) if b[side]["low"] is not None]
            low, high = ([bins[i][side][end] for i in banded] for end in ("low", "high"))
            ax.fill_between(banded, low, high, color=colors[name], alpha=0.14, linewidth=0)
            ax.set_xticks(range(len(bins)), [b["turns"] for b in bins])
        ax.set(title=f"The {side}'s text", xlabel="number of the message")
    axes[0].set(ylabel="nats a token")
    _share_limits(axes, "y")
    axes[1].legend()
    return figure


def draw_ranking(report: Report) -> "Figure":
    """Recall@1 by model and by score, with chance."""
    part, colors = report["ranking"], system_colors(report)
    labels = {"mean_logprob": "mean log-probability", "sum_logprob": "summed", "context_gain": "gain from context"}
    figure, axes = new_figure(8.6, 0.9 + 0.34 * len(part["models"]), 3)
    for ax, (score, label) in zip(axes, labels.items(), strict=True):
        rows = [
            (plot_label(name), figures[score]["recall_at_1"], colors[name]) for name, figures in part["models"].items()
        ]
        draw_rows(ax, rows, headroom=1.0, is_labeled=ax is axes[0])
        draw_reference(ax, part["chance"]["recall_at_1"], "chance")
        ax.set(title=label, xlabel="recall@1")
    _share_limits(axes, "x")
    for ax in axes:
        ax.set_xlim(left=0)
    return figure


def draw_scorer(report: Report) -> "Figure | None":
    """ROC curve, calibration, and the scorer's AUC beside the text-free baselines."""
    part = report["engagement"]
    if part["roc"] is None or part["calibration"] is None:
        return None
    figure, (roc, calibration, auc) = new_figure(9.6, 3.1, 3)
    color = SERIES_COLORS[1]
    for ax in (roc, calibration):
        ax.plot([0, 1], [0, 1], **DASHED)
        ax.set_aspect("equal")
    roc.plot(part["roc"]["false_positive_rate"], part["roc"]["true_positive_rate"], color=color)
    roc.set(title="ROC", xlabel="false positives", ylabel="true positives")
    bins = part["calibration"]["bins"]
    predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    draw_estimates(calibration, predicted, observed, color)
    ends = [*predicted, *(o[end] for o in observed for end in ("low", "high"))]
    limits = (min(ends) - 0.04, max(ends) + 0.04)
    calibration.set(title="Calibration", xlabel="predicted", ylabel="observed", xlim=limits, ylim=limits)
    baselines = [(BASELINE_LABELS[name], figures["auc"], SOFT) for name, figures in part["baselines"].items()]
    draw_rows(auc, [("scorer", part["auc"], color), *baselines])
    draw_reference(auc, 0.5, "")
    auc.set(title="AUC", xlabel="0.5 is chance")
    return figure


def draw_preference(report: Report) -> "Figure":
    """Forest plot of win rates."""
    part, colors = report["preference"], system_colors(report)
    (model, color), (against, other_color) = (
        (plot_label(part[side]), colors[part[side]]) for side in ("model", "against")
    )
    threshold = part["over_optimisation_threshold"]
    rows = [
        (f"{model} over {against}", part["win_rate"], color),
        ("  pairs of similar length", part["win_rate_length_matched"], color),
        (f"{model} over human", part["win_rate_against_human"], color),
        (f"{against} over human", part["other_win_rate_against_human"], other_color),
        ("longer reply over shorter", part["longer_reply_wins"], SOFT),
    ]
    figure, (ax,) = new_figure(8.6, 2.7)
    draw_rows(ax, rows, headroom=1.1)
    ax.axvspan(threshold, 2, color=GRID, alpha=0.55, linewidth=0)
    draw_reference(ax, 0.5, "no difference")
    draw_reference(ax, threshold, "suspect")
    ends = [e[k] for _, e, _ in rows for k in ("value", "low", "high") if e[k] is not None]
    limits = (min([0.3, *ends]) - 0.03, max([0.72, *ends]) + 0.03)
    ax.set(title="The scorer prefers", xlabel="win rate", xlim=limits)
    return figure


def draw_quality(report: Report) -> "Figure":
    """Length distribution, and three shares side by side."""
    systems, colors = report["quality"]["systems"], system_colors(report)
    figure, axes = new_figure(9.6, 2.9, 4)
    longest = 10
    for name, figures in systems.items():
        lengths = sorted(figures["lengths"])
        if lengths:
            shares = [(i + 1) / len(lengths) for i in range(len(lengths))]
            axes[0].step(lengths, shares, where="post", color=colors[name], label=plot_label(name))
            longest = max(longest, lengths[int(0.98 * (len(lengths) - 1))])
    axes[0].set(title="Reply length", xlabel="words", ylabel="share at most this long", xlim=(0, longest))
    axes[0].legend(loc="lower right")
    shown = {"distinct_2": "Distinct bigrams", "repetition": "Repeats itself", "stop_rate": "Ends by itself"}
    for ax, (key, title) in zip(axes[1:], shown.items(), strict=True):
        rows = [(plot_label(name), figures[key], colors[name]) for name, figures in systems.items()]
        draw_rows(ax, rows, is_labeled=ax is axes[1])
        ax.margins(x=0.12)
        ax.locator_params(axis="x", nbins=4)
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        ax.set(title=title)
    return figure


def draw_sensitivity(report: Report) -> "Figure":
    """How much a replaced message moves the next token, by its distance from the reply."""
    part, colors = report["user_sensitivity"]["models"], system_colors(report)
    figure, axes = new_figure(8.6, 2.8, len(part))
    for ax, (name, figures) in zip(axes, part.items(), strict=True):
        for side, marker, color in (("user", "-o", colors[name]), ("character", "--s", SOFT)):
            draw_estimates(ax, range(1, 5), figures[side]["by_distance"], color, marker, label=f"{side}'s message")
        ax.set(title=plot_label(name), xlabel="messages back from the reply", xticks=range(1, 5))
    axes[0].set(ylabel="KL, nats")
    _share_limits(axes, "y")
    for ax in axes:
        ax.set_ylim(bottom=0)
    axes[-1].legend()
    return figure


def draw_training(report: Report) -> "Figure":
    """Training and held-out loss of each stage that kept its metrics."""
    curves = report["training_curves"]
    figure, axes = new_figure(min(9.6, 3.2 * len(curves)), 2.7, len(curves))
    for number, (ax, (stage, curve)) in enumerate(zip(axes, curves.items(), strict=True)):
        color = SERIES_COLORS[number % len(SERIES_COLORS)]
        ax.plot(curve["step"], curve["loss"], color=color, linewidth=1.1, label="training")
        if curve["heldout_step"]:
            held: dict[str, Any] = {"color": INK, "markersize": 3.5, "linewidth": 1.4}
            ax.plot(curve["heldout_step"], curve["heldout_loss"], "o-", label="held-out", **held)
            ax.legend()
        ax.set(title=plot_label(stage), xlabel="step")
    axes[0].set(ylabel="loss")
    return figure


def _share_limits(axes: "list[Axes]", axis: Any) -> None:
    limits = [ax.get_xlim() if axis == "x" else ax.get_ylim() for ax in axes]
    shared = min(low for low, _ in limits), max(high for _, high in limits)
    for ax in axes:
        ax.set(**{f"{axis}lim": shared})


DRAWINGS: dict[str, Drawing] = {
    "loss": ("perplexity", draw_loss),
    "loss_by_turn": ("perplexity", draw_turns),
    "ranking": ("ranking", draw_ranking),
    "scorer": ("engagement", draw_scorer),
    "preference": ("preference", draw_preference),
    "quality": ("quality", draw_quality),
    "user_sensitivity": ("user_sensitivity", draw_sensitivity),
    "training": ("training_curves", draw_training),
}
