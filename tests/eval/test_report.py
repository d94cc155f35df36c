"""Tests of eval/report.py, eval/plots.py and eval/number_text.py on a report of random numbers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.format.dialogue import Message
from eval.context import Reply, ReplyContext
from eval.figure import THEME
from eval.number_text import (
    estimate_digits,
    estimate_text,
    interval_text,
    number_text,
    p_value_text,
    signed_text,
    telling_digits,
)
from eval.parts.dialogue_quality import summarize_quality
from eval.parts.engagement import LabeledTurns, summarize_scorer
from eval.parts.perplexity import ScoredTargets, paired_difference, summarize
from eval.parts.preference import summarize_preference
from eval.parts.ranking import SCORES, RankingTask, chance_figures, length_only_scores, rank_figures
from eval.parts.user_sensitivity import summarize_changes
from eval.plots import DRAWINGS, draw_scorer
from eval.report import render_html, summary_cards, times_to_decide, to_json, write_report
from eval.statistics import Bootstrap, Estimate

BOOTSTRAP = Bootstrap(n_resamples=100)
HOSTILE = "<script>alert(1)</script> & {{ 7 * 7 }} <|end|>"
WORDS = ["hi", "how", "are", "you", "doing", "today", "i", "am", "fine", "thanks", "music", "and", "walks", "yes", "no"]


CHAT_PAGE = Path(__file__).parents[2] / "serving_export" / "server" / "chat_page.html"


def random_targets(rng: np.random.Generator, level: float) -> ScoredTargets:
    documents = np.repeat(np.arange(40), 60)
    turn_N = np.tile(np.repeat(np.arange(1, 21), 3), 40)
    role_N = np.tile(np.array([2, 0, 1] * 20), 40)
    nats_N = rng.gamma(2, level / 2, documents.size) * (1.2 - 0.1 * np.log(turn_N))
    context_N = np.tile(np.arange(1, 61), 40)
    return ScoredTargets(
        nats_N, role_N, turn_N, documents, context_N, np.full(40, 200), np.full(40, 190), np.arange(40)
    )


def random_replies(rng: np.random.Generator, n: int, length: float) -> list[Reply]:
    replies = []
    for _ in range(n):
        size = 1 + rng.poisson(length)
        replies.append(Reply(" ".join(rng.choice(WORDS, size)), tuple(range(size + 1)), bool(rng.random() < 0.95)))
    return replies


def random_scorer(rng: np.random.Generator, one_class: bool = False) -> dict[str, Any]:
    n = 400
    length_N, turn_N = rng.integers(2, 30, n), np.tile(np.arange(1, 11), 40)
    probability_N = 1 / (1 + np.exp(-(rng.normal(1.0, 0.8, n) + 0.05 * length_N - 0.1 * turn_N)))
    label_N = np.ones(n, np.int64) if one_class else (rng.random(n) < probability_N).astype(np.int64)
    turns = LabeledTurns(label_N, length_N, turn_N, np.repeat(np.arange(40), 10), np.arange(n))
    train_label_N = np.resize(label_N, n)
    train = LabeledTurns(train_label_N, length_N, turn_N, np.repeat(np.arange(40), 10), np.arange(n))
    return summarize_scorer(turns, np.log(probability_N / (1 - probability_N)), train, BOOTSTRAP)


def random_ranking(rng: np.random.Generator) -> dict[str, Any]:
    tasks = [RankingTask(str(i), (1,), (1,), tuple((1,) * k for k in rng.integers(1, 9, 10)), i) for i in range(80)]
    models = {
        name: {
            s: rank_figures([rng.normal(0, 1, 10) + np.eye(10)[0] * gain for _ in tasks], BOOTSTRAP, np.arange(80))
            for s in SCORES
        }
        for name, gain in (("pretrain", 0.4), ("sft", 0.8), ("dpo", 0.7))
    }
    length_only = {
        name: rank_figures(length_only_scores(tasks, sign), BOOTSTRAP, np.arange(80))
        for name, sign in (("shortest_first", -1), ("longest_first", 1))
    }
    return {"n_contexts": 80, "n_candidates": 10, "distractors": "length_matched", "chance": chance_figures(10),
            "length_only": length_only, "models": models}  # fmt: skip


def random_preference(rng: np.random.Generator, systems: dict[str, list[Reply]]) -> dict[str, Any]:
    scores = {name: rng.normal(mean, 1, 80) for name, mean in (("dpo", 0.3), ("sft", 0.0), ("human", 0.5))}
    part = summarize_preference(
        scores["dpo"],
        scores["sft"],
        scores["human"],
        systems["dpo"],
        systems["sft"],
        np.arange(80),
        BOOTSTRAP,
    )
    drift = {
        "nats_per_reply": BOOTSTRAP.mean(rng.normal(0.4, 1, 80)),
        "nats_per_token": BOOTSTRAP.mean(rng.normal(0.03, 1, 80)),
    }
    return {"model": "dpo", "against": "sft", "drift": {"on_model": drift, "on_against": drift, "is_kl": True}, **part}


def random_report(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    contexts = [
        ReplyContext(str(i), (Message("Sam", "hi how are you doing today", None),), "Alex", "fine", 3, (1,), (1, 4), i)
        for i in range(80)
    ]
    systems = {name: random_replies(rng, 80, mean) for name, mean in (("sft", 7), ("dpo", 9), ("human", 8))}
    scored = {name: random_targets(rng, level) for name, level in (("pretrain", 3.9), ("sft", 3.8), ("dpo", 3.82))}
    changes = [(i, d, "user" if d % 2 else "character", (1,)) for i in range(60) for d in range(1, 5)]
    kl_N = rng.gamma(2, 0.2, len(changes)) / np.tile(np.arange(1, 5), 60)
    samples = [
        {
            "character": "Alex",
            "n_opening": 0,
            "n_earlier": i,
            "context": [{"speaker": "Sam", "text": HOSTILE if i == 0 else "what do you do on rainy days?"},
                        {"speaker": "Alex", "text": "mostly i read"}, {"speaker": "Sam", "text": "which one?"}],
            "replies": [
                {"system": name, "text": replies[i].text, "finished": replies[i].finished, "probability": 0.7}
                for name, replies in systems.items()
            ],
        }
        for i in range(7)
    ]  # fmt: skip
    steps = list(range(1, 400, 4))
    curve = {"step": steps, "loss": [3.6 + 4 * float(np.exp(-s / 90)) + 0.05 * float(rng.normal()) for s in steps],
             "heldout_step": [100, 200, 300], "heldout_loss": [5.0, 4.2, 3.95]}  # fmt: skip
    difference = paired_difference(scored["sft"], scored["pretrain"], scored["sft"].role_N == 0, BOOTSTRAP)
    sensitivity = summarize_changes(changes, kl_N, np.arange(60), BOOTSTRAP)
    return {
        "title": "Dramatis evaluation: demo",
        "created": "2026-11-23",
        "seed": 7,
        "confidence_level": 0.95,
        "precision": "float32, CPU",
        "bootstrap": {"n_resamples": 100},
        "models": {
            name: {"run_dir": f"runs/demo/{name}", "n_parameters": 3_077_184, "key_figure": "held-out 3.91 nats"}
            for name in ("pretrain", "sft", "dpo")
        },
        "scorer": {"run_dir": "runs/demo/engagement", "n_parameters": 3_077_184, "key_figure": "AUC 0.66"},
        "data": {"run_dir": "runs/demo/data", "n_dialogues": 812, "fingerprint": "3f" * 32},
        "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48},
        "perplexity": {
            "n_targets": 2400,
            "n_dialogues": 40,
            "ngrams": {"unigram": 6.02, "bigram_add_one": 5.31, "bigram_kneser_ney": 4.25},
            "models": {name: summarize(targets, BOOTSTRAP) for name, targets in scored.items()},
            "differences": [{"model": "sft", "against": "pretrain", "character": difference}],
        },
        "ranking": random_ranking(rng),
        "engagement": random_scorer(rng),
        "preference": random_preference(rng, systems),
        "quality": {"n_contexts": 80, "systems": summarize_quality(contexts, systems, BOOTSTRAP)},
        "user_sensitivity": {"n_contexts": 60, "models": dict.fromkeys(("sft", "dpo"), sensitivity)},
        "samples": samples,
        "training_curves": {"pretrain": curve, "sft": curve | {"heldout_step": [], "heldout_loss": []}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eval")
    write_report(directory, random_report())
    return directory


def test_page_stands_alone(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert not re.search(r"<script|<link|<iframe|@import|src=", html)
    # The only addresses are names of XML vocabularies, which no browser fetches.
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert html.count('<svg class="plot"') == len(DRAWINGS)
    assert not any(colour in html[html.index("<body>") :] for colour in THEME)


def test_ids_are_unique_across_figures(written: Path) -> None:
    html = (written / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_dialogue_text_is_escaped(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{ 7 * 7 }} &lt;|end|&gt;" in html


def test_plots_are_files_too(written: Path) -> None:
    for name in DRAWINGS:
        assert (written / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(written.glob(".*"))


def test_json_holds_every_number_with_interval_and_size(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    assert report["schema_version"] == 2
    rate = report["preference"]["win_rate"]
    assert rate["low"] < rate["value"] < rate["high"] and rate["n"] == 80 and "bootstrap" in rate["method"]
    assert f"{100 * rate['value']:.1f}%" in (written / "report.html").read_text()


def test_report_renders_with_any_part_missing() -> None:
    report = to_json({"schema_version": 1, **random_report()})
    for part in ("perplexity", "ranking", "engagement", "preference", "quality", "user_sensitivity", "samples"):
        assert "Method</h2>" in render_html(report | {part: None}, {})


def test_scorer_with_one_class_says_so(tmp_path: Path) -> None:
    part = to_json(random_scorer(np.random.default_rng(1), one_class=True))
    report = to_json({"schema_version": 1, **random_report()}) | {"engagement": part}
    assert part["auc"]["value"] is None and draw_scorer(report) is None
    assert "only one class is present" in render_html(report, {})


def test_to_json_refuses_nan() -> None:
    assert to_json({"a": np.float64(0.5), "b": (np.int64(3),)}) == {"a": 0.5, "b": [3]}
    with pytest.raises(AssertionError):
        to_json({"a": float("nan")})


def test_number_texts() -> None:
    estimate = to_json(Estimate(0.562, 0.521, 0.603, 10, 10, "x"))
    assert number_text(0.562, 1, True) == "56.2%" and number_text(None) == "–"
    assert interval_text(estimate, 1, True) == "[52.1, 60.3]"
    assert estimate_text(estimate, 1, True) == "56.2% [52.1, 60.3]"
    assert estimate_text({"value": 0.0004, "low": None, "high": None}, 2, is_signed=True) == "+0.0004"
    assert signed_text(-0.25) == "−0.25" and signed_text(0.25) == "+0.25"
    assert p_value_text(0.0001) == "p < 0.001" and p_value_text(0.0319) == "p = 0.032"


def test_figures_show_what_differs() -> None:
    assert telling_digits([0.961, 0.9614, None, 0.961], 0, percent=True) == 2
    assert telling_digits([0.5], 0) == 0 and telling_digits([0.1, 0.1 + 1e-12], 2) == 6
    tiny = {"value": 0.00031, "low": 0.00028, "high": 0.00035}
    assert estimate_digits(tiny, 3) == 5
    assert interval_text(tiny, estimate_digits(tiny, 3)) == "[0.00028, 0.00035]"
    assert estimate_digits({"value": 0.0, "low": 0.0, "high": 0.03}, 2) == 2
    assert estimate_digits({"value": 0.0, "low": -0.0003, "high": 0.0004}, 2) == 4


def test_samples_end_in_an_ellipsis_and_the_character_is_on_the_left() -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["samples"][1]["replies"][0] |= {"text": "and then", "finished": False, "probability": 0.9612}
    report["samples"][1]["replies"][1] |= {"probability": 0.9634}
    html = render_html(report, {})
    n_cut = sum(not reply["finished"] for sample in report["samples"] for reply in sample["replies"])
    assert html.count("…</span>") == n_cut > 0
    assert "and then…</span><span" in html and "… 1 earlier message not shown" in html
    assert "96.1%" in html and "96.3%" in html
    own = re.search(r'<div class="bubble ([a-z]*)"><span class="who"><bdi>Alex', html)
    other = re.search(r'<div class="bubble ([a-z]*)"><span class="who"><bdi>Sam', html)
    assert own and other and (own[1], other[1]) == ("own", "other")
    page = CHAT_PAGE.read_text()
    assert ".bubble.other { align-self: flex-end" in html and ".turn.mine { align-self: flex-end" in page
    assert 'turn.className = "turn" + (role === "user" ? " mine" : "")' in page


def test_the_note_on_earlier_messages_stands_where_they_are_missing() -> None:
    report = to_json({"schema_version": 2, **random_report()})
    scene = {"speaker": "narrator", "text": "a rainy day"}
    report["samples"] = [report["samples"][3] | {"n_opening": 1, "context": [scene, *report["samples"][3]["context"]]}]
    html = render_html(report, {})
    places = [html.index(text) for text in ("a rainy day", "3 earlier messages not shown", "what do you do on rainy")]
    assert places == sorted(places)


@pytest.mark.parametrize("text", ["", " ", "\u200b\ufeff"])
def test_a_reply_without_visible_text_is_called_empty(text: str) -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["samples"] = report["samples"][:1]
    for reply in report["samples"][0]["replies"]:
        reply |= {"text": text, "finished": True}
    assert render_html(report, {}).count("(empty)") == 3
    report["samples"][0]["replies"][0]["finished"] = False
    assert render_html(report, {}).count("(empty)") == 2


def test_texts_of_the_data_do_not_turn_the_text_beside_them() -> None:
    """A right-to-left text, or a character that forces one, is isolated from the report's own words."""
    report = to_json({"schema_version": 2, **random_report()})
    report["quality"]["systems"]["sft"]["commonest"] = [["\u202eevil", 3]]
    report["samples"][0]["context"][0] |= {"speaker": "\u05e9\u05dc", "text": "\u202etext"}
    html = render_html(report, {})
    assert "“<bdi>\u202eevil</bdi>” (3)" in html
    assert '<bdi>\u05e9\u05dc</bdi></span><span dir="auto">\u202etext</span>' in html


def test_small_differences_do_not_round_to_nothing() -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["perplexity"]["differences"][0]["character"] |= {"value": -0.00021, "low": -0.0003, "high": -0.0001}
    html = render_html(report, {})
    assert "by −0.0002 nats [−0.0003, −0.0001]" in html


def test_a_figure_without_an_interval_has_no_gap_behind_it() -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["preference"]["win_rate"] |= {"value": 0.5, "low": None, "high": None}
    report["preference"]["minimum_detectable_win_rate"] = None
    html = render_html(report, {})
    assert "dpo wins <b>50.0%</b>: " in html and "80% power" not in html


@pytest.mark.parametrize(("loss", "shown"), [(3.4021, "3.402"), (3.1, "3.10")])
def test_a_card_shows_how_its_figure_differs_from_the_bar(loss: float, shown: str) -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["perplexity"]["models"]["pretrain"]["loss"] |= {"value": loss, "low": loss - 0.01, "high": loss + 0.01}
    report["perplexity"]["ngrams"]["bigram_kneser_ney"] = 3.3985
    card = summary_cards(report)[0]
    assert card["value"] == shown
    assert card["note"].endswith("bigram 3.398" if loss > 3.4 else "bigram 3.40")


@pytest.mark.parametrize(
    ("low", "high", "tag"), [(3.2, 3.4, "clears the bar"), (3.4, 3.6, "undecided"), (3.6, 3.8, "misses the bar")]
)
def test_the_verdict_on_the_loss_comes_from_the_interval(low: float, high: float, tag: str) -> None:
    report = to_json(random_report())
    report["perplexity"]["ngrams"]["bigram_kneser_ney"] = 3.5
    report["perplexity"]["models"]["pretrain"]["loss"] |= {"low": low, "value": (low + high) / 2 + 0.01, "high": high}
    assert summary_cards(report)[0]["tag"] == tag


def test_replies_that_end_are_compared_with_19_of_20() -> None:
    report = to_json(random_report())
    report["quality"]["systems"]["dpo"]["stop_rate"] |= {"low": 0.8, "value": 0.85, "high": 0.9}
    (card,) = [card for card in summary_cards(report) if card["title"] == "Replies that end, dpo"]
    assert card["tag"] == "misses the bar"


@pytest.mark.parametrize("suspected", [False, True])
def test_a_win_rate_above_the_threshold_says_look_twice(suspected: bool) -> None:
    report = to_json({"schema_version": 2, **random_report()})
    report["preference"] |= {"over_optimisation_suspected": suspected}
    (card,) = [card for card in summary_cards(report) if card["title"] == "dpo over sft, win rate"]
    assert (card["tag"] == "look twice") == ("over-optimized?" in card["note"]) == suspected
    assert ("The whole interval of this run is in it" in render_html(report, {})) == suspected


def test_the_scorer_is_compared_with_the_best_baseline() -> None:
    report = to_json(random_report())
    values = {"length": (0.55, 0.02), "turn_number": (0.71, -0.01), "length_and_turn_number": (0.6, 0.02)}
    for name, (value, low) in values.items():
        report["engagement"]["baselines"][name]["auc"] |= {"value": value}
        report["engagement"]["baselines"][name]["scorer_minus_baseline"] |= {"low": low, "value": 0.05, "high": 0.1}
    (card,) = [card for card in summary_cards(report) if card["title"] == "Scorer AUC"]
    assert card["note"].startswith("best text-free baseline 0.71") and card["tag"] == "undecided"


def test_any_name_of_a_model_can_be_drawn(tmp_path: Path) -> None:
    """A dollar sign begins no formula, a leading underscore hides no line, a long name leaves room for the plot."""
    names = {"pretrain": "cost $5 {\\frac", "sft": '_sft "b"', "dpo": "x$" * 40, "human": "human"}
    report = to_json(random_report())
    for part in (report, report["perplexity"], report["ranking"], report["user_sensitivity"]):
        part["models"] = {names[name]: figures for name, figures in part["models"].items()}
    report["quality"]["systems"] = {names[name]: value for name, value in report["quality"]["systems"].items()}
    report["preference"] |= {"model": names["dpo"], "against": names["sft"]}
    report["samples"], report["perplexity"]["differences"] = [], []
    report["training_curves"] = {names[name]: curve for name, curve in report["training_curves"].items()}
    paths = write_report(tmp_path, report)
    html = paths["html"].read_text()
    drawn = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", html))
    assert drawn.count("cost $5 {\\frac") >= 4 and drawn.count("_sft") >= 6
    assert "x$" * 13 + "x…" in drawn and "x$" * 14 not in drawn


@pytest.mark.parametrize(
    ("bar", "times"), [(0.2, 4.0), (0.5, 9.0), (0.1, 1.0), (0.05, None), (0.95, None), (0.3, None)]
)
def test_how_many_times_as_many_conversations_would_decide(bar: float, times: float | None) -> None:
    """An interval that is half as wide needs four times as many; on each side of the value its own half counts."""
    found = times_to_decide({"low": 0.1, "value": 0.3, "high": 0.9}, bar)
    assert found == (None if times is None else pytest.approx(times))


def test_a_figure_without_an_interval_decides_nothing() -> None:
    assert times_to_decide({"low": None, "value": 0.3, "high": None}, 0.2) is None


def test_an_undecided_card_says_what_would_decide() -> None:
    report: Any = to_json(random_report())
    name = list(report["models"])[-1]
    report["ranking"]["models"][name]["context_gain"]["mrr"] |= {"low": 0.3, "value": 0.4, "high": 0.5}
    for chance, tag, expected in ((0.35, "undecided", "4.0 times"), (0.25, "clears the bar", None)):
        report["ranking"]["chance"]["mrr"] = chance
        (card,) = [card for card in summary_cards(report) if card["title"] == f"Mean reciprocal rank, {name}"]
        assert card["tag"] == tag
        assert (expected in card["note"]) if expected else ("would decide" not in card["note"])
