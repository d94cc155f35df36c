"""report.json, and report.html as one file without external resources."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.format.visible_text import says_nothing
from eval.figure import HUMAN, THEME, draw_all, system_colors
from eval.number_text import (
    estimate_digits,
    interval_text,
    number_text,
    p_value_text,
    signed_text,
    telling_digits,
)
from eval.plots import DRAWINGS
from recipes.files import write_text
from recipes.json_text import json_text

SCHEMA_VERSION = 2
TEMPLATE = "report.html.j2"

Json = Any


def to_json(value: Any) -> Json:
    """Plain JSON values: dataclasses become objects, numpy numbers become numbers; NaN and infinity are a bug."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    assert not isinstance(value, float) or math.isfinite(value), f"{value} in a report"
    return value


def write_report(run_dir: str | Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """Write plots/*.png, report.json and report.html under `run_dir`, each file atomically."""
    directory = Path(run_dir)
    content = to_json({"schema_version": SCHEMA_VERSION, **report})
    svgs = draw_all(DRAWINGS, content, directory / "plots")
    paths = {"json": directory / "report.json", "html": directory / "report.html"}
    write_text(paths["json"], json_text(content, indent=1) + "\n")
    write_text(paths["html"], render_html(content, svgs))
    return paths


def render_html(report: Mapping[str, Any], svgs: Mapping[str, str]) -> str:
    """The page for a report of `SCHEMA_VERSION`; all text of the report is escaped."""
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
    environment.tests["visible"] = lambda text: not says_nothing(text)
    # only our own figures are marked as markup
    plots = {name: Markup(svg) for name, svg in svgs.items()}
    colors = {name: f"var({THEME[color]})" for name, color in system_colors(report).items()}
    template = environment.get_template(TEMPLATE)
    return template.render(report=report, plots=plots, cards=summary_cards(report), colors=colors)


def _card(
    title: str, estimate: Mapping[str, Any], bar: float | None, note: str, verdict: str, percent: bool = False
) -> dict[str, str]:
    """A card. `note` may hold `{bar}`, the value that the estimate is compared with; decimals show how they differ."""
    least = 1 if percent else 2
    digits = max(estimate_digits(estimate, least, percent), telling_digits((estimate["value"], bar), least, percent))
    return {
        "title": title,
        "value": number_text(estimate["value"], digits, percent),
        "interval": interval_text(estimate, digits, percent),
        "note": note.replace("{bar}", number_text(bar, digits, percent)),
        "verdict": verdict,
        "tag": {"good": "clears the bar", "bad": "misses the bar", "open": "undecided"}[verdict],
    }


def _verdict(good: bool, bad: bool) -> str:
    return "good" if good else "bad" if bad else "open"


def times_to_decide(estimate: Mapping[str, Any], bar: float) -> float | None:
    """How many times as many conversations would exclude `bar` from the interval, if the value does not change.

    An interval shrinks with the square root of the number of conversations. None without an interval, if `bar` is
    already outside the interval, and if it is equal to the value.
    """
    low, value, high = estimate["low"], estimate["value"], estimate["high"]
    if low is None or value == bar or not low <= bar <= high:
        return None
    towards_bar = high - value if bar > value else value - low
    return float((towards_bar / (bar - value)) ** 2)


def _compared(note: str, estimate: Mapping[str, Any], bar: float) -> tuple[str, str]:
    """The note of a card and its verdict, for a figure that should be above `bar`."""
    times = times_to_decide(estimate, bar)
    if times is not None:
        note += (
            f" · {times:.1f} times as many conversations would decide" if times < 20 else " · too close to tell apart"
        )
    has_interval = estimate["low"] is not None
    return note, _verdict(has_interval and estimate["low"] > bar, has_interval and estimate["high"] < bar)


def summary_cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The cards at the top: value, interval, what it is compared with, and the verdict."""
    cards = (
        ("perplexity", _loss_card), ("ranking", _ranking_card), ("engagement", _scorer_card),
        ("preference", _win_card), ("quality", _stop_card), ("quality", _distinct_card),
    )  # fmt: skip
    made = [make(report[part]) for part, make in cards if report.get(part)]
    return [card for card in made if card is not None]


def _loss_card(part: Mapping[str, Any]) -> dict[str, str]:
    name, figures = next(iter(part["models"].items()))
    loss, bar = figures["loss"], part["ngrams"]["bigram_kneser_ney"]
    verdict = "open" if loss["low"] is None else _verdict(loss["high"] < bar, loss["low"] > bar)
    return _card(f"Held-out loss, {name}", loss, bar, "nats a token · Kneser-Ney bigram {bar}", verdict)


def _ranking_card(part: Mapping[str, Any]) -> dict[str, str]:
    name = list(part["models"])[-1]
    # MRR uses every rank, not only the first; the gain from context gives common replies no advantage
    mrr, chance = part["models"][name]["context_gain"]["mrr"], part["chance"]["mrr"]
    note = f"of the real reply among {part['n_candidates']}, by gain from context · chance {{bar}}"
    return _card(f"Mean reciprocal rank, {name}", mrr, chance, *_compared(note, mrr, chance))


def _scorer_card(part: Mapping[str, Any]) -> dict[str, str]:
    auc, baselines = part["auc"], part["baselines"]
    if auc["value"] is None or not baselines:
        return _card("Scorer AUC", auc, None, auc["note"] or "no baseline", "open")
    best = max(baselines.values(), key=lambda b: b["auc"]["value"])
    difference = best["scorer_minus_baseline"]
    return _card("Scorer AUC", auc, best["auc"]["value"], *_compared("best text-free baseline {bar}", difference, 0))


def _win_card(part: Mapping[str, Any]) -> dict[str, str]:
    title, rate = f"{part['model']} over {part['against']}, win rate", part["win_rate"]
    if part["over_optimisation_suspected"]:
        card = _card(title, rate, None, "whole interval above 65%: over-optimized?", "bad", percent=True)
        return card | {"tag": "look twice"}
    return _card(title, rate, 0.5, *_compared("by the scorer · 50% is no difference", rate, 0.5), percent=True)


def _last_system(part: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return [(name, figures) for name, figures in part["systems"].items() if name != HUMAN][-1]


def _stop_card(part: Mapping[str, Any]) -> dict[str, str]:
    name, figures = _last_system(part)
    rate = figures["stop_rate"]
    note = "the rest is cut at the token limit · 95% expected"
    return _card(f"Replies that end, {name}", rate, 0.95, *_compared(note, rate, 0.95), percent=True)


def _distinct_card(part: Mapping[str, Any]) -> dict[str, str] | None:
    name, figures = _last_system(part)
    distinct, bar = figures["distinct_2"], part["systems"][HUMAN]["distinct_2"]
    if distinct["value"] is None or bar["value"] is None:
        return None
    # both directions count: repetitive replies have fewer distinct bigrams than humans, random ones more
    low, high = 0.9 * bar["value"], 1.1 * bar["value"]
    card = _card(f"Distinct bigrams, {name}", distinct, bar["value"], "humans {bar} on as many words", "open")
    if distinct["low"] is None:
        return card
    if low <= distinct["low"] and distinct["high"] <= high:
        return card | {"tag": "near humans"}
    return card | {"tag": "unlike humans"} if distinct["high"] < low or distinct["low"] > high else card
