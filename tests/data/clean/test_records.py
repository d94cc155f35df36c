"""Cleaning: every record is counted once, filters and duplicates, and too many bad records stop the run."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.clean.language import Languages
from data.clean.ledger import Ledger
from data.clean.quarantine import Quarantine
from data.clean.records import (
    CleanError,
    Filters,
    check_bad_fraction,
    check_times_for_labels,
    content_key,
    passing,
    scrubbed,
    without_bad,
)
from data.clean.repetition import Repetition
from data.clean.scrub import HashedIds, Scrub
from data.format.dialogue import NARRATOR, Dialogue, Message, continuation_labels
from data.sources.record import LeftOut, Rejected


def talk(*lines: str, identity: str = "d") -> Dialogue:
    pairs = [line.split(":", 1) for line in lines]
    return Dialogue(identity, tuple(Message(speaker, text) for speaker, text in pairs), pairs[-1][0])


BAD = Rejected("f.jsonl", 3, "not JSON", "{")
records = st.sampled_from(
    [
        BAD,
        LeftOut("blocked"),
        talk("A:x", "B:y"),
        talk("A:x"),
        talk("A:x", "A:y"),
        talk("A: ", "B:\n"),
        talk("A:x", "B:y", "A:"),
    ]
)


@settings(max_examples=60)
@given(given_records=st.lists(records, max_size=12))
def test_every_record_is_counted_once(
    given_records: list[Dialogue | LeftOut | Rejected], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ledger, path = Ledger(), tmp_path_factory.mktemp("clean") / "q.jsonl"
    with open(path, "w") as file:
        dialogues = without_bad(given_records, Quarantine(file, "chats", ledger))
        ledger.kept = len(list(passing(dialogues, Filters(), ledger)))
    ledger.balance()
    assert ledger.read == len(given_records)
    assert ledger.filtered.get("blocked", 0) == given_records.count(LeftOut("blocked"))
    assert len(path.read_text().splitlines()) == ledger.quarantined == given_records.count(BAD)


def test_a_lost_record_is_noticed() -> None:
    with pytest.raises(AssertionError, match="lost"):
        Ledger(read=2, kept=1).balance()


def test_filters_and_reasons() -> None:
    ledger = Ledger()
    filters = Filters(min_messages=3, min_speakers=2, max_message_characters=5)
    dialogues = [
        talk("A:x", "B:y", "A:z"),
        talk("A:x", "A:y", "A:z"),
        talk(f"{NARRATOR}:s", "A:x", "B:y"),
        talk("A:x", "B:yyyyyy", "A:z"),
        talk("A:x", "A:y", "B: "),
        talk("A:x", "B: ", "B:y", "A:z"),
    ]
    kept = list(passing(dialogues, filters, ledger))
    assert kept == [talk("A:x", "B:y", "A:z"), talk("A:x", "B:y", "A:z")]
    assert ledger.filtered == {
        "fewer than 2 speakers": 1,
        "fewer than 3 messages": 1,
        "a message over 5 characters": 1,
        "nothing visible": 1,
    }
    assert ledger.blank_messages == 2


def test_messages_that_say_nothing_go_but_whoever_sent_one_has_not_left() -> None:
    def labels(*turns: tuple[str, str, float | None], within: float | None = None) -> list[int]:
        dialogue = Dialogue("d", tuple(Message(*turn) for turn in turns), "A")
        (kept,) = passing([dialogue], Filters(min_messages=1, min_speakers=1), Ledger())
        return continuation_labels(kept, within)

    assert labels(("B", "hi", None), ("A", "x", None)) == [-1, 0]
    assert labels(("B", "hi", None), ("A", "x", None), ("B", "\u200b", None)) == [-1, -1]
    assert labels(("A", "x", None), ("A", " ", None), ("narrator", "n", None), ("B", "\u2800", None)) == [-1, -1]
    assert labels(("B", "hi", None), ("A", "x", None), ("A", "\ufeff", None)) == [-1, 0]
    assert labels(("A", "x", None), ("B", " ", None), ("B", "y", None)) == [1, -1]
    assert labels(("A", "x", 0), ("B", " ", 5), ("B", "y", 99), within=10) == [-1, -1], "not gone: it wrote at 5"


def test_limits_of_length_language_and_repetition() -> None:
    english, german = "I would like to know what you think", "Ich möchte gerne wissen, was du davon hältst"
    dialogues = {
        "kept": talk(f"A:{english}", f"B:{english} too"),
        "more than 3 messages": talk("A:x", "B:y", "A:z", "B:u"),
        "fewer than 20 characters": talk("A:x", "B:y"),
        "more than 900 characters": talk("A:" + "x" * 900, "B:y"),
        "in another language: de": talk(f"A:{german}", f"B:{german}"),
        "too much repetition: repeated 5-grams": talk(f"A:{(english + ' ') * 9}", "B:no, not that again"),
    }
    filters = Filters(
        max_messages=3,
        min_characters=20,
        max_characters=900,
        languages=Languages(keep=("en",)),
        repetition=Repetition(max_top_n_gram={}),
    )
    ledger = Ledger(read=len(dialogues))
    kept = list(passing(dialogues.values(), filters, ledger))
    assert kept == [dialogues.pop("kept")]
    assert ledger.filtered == dict.fromkeys(dialogues, 1)
    with pytest.raises(ValidationError, match="min_characters 5 is over max_characters 4"):
        Filters(min_characters=5, max_characters=4)


def test_replaced_values_are_counted_and_summed() -> None:
    rule = Scrub(ids=HashedIds(salt="a salt of tests"))
    ledgers = [Ledger(), Ledger()]
    given = replace(talk("A:ask ann@example.com", "B:or call +1 415-555-0132"), participants=("p",))
    for ledger in ledgers:
        (clean,) = scrubbed([given], rule, ledger)
        assert [message.text for message in clean.messages] == ["ask [email]", "or call [phone]"]
        assert Ledger.from_dict(ledger.to_dict()) == ledger
    assert Ledger.total(ledgers).scrubbed == {"email": 2, "phone": 2, "id": 2}


def test_values_replaced_in_the_quarantine_are_counted_apart(tmp_path: Path) -> None:
    bad = Rejected("f.jsonl", 3, "not JSON", "{ann@example.com")
    ledger = Ledger()
    with open(tmp_path / "q.jsonl", "w") as file:
        quarantine = Quarantine(file, "chats", ledger, Scrub())
        given = list(without_bad([bad, talk("A:ann@example.com", "B:y")], quarantine))
    list(scrubbed(given, Scrub(), ledger))
    assert ledger.scrubbed == {"email": 1, "email in quarantine": 1}
    assert json.loads((tmp_path / "q.jsonl").read_text())["record"] == "{[email]"


def test_duplicates_are_of_turns_and_texts() -> None:
    one, renamed, same_speaker, spaced = (
        content_key(talk(*texts)) for texts in (("A:x", "B:y"), ("Ann:x", "Bob:y"), ("A:x", "A:y"), ("A:x", "B:y "))
    )
    assert one == renamed
    assert len({one, same_speaker, spaced}) == 3


def test_too_many_bad_records_stop_with_examples(tmp_path: Path) -> None:
    ledgers, path, kept = {"large": Ledger(), "small": Ledger()}, tmp_path / "q.jsonl", tmp_path / "kept.jsonl"
    others = [Rejected("other.jsonl", 1, "not UTF-8", ""), *[talk("A:x", "B:y")] * 99]
    with open(path, "w") as file:
        for name, given_records in (("large", others), ("small", [BAD] * 6 + [talk("A:x", "B:y")] * 4)):
            list(without_bad(given_records, Quarantine(file, name, ledgers[name])))
    check_bad_fraction(ledgers, 0.6, path, kept)
    with pytest.raises(CleanError, match=r"source small: 6 of 10 records.*kept\.jsonl.*first:\n  f\.jsonl:3: not JSON"):
        check_bad_fraction(ledgers, 0.5, path, kept)
    assert json.loads(kept.read_text().splitlines()[0]) == {"source": "large", **asdict(others[0])}
    assert len(kept.read_text().splitlines()) == 7


def test_commands_that_clean_nothing_start_without_datatrove() -> None:
    loaded = "import sys, data.clean.records; print('datatrove' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.parametrize(
    ("times", "within", "problem"),
    [
        ([(0, 5), (9, 12)], 10, None),
        ([(None, None)], None, None),
        ([(None, None)], 10, "none of the 1 messages of the characters has a time"),
        ([(5, None)], 10, "none of the 1 messages"),
        ([(None, 5)], 10, "none of the 1 messages"),
        ([(5, None), (86400, 86400)], 10, "at midnight, dates without a time of day"),
        ([(0, 86400)], 86400, None),
        ([(0, 86400), (3, 4)], 10, None),
        ([(0, 86400)], None, None),
    ],
)
def test_a_time_limit_needs_times_that_can_tell(
    times: list[tuple[float | None, float | None]], within: float | None, problem: str | None
) -> None:
    said = [(Message("A", "x", first), Message("B", "y", second)) for first, second in times]
    ledger = Ledger()
    assert len(list(passing((Dialogue(str(i), one, "A") for i, one in enumerate(said)), Filters(), ledger))) == len(
        said
    )
    if problem is None:
        check_times_for_labels(ledger, within)
        return
    with pytest.raises(CleanError, match=f"continue_within_seconds: 10 has no effect: .*{problem}"):
        check_times_for_labels(ledger, within)
