"""The rules that make pairs: what each of them says, that both sides answer one context, and caps no order changes."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feedback.conversation import LoggedTurn, Turn, join_turns
from data.feedback.event import read_event
from data.feedback.pairs import (
    Comparison,
    EditOverOriginal,
    KeptOverRegenerated,
    LengthOnly,
    MoreStars,
    PairCounts,
    PairSettings,
    select_pairs,
    to_pair,
)
from data.sources.preferences import BLANK_NEWEST, NO_CONTEXT

MakeLog = Callable[..., Any]
EDIT, STARS = EditOverOriginal(kind="edit_over_original"), MoreStars(kind="more_stars", min_difference=2)
KEPT = KeptOverRegenerated(kind="kept_over_regenerated", wrote_again_within_seconds=50, min_seen_seconds=2)
ANY_KEPT = KeptOverRegenerated(kind="kept_over_regenerated", wrote_again_within_seconds=None)


def turns_of(events: Iterable[dict[str, Any]]) -> list[Turn]:
    lines = (LoggedTurn(read_event(json.dumps(event).encode()), "log", number) for number, event in enumerate(events))
    return [turn for conversation in join_turns(lines).conversations for turn in conversation.turns]


def event(*candidates: str | tuple[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A first turn whose candidates were shown ten seconds apart, the last one kept; the user wrote on soon."""
    shown = [(c, {}) if isinstance(c, str) else c for c in candidates]
    return {
        "conversation": "c", "user": "u", "turn": "t", "after": None, "character": "Mia",
        "messages": [{"speaker": "Tom", "text": "hi", "time": 0}],
        "candidates": [{"text": t, "model": "m", "time": 10 * (i + 1), **more} for i, (t, more) in enumerate(shown)],
        "kept": len(shown) - 1, "wrote_again": 10 * len(shown) + 30, "closed": 1000, **changes,
    }  # fmt: skip


def select(events: Iterable[dict[str, Any]], *rules: Any, **settings: Any) -> tuple[list[Comparison], PairCounts]:
    counts: PairCounts = {}
    found = select_pairs(turns_of(events), PairSettings(rules=rules, **settings), "u", 0, counts)
    for rule in counts.values():
        rule.ledger.balance()
    return found, counts


@pytest.mark.parametrize(
    ("given_event", "rules", "pairs", "excluded"),
    [
        (event("a"), [KEPT], [], {}),
        (event("a", "b", "c"), [KEPT], [("c", "a"), ("c", "b")], {}),
        (event("a", "b", "c", kept=0), [KEPT], [("a", "b"), ("a", "c")], {}),
        (event("a", "b", wrote_again=None), [KEPT], [], {"the user did not write on in time": 1}),
        (event("a", "b", wrote_again=71), [KEPT], [], {"the user did not write on in time": 1}),
        (event("a", "b", wrote_again=70), [KEPT], [("b", "a")], {}),
        (event("a", "b", wrote_again=None), [ANY_KEPT], [("b", "a")], {}),
        (event("a", ("b", {"time": 11.5}), "c"), [KEPT], [("c", "b")], {"swiped away unread": 1}),
        (event("a", "b", "a"), [KEPT], [("a", "b")], {"both replies are the same": 1}),
        (event("a", "a", "b"), [KEPT], [("b", "a")], {"the same pair again": 1}),
        (event("\u200b", "b"), [KEPT], [], {"a blank reply": 1}),
        (event("a"), [EDIT], [], {}),
        (event("a", edit={"text": "A.", "time": 20}), [EDIT], [("A.", "a")], {}),
        (event("a", edit={"text": "a\n", "time": 20}), [EDIT], [], {"both replies are the same": 1}),
        # An edited reply was still kept over the other, as it was shown.
        (event("a", "b", edit={"text": "B.", "time": 30}), [EDIT, KEPT], [("B.", "b"), ("b", "a")], {}),
        (event(("a", {"stars": 4}), ("b", {"stars": 2}), "c"), [STARS], [("a", "b")], {}),
        (event(("a", {"stars": 3}), ("b", {"stars": 2})), [STARS], [], {"fewer than 2 stars between them": 1}),
        (event(("a", {"stars": 3}), ("b", {"stars": 3})), [STARS], [], {}),
        (
            event(("a", {"stars": 5}), ("b", {"stars": 1})), [STARS, KEPT], [],
            {"the same turn has the opposite pair": 2},
        ),
        (event(("a", {"stars": 1}), ("b", {"stars": 5})), [STARS, KEPT], [("b", "a")], {"the same pair again": 1}),
    ],
)  # fmt: skip
def test_rules(
    given_event: dict[str, Any], rules: list[Any], pairs: list[tuple[str, str]], excluded: dict[str, int]
) -> None:
    found, counts = select([given_event], *rules)
    assert [comparison.texts for comparison in found] == pairs
    left_out = sum((Counter(rule.ledger.filtered) for rule in counts.values()), Counter())
    assert left_out == excluded


@pytest.mark.parametrize(
    ("settings", "n_pairs", "reason"),
    [
        ({"max_length_ratio": 3.0}, 1, None),
        ({"max_length_ratio": 2.9}, 0, "over max_length_ratio"),
        ({"max_length_difference": 20}, 1, None),
        ({"max_length_difference": 19}, 0, "over max_length_difference"),
        ({"same_model": True}, 0, "different models"),
    ],
)
def test_filters(settings: dict[str, Any], n_pairs: int, reason: str | None) -> None:
    found, counts = select([event("a" * 10, ("b" * 30, {"model": "n"}))], KEPT, **settings)
    of_rule = counts["kept_over_regenerated"]
    assert len(found) == n_pairs
    assert list(of_rule.ledger.filtered) == ([reason] if reason else [])
    assert of_rule.before_length_filters.longer == (reason != "different models")
    assert of_rule.written.longer == n_pairs


SCENE = {"speaker": "narrator", "text": "A bar", "time": 0}
OWN = {"speaker": "Mia", "text": "hi", "time": 0}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], NO_CONTEXT),
        ([SCENE], NO_CONTEXT),
        ([SCENE, OWN], NO_CONTEXT),
        ([{"speaker": "Tom", "text": " \u200b", "time": 0}], NO_CONTEXT),
        ([{"speaker": "Tom", "text": "hi", "time": 0}, {"speaker": "Tom", "text": "", "time": 0}], BLANK_NEWEST),
        ([{"speaker": "Tom", "text": "hi", "time": 0}, OWN], None),
    ],
)
def test_a_reply_that_answers_nobody_is_counted(messages: list[dict[str, Any]], reason: str | None) -> None:
    found, counts = select([event("a", "b", messages=messages)], KEPT)
    assert counts["kept_over_regenerated"].ledger.filtered == ({reason: 1} if reason else {})
    assert [to_pair(comparison, "p", None).chosen for comparison in found] == ([] if reason else ["b"])


def test_the_context_that_is_written_must_hold_somebody_else() -> None:
    """The character wrote twice: a context of one message would hold its own alone."""
    first = event("a", turn="t1", wrote_again=None)
    events = [first, event(("b", {"time": 20}), ("c", {"time": 30}), turn="t2", after="t1", messages=[])]
    for most, n_pairs in ((None, 1), (2, 1), (1, 0)):
        counts: PairCounts = {}
        found = select_pairs(turns_of(events), PairSettings(rules=(ANY_KEPT,)), "u", 0, counts, most)
        assert len([to_pair(comparison, "p", most) for comparison in found]) == n_pairs
        assert counts["kept_over_regenerated"].ledger.filtered == ({} if n_pairs else {NO_CONTEXT: 1})


def test_an_edit_passes_the_filter_by_model() -> None:
    found, _ = select([event("a", edit={"text": "A.", "time": 20})], EDIT, same_model=True)
    pair = to_pair(found[0], "p", None)
    assert (pair.chosen, pair.rejected, pair.character) == ("A.", "a", "Mia")
    assert [(m.speaker, m.text) for m in pair.messages] == [("Tom", "hi")]
    assert pair.metadata == {
        "rule": "edit_over_original", "user": "p", "chosen_model": None, "rejected_model": "m"
    }  # fmt: skip


def test_an_edit_between_two_candidates_makes_two_contexts() -> None:
    """The reply at t1 was rewritten after the first candidate of t2 was shown and before the second."""
    first = event("a", turn="t1", edit={"text": "A.", "time": 105}, wrote_again=50)
    second = event(("b", {"time": 100}), ("c", {"time": 110}), ("d", {"time": 120}), turn="t2", after="t1")
    second["messages"][0]["time"], second["wrote_again"] = 50, 130
    found, counts = select([first, second], KEPT)
    assert [comparison.texts for comparison in found] == [("d", "c")]
    assert list(counts["kept_over_regenerated"].ledger.filtered) == [
        "an earlier reply was edited between the two: not one context"
    ]
    assert to_pair(found[0], "p", None).messages[1].text == "A."


def every_rule(**settings: Any) -> PairSettings:
    return PairSettings(rules=(ANY_KEPT, STARS, EDIT), **settings)


@given(seed=st.integers(0, 10**6), most=st.none() | st.integers(1, 4))
def test_both_sides_of_a_pair_answer_one_context(make_feedback_log: MakeLog, seed: int, most: int | None) -> None:
    """What the user's own notes say was before each of the two replies is the pair's context, to the letter."""
    log = make_feedback_log(seed, 4)
    by_user: dict[str, list[Turn]] = {}
    for turn in turns_of(log.events):
        by_user.setdefault(turn.event.user, []).append(turn)
    for user, turns in by_user.items():
        for comparison in select_pairs(turns, every_rule(), user, 0, {}, most):
            logged = comparison.turn.event
            key = (user, logged.conversation, logged.turn)
            chosen = logged.kept if comparison.chosen.name == "edit" else int(comparison.chosen.name)
            before_chosen = log.shown_after[*key, chosen]
            before_rejected = log.shown_after[*key, int(comparison.rejected.name)]
            assert before_chosen == before_rejected
            pair = to_pair(comparison, "p", most)
            messages = tuple((message.speaker, message.text) for message in pair.messages)
            assert messages[-1:] == before_chosen[-1:]
            if most is None:
                assert messages == before_chosen
            texts = {candidate.text for candidate in logged.candidates}
            assert pair.rejected in texts
            assert pair.chosen in (texts if comparison.chosen.name != "edit" else {logged.edit.text})  # type: ignore[union-attr]


@given(seed=st.integers(0, 10**6), per_turn=st.integers(1, 2), per_user=st.integers(1, 6))
def test_caps_hold_and_no_order_changes_them(
    make_feedback_log: MakeLog, seed: int, per_turn: int, per_user: int
) -> None:
    turns = turns_of(make_feedback_log(seed, 1).events)
    uncapped = {c.id for c in select_pairs(turns, every_rule(), "u", 0, {})}
    settings = every_rule(max_per_turn=per_turn, max_per_user=per_user)
    counts: PairCounts = {}
    chosen = select_pairs(turns, settings, "u", 0, counts)
    assert {c.id for c in select_pairs(turns[::-1], settings, "u", 0, {})} == {c.id for c in chosen} <= uncapped
    assert len(chosen) <= per_user
    assert all(n <= per_turn for n in Counter(id(c.turn) for c in chosen).values())
    if not any("max_per_turn" in reason for rule in counts.values() for reason in rule.ledger.filtered):
        assert len(chosen) == min(per_user, len(uncapped))


def test_another_seed_chooses_others() -> None:
    turns = turns_of([event(*"abcdefghijkl")])
    chosen = [[c.id for c in select_pairs(turns, every_rule(max_per_user=3), "u", seed, {})] for seed in range(4)]
    assert len({tuple(ids) for ids in chosen}) > 1
    assert any(ids != [c.id for c in select_pairs(turns, every_rule(), "u", 0, {})][:3] for ids in chosen)


def test_length_alone() -> None:
    lengths = LengthOnly()
    assert lengths.to_dict()["longer_is_chosen"] is None
    for texts in (("aa", "b"), ("aa", "b"), ("a", "bb"), ("a", "b")):
        lengths.add(texts)
    assert lengths.to_dict() == {"longer": 2, "shorter": 1, "same": 1, "longer_is_chosen": 0.625}
