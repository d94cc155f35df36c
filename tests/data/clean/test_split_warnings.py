"""What is said of a split: who links dialogues that must be on one side, and in what the sides differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.clean.split import HELDOUT, TRAIN, FractionSplit, SplitRecords
from data.clean.split_warnings import is_too_large, side_measures, side_warnings, strongest_link
from data.clean.stable_hash import stable_hash
from data.prepare import main


def records_of(people: list[list[int]]) -> SplitRecords:
    n = len(people)
    hashes = [stable_hash(person) for crowd in people for person in crowd]
    times = np.full(n, np.nan)
    counts = np.array([len(crowd) for crowd in people], np.int64)
    return SplitRecords(
        np.zeros(n, np.int64), times, times, np.arange(n, dtype=np.uint64), counts, np.array(hashes, np.uint64)
    )


@given(people=st.lists(st.lists(st.integers(0, 9), max_size=3, unique=True), min_size=1, max_size=20))
def test_the_strongest_link_is_the_participant_in_most_dialogues(people: list[list[int]]) -> None:
    link = strongest_link(records_of(people))
    counts = {person: sum(person in crowd for crowd in people) for person in range(10)}
    if max(counts.values()) < 2:
        assert link is None
        return
    assert link is not None
    (person,) = [person for person in counts if stable_hash(person) == link.participant]
    assert link.n_dialogues == counts[person] == max(counts.values())
    linked = {person}
    for _ in people:
        linked |= {other for crowd in people if linked & {*crowd} for other in crowd}
    assert link.n_linked == sum(bool(linked & {*crowd}) for crowd in people)


def test_a_link_is_told_where_it_is_more_than_is_held_out() -> None:
    rule = FractionSplit(kind="fraction", heldout=0.2)
    for n_of_bot, is_told in ((30, False), (31, True), (100, True)):
        link = strongest_link(records_of([[0] if i < n_of_bot else [i] for i in range(150)]))
        assert link is not None and is_too_large(link, rule) == is_told
        assert not is_too_large(link, rule.model_copy(update={"by_participant": False}))


def warnings_of(heldout: np.ndarray, **changes: np.ndarray) -> list[str]:
    n = len(heldout)
    random = np.random.default_rng(0)
    alike: dict[str, Any] = {
        "n_speakers": np.full(n, 2), "n_messages": random.geometric(0.1, n), "n_characters": random.geometric(0.01, n),
        "n_stay": random.integers(0, 5, n), "n_leave": random.integers(0, 2, n),
    }  # fmt: skip
    return side_warnings(side_measures(**(alike | changes)), np.where(heldout, HELDOUT, TRAIN))


@pytest.mark.parametrize("seed", range(20))
def test_a_split_by_chance_is_not_warned_of(seed: int) -> None:
    for n_heldout in (1, 5, 60):
        assert warnings_of(np.random.default_rng(seed).permutation(600) < n_heldout) == []


def test_sides_that_differ_are_told() -> None:
    heldout = np.arange(600) < 35
    crowds = np.where(heldout, 3, 2)
    assert [
        "more than two speakers: 100% held out, 0% in training" in one
        for one in warnings_of(heldout, n_speakers=crowds)
    ] == [True]
    long = np.where(heldout, 30, 10)
    assert any("messages a dialogue: 30.0 held out, 10.0" in one for one in warnings_of(heldout, n_messages=long))
    stay, leave = np.where(heldout, 1, 0), np.where(heldout, 0, 1)
    assert any("partner stays: 100% held" in one for one in warnings_of(heldout, n_stay=stay, n_leave=leave))
    nothing = np.zeros(600, np.int64)
    assert warnings_of(heldout, n_stay=nothing, n_leave=nothing) == []


def test_a_bot_in_all_dialogues_is_named(tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for i in range(160):
        speakers = ("Tom", "Mia", "Ann") if i >= 140 else ("Tom", "Mia")
        said = [
            {"speaker": speakers[k % len(speakers)], "text": f"hello, how are you today, number {i} {k}"}
            for k in range(6)
        ]
        people = [f"u{i}", f"v{i}"] if i >= 140 else [f"u{i}", "bot-1"]
        lines.append({"id": str(i), "character": "Mia", "messages": said, "participants": people})
    (tmp_path / "bot.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    common = [
        str(recipe_file),
        f"sources=[{{kind: chat_jsonl, path: {tmp_path}/bot.jsonl}}]",
        f"run_dir={tmp_path}/bot",
    ]
    common += ["continue_within_seconds=null"]
    split = "split={{kind: fraction, heldout: {}{}}}"
    assert main([*common, split.format(0.1, "")]) == 0
    printed = capsys.readouterr().out
    place = "(of dialogue '0' in bot.jsonl)"
    assert f"warning: participant 'bot-1' {place} takes part in " in printed
    assert "name it in split.characters as the source has it" in printed
    hashed = [f"run_dir={tmp_path}/hashed", "scrub={ids: {salt: a-secret-word}}"]
    assert main([*common, *hashed, split.format(0.1, "")]) == 0
    scrubbed = capsys.readouterr().out
    assert "bot-1" not in scrubbed and f"{place} takes part in " in scrubbed, "the reader can find whom it means"
    assert "more than two speakers: 100% held out" in printed
    characters, named = ", characters: [{}]", f"run_dir={tmp_path}/named"
    assert main([*common, named, split.format(0.1, characters.format("bot-9"))]) == 2
    assert "'bot-9' takes part in no dialogue" in capsys.readouterr().err
    assert main([*common, named, split.format(0.1, characters.format("bot-1"))]) == 0
    printed = capsys.readouterr().out
    assert "warning" not in printed and "bot-1: a character, in " in printed
    heldout = [
        json.loads(line) for line in (tmp_path / "named" / "dialogues" / "heldout.jsonl").read_text().splitlines()
    ]
    assert not any("bot-1" in dialogue["participants"] for dialogue in heldout)
    assert len({len(dialogue["participants"]) for dialogue in heldout}) == 2, "group chats and chats of two"
