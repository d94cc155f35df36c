"""Splits: by time or fraction, no participant on both sides, nothing lost."""

from collections import Counter
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean.split import (
    DROPPED,
    HELDOUT,
    TRAIN,
    FractionSplit,
    SplitError,
    SplitRecords,
    TimeSplit,
    split,
    time_span,
)
from data.clean.stable_hash import stable_hash
from data.format.dialogue import Dialogue, Message

SEPTEMBER = 1535760000.0  # 2018-09-01T00:00:00Z
BY_TIME = TimeSplit(kind="time", heldout_from=date(2018, 9, 1))


def talk(identity: str, time: float | None, *participants: str) -> Dialogue:
    return Dialogue(identity, (Message("narrator", "s"), Message("A", "x", time)), "A", participants)


def records_of(dialogues: list[Dialogue], seed: int) -> SplitRecords:
    names = sorted({dialogue.source for dialogue in dialogues})
    start_time, end_time = np.array([time_span(dialogue) for dialogue in dialogues]).reshape(-1, 2).T
    return SplitRecords(
        source=np.array([names.index(dialogue.source) for dialogue in dialogues], np.int64),
        start_time=start_time,
        end_time=end_time,
        heldout_hash=np.array([stable_hash("heldout", seed, dialogue.id) for dialogue in dialogues], np.uint64),
        n_participants=np.array([len(dialogue.participants) for dialogue in dialogues], np.int64),
        participants=np.array([stable_hash(p) for d in dialogues for p in d.participants], np.uint64),
    )


class Sides:
    """The dialogues on each side, in the order given, and those on neither, by reason."""

    def __init__(self, dialogues: list[Dialogue], rule: TimeSplit | FractionSplit, seed: int) -> None:
        sides = split(records_of(dialogues, seed), rule)

        def of(side: int) -> list[Dialogue]:
            return [dialogue for dialogue, found in zip(dialogues, sides, strict=True) if found == side]

        self.train, self.heldout = of(TRAIN), of(HELDOUT)
        self.dropped = {reason: of(side) for side, reason in DROPPED.items() if of(side)}


def ids(dialogues: list[Dialogue]) -> list[str]:
    return [dialogue.id for dialogue in dialogues]


def test_time_split_is_exact_and_drops_shared_participants() -> None:
    dialogues = [
        talk("old", SEPTEMBER - 1, "p"),
        talk("new", SEPTEMBER, "q", "r"),
        talk("shared", SEPTEMBER - 9, "r", "s"),
        talk("undated", None, "t"),
    ]
    result = Sides(dialogues, BY_TIME, seed=0)
    assert (ids(result.train), ids(result.heldout)) == (["old"], ["new"])
    dropped = {reason: ids(dialogues) for reason, dialogues in result.dropped.items()}
    assert dropped == {"no time": ["undated"], "participant is held out": ["shared"]}
    kept = Sides(dialogues, BY_TIME.model_copy(update={"by_participant": False}), seed=0)
    assert ids(kept.train) == ["old", "shared"]


def test_what_goes_on_when_the_held_out_time_has_begun_is_on_neither_side() -> None:
    def spanning(identity: str, *times: float | None) -> Dialogue:
        return Dialogue(identity, tuple(Message("A", "x", time) for time in times), "A", (identity,))

    before, after = SEPTEMBER - 9, SEPTEMBER
    dialogues = [
        spanning("old", before, None, before + 1),
        spanning("new", after, after + 1),
        spanning("both", before, after, None),
    ]
    result = Sides(dialogues, BY_TIME, seed=0)
    assert (ids(result.train), ids(result.heldout)) == (["old"], ["new"])
    dropped = {reason: ids(dialogues) for reason, dialogues in result.dropped.items()}
    assert dropped == {"continues after heldout_from": ["both"]}
    assert np.isnan(time_span(spanning("undated", None))).all()


@settings(max_examples=60)
@given(
    people=st.lists(st.lists(st.integers(0, 30), max_size=2), min_size=12, max_size=40),
    seed=st.integers(0, 5),
    fraction=st.floats(0.1, 0.6),
)
def test_fraction_split_separates_people(people: list[list[int]], seed: int, fraction: float) -> None:
    dialogues = [talk(str(i), None, *(str(p) for p in crowd)) for i, crowd in enumerate(people)]
    rule = FractionSplit(kind="fraction", heldout=fraction)
    try:
        result = Sides(dialogues, rule, seed)
    except SplitError:
        return  # everybody is linked to everybody
    assert sorted(ids(result.train) + ids(result.heldout)) == sorted(ids(dialogues))
    sides = [{p for d in side for p in d.participants} for side in (result.train, result.heldout)]
    assert sides[0].isdisjoint(sides[1])
    assert len(result.heldout) <= max(1, round(fraction * len(dialogues)))
    shuffled = Sides(dialogues[::-1], rule, seed)
    assert set(ids(shuffled.heldout)) == set(ids(result.heldout)), "the source's order does not matter"


def test_every_source_has_its_fraction_held_out() -> None:
    small = [replace(talk(f"s{i}", None, f"p{i}"), source="small") for i in range(20)]
    large = [replace(talk(f"l{i}", None), source="large") for i in range(2_000)]
    one_circle = [replace(talk(f"c{i}", None, "everybody"), source="circle") for i in range(300)]
    result = Sides(small + large + one_circle, FractionSplit(kind="fraction", heldout=0.1), seed=0)
    assert Counter(dialogue.source for dialogue in result.heldout) == {"small": 2, "large": 200}


def test_fraction_split_without_participants() -> None:
    dialogues = [talk(str(i), None) for i in range(400)]
    for by_participant in (True, False):
        rule = FractionSplit(kind="fraction", heldout=0.1, by_participant=by_participant)
        first, second = Sides(dialogues, rule, seed=0), Sides(dialogues, rule, seed=1)
        assert 20 <= len(first.heldout) <= 60
        assert ids(first.heldout) != ids(second.heldout)


@pytest.mark.parametrize(
    ("dialogues", "rule", "reason"),
    [
        ([talk("a", 0.0, "p")], BY_TIME, "none is held-out; they begin from 1970-01-01 to 1970-01-01"),
        ([talk("a", SEPTEMBER, "p")], BY_TIME, "none is training"),
        ([talk("a", None, "p")], BY_TIME, "no message has a time"),
        ([talk(i, None, "p") for i in "abc"], FractionSplit(kind="fraction", heldout=0.3), "by_participant"),
    ],
)
def test_an_empty_side_is_an_error(dialogues: list[Dialogue], rule: TimeSplit | FractionSplit, reason: str) -> None:
    with pytest.raises(SplitError, match=reason):
        Sides(dialogues, rule, seed=0)


def test_large_groups_are_not_preferred() -> None:
    """A group is as likely to be held out as a single dialogue: its place is not the best of its members' places."""
    crowds = [talk(f"c{i}", None, f"crowd {i % 10}") for i in range(100)]
    singles = [talk(f"s{i}", None, f"single {i}") for i in range(100)]
    n_crowds = n_singles = 0
    for seed in range(200):
        heldout = Sides(crowds + singles, FractionSplit(kind="fraction", heldout=0.5), seed).heldout
        n_crowds += sum(dialogue.id[0] == "c" for dialogue in heldout)
        n_singles += sum(dialogue.id[0] == "s" for dialogue in heldout)
    assert abs(n_crowds - n_singles) < 0.1 * (n_crowds + n_singles)


def test_a_source_of_few_dialogues_has_one_held_out() -> None:
    result = Sides([talk(str(i), None) for i in range(4)], FractionSplit(kind="fraction", heldout=0.1), seed=0)
    assert (len(result.train), len(result.heldout)) == (3, 1)


def test_a_group_in_two_sources_is_held_out_where_it_fits_both() -> None:
    """Room is for one dialogue of each source: after the first pair of linked dialogues no other pair fits."""
    rule = FractionSplit(kind="fraction", heldout=0.1)
    dialogues = [replace(talk(f"{source}{i}", None, f"p{i}"), source=source) for source in "ab" for i in range(9)]
    dialogues += [replace(talk("b9", None, "q"), source="b"), replace(talk("b10", None, "r"), source="b")]
    for seed in range(20):
        heldout = Counter(dialogue.source for dialogue in Sides(dialogues, rule, seed).heldout)
        assert heldout["a"] <= 1 and heldout["b"] <= 1


@pytest.mark.parametrize("by_participant", [True, False])
def test_pieces_of_a_conversation_are_on_one_side(by_participant: bool) -> None:
    """Dialogues with the same id, whoever takes part in them."""
    rule = FractionSplit(kind="fraction", heldout=0.3, by_participant=by_participant)
    pieces = [talk(f"conversation {number % 20}", None, f"person {number}") for number in range(60)]
    for seed in range(5):
        sides = Sides(pieces, rule, seed)
        assert sides.heldout and sides.train and not {*ids(sides.heldout)} & {*ids(sides.train)}


def test_an_earlier_piece_of_a_heldout_conversation_is_dropped() -> None:
    dialogues = [talk("a", SEPTEMBER - 9), talk("a", SEPTEMBER + 9), talk("b", SEPTEMBER - 9)]
    sides = Sides(dialogues, BY_TIME, 0)
    assert (ids(sides.train), ids(sides.heldout)) == (["b"], ["a"])
    assert {reason: ids(some) for reason, some in sides.dropped.items()} == {"continues after heldout_from": ["a"]}
