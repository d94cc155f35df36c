"""report.json for machines and report.html for people: one file that opens from disk and loads nothing."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.digits import estimate_digits, telling_digits
from eval.plots import MODEL_COLOURS, draw_all, series_colours
from eval.statistics import Estimate
from recipes.files import write_text
from recipes.json_text import json_text

SCHEMA_VERSION = 2
TEMPLATE = "report.html.j2"

Json = Any


def to_json(value: Any) -> Json:
    """Plain JSON values: estimates become objects, numpy numbers become numbers; NaN and infinity are a bug."""
    if isinstance(value, Estimate):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    assert not isinstance(value, float) or math.isfinite(value), f"{value} is no number for a report"
    return value


def write_report(run_dir: str | Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """Write plots/*.png, report.json and report.html under `run_dir`; each file appears whole or not at all."""
    directory = Path(run_dir)
    content = to_json({"schema_version": SCHEMA_VERSION, **report})
    svgs = draw_all(content, directory / "plots")
    paths = {"json": directory / "report.json", "html": directory / "report.html"}
    write_text(paths["json"], json_text(content, indent=1) + "\n")
    write_text(paths["html"], render_html(content, svgs))
    return paths


def render_html(report: Mapping[str, Any], svgs: Mapping[str, str]) -> str:
    """The page for a report of `SCHEMA_VERSION`; every text that is not ours is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": number_text,
        "interval": interval_text,
        "digits": estimate_digits,
        "telling": telling_digits,
        "signed": signed_text,
        "p": p_value_text,
        "thousands": lambda n: f"{n:,}",
    }
    # Only figures that we drew are marked as markup.
    plots = {name: Markup(svg) for name, svg in svgs.items()}
    colours = {name: _colour_variable(number) for number, name in enumerate(series_colours(list(report["models"])))}
    colours["human"] = "var(--human)"
    template = environment.get_template(TEMPLATE)
    return template.render(report=report, plots=plots, cards=summary_cards(report), colours=colours)


def _colour_variable(number: int) -> str:
    return f"var(--series-{number % len(MODEL_COLOURS)})"


def number_text(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """`0.31`, `31.0%`, or an en dash for what is undefined."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f}" if percent else f"{value:.{digits}f}"
    is_zero = float(text) == 0
    text = text.removeprefix("-") if is_zero else text.replace("-", "−")
    return text + "%" if percent else text


def signed_text(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """Like `number_text`, with its sign and a true minus."""
    if value is None:
        return "–"
    sign = "−" if value < 0 else "+"
    return sign + number_text(abs(value), digits, percent)


def interval_text(estimate: Mapping[str, Any], digits: int = 2, percent: bool = False) -> str:
    """`[0.24, 0.39]`, or nothing where there is no interval."""
    if estimate["low"] is None:
        return ""
    scale = 100 if percent else 1
    return f"[{number_text(scale * estimate['low'], digits)}, {number_text(scale * estimate['high'], digits)}]"


def p_value_text(value: float | None) -> str:
    """`p = 0.032`, `p < 0.001`."""
    if value is None:
        return "p undefined"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _card(
    title: str, estimate: Mapping[str, Any], note: str, verdict: str, digits: int = 2, percent: bool = False
) -> dict[str, str]:
    digits = estimate_digits(estimate, digits, percent)
    return {
        "title": title,
        "value": number_text(estimate["value"], digits, percent),
        "interval": interval_text(estimate, digits, percent),
        "note": note,
        "verdict": verdict,
        "tag": {"good": "clears the bar", "bad": "misses the bar", "open": "undecided"}[verdict],
    }


def _verdict(good: bool, bad: bool) -> str:
    return "good" if good else "bad" if bad else "open"


def times_to_decide(estimate: Mapping[str, Any], bar: float) -> float | None:
    """How many times as many conversations would exclude `bar` from the interval, if the value stays what it is.

    An interval shrinks with the square root of the number of conversations. None where there is no interval, where the
    bar lies outside it already, and where the value is the bar.
    """
    low, value, high = estimate["low"], estimate["value"], estimate["high"]
    if low is None or value == bar or not low <= bar <= high:
        return None
    towards_bar = high - value if bar > value else value - low
    return float((towards_bar / (bar - value)) ** 2)


def _above(estimate: Mapping[str, Any], bar: float) -> str:
    """Good when the whole interval is above the bar, bad when it is below, open when the bar lies inside."""
    if estimate["low"] is None:
        return "open"
    return _verdict(estimate["low"] > bar, estimate["high"] < bar)


def _compared(note: str, estimate: Mapping[str, Any], bar: float) -> tuple[str, str]:
    """The note of a card and its verdict for a figure that should be above the bar."""
    times = times_to_decide(estimate, bar)
    if times is not None:
        note += (
            f" · {times:.1f} times as many conversations would decide" if times < 20 else " · too close to tell apart"
        )
    return note, _above(estimate, bar)


def summary_cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: value, interval, what it is measured against, and whether it clears that bar."""
    return [card for make in (_loss_card, _ranking_card, _scorer_card, _win_card, _stop_card, _echo_card)
            if (card := make(report)) is not None]  # fmt: skip


def _loss_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    part = report.get("perplexity")
    if not part:
        return None
    name, figures = next(iter(part["models"].items()))
    bar = part["ngrams"]["bigram_kneser_ney"]
    loss = figures["loss"]
    verdict = "open" if loss["low"] is None else _verdict(loss["high"] < bar, loss["low"] > bar)
    return _card(f"Held-out loss, {name}", loss, f"nats a token · Kneser-Ney bigram {bar:.2f}", verdict)


def _ranking_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    part = report.get("ranking")
    if not part:
        return None
    name = list(part["models"])[-1]
    # the rank says more of each context than whether it is the first, and the gain leaves common replies no advantage
    mrr, chance = part["models"][name]["context_gain"]["mrr"], part["chance"]["mrr"]
    note = f"of the real reply among {part['n_candidates']}, by gain from context · chance {chance:.2f}"
    return _card(f"Mean reciprocal rank, {name}", mrr, *_compared(note, mrr, chance))


def _scorer_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    part = report.get("engagement")
    if not part:
        return None
    auc, baselines = part["auc"], part["baselines"]
    if auc["value"] is None or not baselines:
        return _card("Scorer AUC", auc, auc["note"] or "no baseline", "open")
    best = max(baselines.values(), key=lambda b: b["auc"]["value"])
    note = f"best text-free baseline {best['auc']['value']:.2f}"
    return _card("Scorer AUC", auc, *_compared(note, best["scorer_minus_baseline"], 0))


def _win_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    part = report.get("preference")
    if not part:
        return None
    title, rate = f"{part['model']} over {part['against']}, win rate", part["win_rate"]
    if part["over_optimisation_suspected"]:
        card = _card(title, rate, "all of it above 65%: over-optimised?", "bad", digits=1, percent=True)
        return card | {"tag": "look twice"}
    return _card(title, rate, *_compared("by the scorer · 50% is no difference", rate, 0.5), digits=1, percent=True)


def _last_system(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], Mapping[str, Any]] | None:
    part = report.get("quality")
    if not part:
        return None
    systems = part["systems"]
    name = [system for system in systems if system != "human"][-1]
    return name, systems[name], systems["human"]


def _stop_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    found = _last_system(report)
    if found is None:
        return None
    name, figures, _ = found
    rate = figures["stop_rate"]
    note = "the rest is cut at the token limit · 95% expected"
    return _card(f"Replies that end, {name}", rate, *_compared(note, rate, 0.95), digits=1, percent=True)


def _echo_card(report: Mapping[str, Any]) -> dict[str, str] | None:
    found = _last_system(report)
    if found is None:
        return None
    name, figures, human = found
    distinct, bar = figures["distinct_2"], human["distinct_2"]
    if distinct["value"] is None or bar["value"] is None:
        return None
    # Neither dull nor random: noise has more distinct bigrams than people do.
    low, high = 0.9 * bar["value"], 1.1 * bar["value"]
    card = _card(f"Distinct bigrams, {name}", distinct, f"humans {bar['value']:.2f} on as many words", "open")
    if distinct["low"] is None:
        return card
    if low <= distinct["low"] and distinct["high"] <= high:
        return card | {"tag": "near humans"}
    return card | {"tag": "unlike humans"} if distinct["high"] < low or distinct["low"] > high else card
