"""Preference pairs: exact files, errors with file and line, and hh-rlhf's unusable records counted."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import NARRATOR, DialogueError, Message
from data.sources.preferences import (
    BLANK_NEWEST,
    CONTRADICTED,
    NO_CONTEXT,
    NOT_TRAINED,
    OTHER_CONTEXT,
    REPEATED,
    SAME_REPLY,
    SAYS_NOTHING,
    PreferenceError,
    PreferencePair,
    distinct_pairs,
    hold_out,
    pair_from_record,
    pair_to_json,
    read_pair_file,
    read_pairs,
    reason_against_pair,
    write_pairs,
)
from data.sources.record import RecordError, SourceError

PAIR = PreferencePair(
    "p", (Message("Ann", "hi", 3.5), Message("Bob", "you")), "Bob", "good\n", "bad", "test", {"s": 0.5}
)


@settings(max_examples=40)
@given(chosen=st.text(max_size=9), rejected=st.text(max_size=9))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, chosen: str, rejected: str) -> None:
    if reason := reason_against_pair(chosen, rejected):
        with pytest.raises(DialogueError, match=reason):
            PreferencePair("p", PAIR.messages[:1], "Bob", chosen, rejected)
        return
    pair = PreferencePair("p", PAIR.messages, "Bob", chosen, rejected, "s", {"x": [1]})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, [pair, PAIR])
    assert read_pairs(path) == [pair, PAIR]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "chosen is NoneType"),
        ({"chosen": "bad"}, "both replies are the same"),
        ({"chosen": "b ad\u200b"}, "both replies are the same"),
        ({"rejected": "\u3164"}, "a blank reply"),
        ({"character": "a:b"}, "contains ':'"),
        ({"messages": [{"text": "x"}]}, "message 0"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"metadata": [1]}, "expected a string and an object"),
        ({"metadata": {"engagement_label": 1}}, "metadata.engagement_label is not read"),
        ({"id": None}, "expected a string and an object"),
    ],
)
def test_bad_pairs_name_file_and_line(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = tmp_path / "pairs.jsonl"
    bad = json.loads(pair_to_json(PAIR)) | change
    path.write_text(pair_to_json(PAIR) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(PreferenceError, match=rf"pairs\.jsonl:3: .*{reason}"):
        read_pairs(path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(pair_to_json(PAIR).encode() * 50)[:-20])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz.*damaged"):
        read_pairs(tmp_path / "cut.jsonl.gz")


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {text}" for i, text in enumerate(turns))


def test_hh_rlhf_counts_what_it_leaves_out(tmp_path: Path) -> None:
    records = [
        (transcript("q", "a", "q2", "yes"), transcript("q", "a", "q2", "no")),
        (transcript("q", "same"), transcript("q", "same ")),
        (transcript("q", "a", "q2", "yes"), transcript("q", "b", "q2", "no")),
        (transcript("q", "a", "q2"), transcript("q", "b", "q2")),
        (transcript("q", ""), transcript("q", "no")),
        (transcript("q: Human: x\nline", "one"), transcript("q: Human: x\nline", "two")),
    ]
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in records).encode())
    )
    loaded = read_pair_file(path, "hh_rlhf", max_refused_fraction=0.7)
    assert (loaded.n_records, loaded.refused) == (6, {SAME_REPLY: 1, OTHER_CONTEXT: 2, SAYS_NOTHING: 1})
    first, last = loaded.pairs
    assert first.messages == (Message("Human", "q"), Message("Assistant", "a"), Message("Human", "q2"))
    assert (first.id, first.character, first.chosen, first.rejected) == ("hh.jsonl.gz:1", "Assistant", "yes", "no")
    assert last.messages == (Message("Human", "q: Human: x\nline"),)


BLANK = "\u200b \n"


@pytest.mark.parametrize("character", ["Bob", NARRATOR])
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], NO_CONTEXT),
        ([("Ann", "")], NO_CONTEXT),
        ([("Ann", BLANK), ("Eve", "\u3164")], NO_CONTEXT),
        ([(NARRATOR, "A bar")], NO_CONTEXT),
        ([(NARRATOR, "A bar"), ("Ann", BLANK)], NO_CONTEXT),
        ([("Bob", "hi"), ("Ann", BLANK)], NO_CONTEXT),
        ([("Ann", "hi"), ("Ann", BLANK)], BLANK_NEWEST),
        ([("Ann", "hi"), ("Bob", BLANK)], BLANK_NEWEST),
        ([("Ann", "hi")], None),
        ([("Ann", "hi"), ("Bob", "yo")], None),
        ([(NARRATOR, "A bar"), ("Ann", "hi"), ("Bob", "yo"), ("Ann", "so")], None),
    ],
)
def test_a_reply_must_answer_somebody(
    tmp_path: Path, character: str, messages: list[tuple[str, str]], reason: str | None
) -> None:
    speakers = {"Bob": character}
    said = [{"speaker": speakers.get(speaker, speaker), "text": text} for speaker, text in messages]
    good = json.loads(pair_to_json(PAIR)) | {"character": character}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(one) for one in (good, good | {"messages": said})))
    found = read_pair_file(tmp_path / "a.jsonl", "jsonl", 0.5)
    assert found.refused == ({reason: 1} if reason else {})
    if reason:
        assert f"{tmp_path / 'a.jsonl'}:2: {reason}" in found.report
        with pytest.raises(PreferenceError, match="more than max_bad_fraction"):
            read_pair_file(tmp_path / "a.jsonl", "jsonl", 0.4)
    else:
        assert found.pairs[1].continues == (messages[-1][0] == "Bob")


@pytest.mark.parametrize(
    ("before", "reason"),
    [("", NO_CONTEXT), ("\n\nHuman: ", NO_CONTEXT), ("\n\nAssistant: a", NO_CONTEXT), ("\n\nHuman: q", None)],
)
def test_transcripts_must_answer_somebody(tmp_path: Path, before: str, reason: str | None) -> None:
    good = {"chosen": transcript("q", "a"), "rejected": transcript("q", "b")}
    other = {"chosen": f"{before}\n\nAssistant: x", "rejected": f"{before}\n\nAssistant: y"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(other)}\n")
    assert read_pair_file(tmp_path / "a.jsonl", "hh_rlhf", 0.5).refused == ({reason: 1} if reason else {})


@pytest.mark.parametrize("file_format", ["jsonl", "hh_rlhf"])
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"weight": 1}, None),
        ({"weight": 0}, NOT_TRAINED),
        ({"metadata": {"masked": True}}, NOT_TRAINED),
        ({"weight": 0, "train": True}, "weight and train contradict each other on what is trained; give one of them"),
        ({"weight": 1, "metadata": {"trained": False}},
         "weight and metadata.trained contradict each other on what is trained; give one of them"),
        ({"weight": 0.5}, "weight is N: expected N or N, false or true, for whether it is trained"),
    ],
)  # fmt: skip
def test_a_pair_whose_record_is_not_trained_is_left_out(
    tmp_path: Path, file_format: Literal["jsonl", "hh_rlhf"], flags: dict[str, object], reason: str | None
) -> None:
    transcripts = {"chosen": transcript("q", "a"), "rejected": transcript("q", "b")}
    good = json.loads(pair_to_json(PAIR)) if file_format == "jsonl" else transcripts
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({**good, **flags})}\n")
    assert read_pair_file(tmp_path / "a.jsonl", file_format, 0.5).refused == ({reason: 1} if reason else {})


def test_transcripts_refuse_what_dialogues_of_them_refuse(tmp_path: Path) -> None:
    good = {"chosen": transcript("q", "a"), "rejected": transcript("q", "b"), "lang": "en", "tools": []}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | {'tools': ['x']})}\n")
    found = read_pair_file(tmp_path / "a.jsonl", "hh_rlhf", 0.5)
    assert len(found.pairs) == 1 and "2: tools is not read: tools are not rendered" in found.report


SAID = st.sampled_from(["a", "b", "b ", "c"])


@given(given_pairs=st.lists(st.tuples(st.sampled_from("xy"), SAID, SAID), max_size=9))
def test_distinct_pairs(given_pairs: list[tuple[str, str, str]]) -> None:
    """Against a plain reading: the first of equal ones, none where both directions stand in one context."""
    made = [
        PreferencePair(str(n), (Message("Ann", context),), "Bob", chosen, rejected)
        for n, (context, chosen, rejected) in enumerate(given_pairs)
        if chosen.strip() != rejected.strip()
    ]
    meant = [(pair.messages[0].text, pair.chosen.strip(), pair.rejected.strip()) for pair in made]
    kept, left_out = distinct_pairs(made)
    firsts = [n for n, one in enumerate(meant) if one not in meant[:n]]
    assert kept == [made[n] for n in firsts if (meant[n][0], *meant[n][:0:-1]) not in meant]
    counts = {REPEATED: len(made) - len(firsts), CONTRADICTED: len(firsts) - len(kept)}
    assert left_out == {reason: count for reason, count in counts.items() if count}


REPLIES = st.text("ab \n\u200b\u3164\ufe0fe\u0301é", max_size=4)


@settings(max_examples=40)
@given(sides=st.lists(st.tuples(REPLIES, REPLIES), min_size=1, max_size=8))
def test_all_readers_refuse_the_same_pairs(
    tmp_path_factory: pytest.TempPathFactory, sides: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    ours, transcripts = folder / "pairs.jsonl", folder / "hh.jsonl"
    good = ("yes", "no")
    records = [json.loads(pair_to_json(PAIR)) | {"chosen": c, "rejected": r} for c, r in [good, *sides]]
    ours.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [{"chosen": transcript("q", c), "rejected": transcript("q", r)} for c, r in [good, *sides]]
    transcripts.write_text("".join(json.dumps(record) + "\n" for record in texts))
    one, other = read_pair_file(ours, "jsonl", 1.0), read_pair_file(transcripts, "hh_rlhf", 1.0)
    assert one.refused == other.refused == Counter(filter(None, (reason_against_pair(*pair) for pair in sides)))
    assert [(p.chosen.strip(), p.rejected.strip()) for p in one.pairs] == [(p.chosen, p.rejected) for p in other.pairs]


@pytest.mark.parametrize("file_format", ["jsonl", "hh_rlhf"])
def test_too_many_refused_records_are_an_error_with_counts_and_places(
    tmp_path: Path, file_format: Literal["jsonl", "hh_rlhf"]
) -> None:
    path = tmp_path / "pairs.jsonl"
    transcripts = json.dumps({"chosen": transcript("q", "a"), "rejected": transcript("q", "b")})
    good = pair_to_json(PAIR) if file_format == "jsonl" else transcripts
    path.write_text("\n".join([good, "{", *([good] * 8)]))
    found = read_pair_file(path, file_format, 0.1)
    assert len(found.pairs) == 9 and sum(found.refused.values()) == 1
    assert f"{path}:2: " in found.report
    with pytest.raises(PreferenceError, match=rf"(?s)10\.0% of the records.*max_bad_fraction 0\.05.*{path}:2: "):
        read_pair_file(path, file_format, 0.05)
    path.write_text("{}\n")
    with pytest.raises(PreferenceError, match=r"no usable pair.*0 pairs of 1 records"):
        read_pair_file(path, file_format, 1.0)
    path.write_text("")
    with pytest.raises(PreferenceError, match="no records"):
        read_pair_file(path, file_format, 1.0)


@given(sizes=st.lists(st.integers(1, 6), max_size=20), fraction=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_groups_stay_together_and_about_the_fraction_is_held_out(sizes: list[int], fraction: float, seed: int) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    heldout, rest = hold_out(groups, fraction, seed)
    assert sorted(heldout + rest) == list(range(len(groups)))
    assert {groups[i] for i in heldout}.isdisjoint(groups[i] for i in rest)
    missing = round(len(groups) * fraction) - len(heldout)
    assert 0 <= missing < max([*sizes, 1]) or not rest
    assert hold_out(groups, fraction, seed) == (heldout, rest)


def test_a_pairs_group_is_its_user_or_its_context() -> None:
    def pair(text: str, **metadata: str) -> PreferencePair:
        return PreferencePair("p", (Message("Tom", text),), "Mia", "yes", "no", metadata=metadata)

    assert pair("a", user="u").group == pair("b", user="u").group != pair("a", user="w").group
    assert pair("a").group == pair("a").group != pair("b").group
    assert pair("a", user=" ").group == pair("a").group, "a blank user is nobody"


def test_a_context_with_a_name_like_the_characters_is_counted(tmp_path: Path) -> None:
    good = json.loads(pair_to_json(PAIR))
    alike = good | {"messages": [{"speaker": "bob", "text": "hi"}]}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(one) for one in (good, alike)))
    found = read_pair_file(tmp_path / "a.jsonl", "jsonl", 0.5)
    assert found.pairs == [PAIR]
    assert "a.jsonl:2: speakers 'bob' and 'Bob', the character, differ only in case" in found.report


USER_SAYS, REPLY = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
OTHER_REPLY = {"role": "assistant", "content": "No."}
TRL_PAIRS: list[dict[str, object]] = [
    {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
    {"prompt": [USER_SAYS], "chosen": [REPLY], "rejected": [OTHER_REPLY]},
    {"prompt": "Tea?", "chosen": [USER_SAYS, REPLY], "rejected": [USER_SAYS, OTHER_REPLY]},  # ultrafeedback_binarized
    {"chosen": [USER_SAYS, REPLY], "rejected": [USER_SAYS, OTHER_REPLY]},
]


@pytest.mark.parametrize("record", TRL_PAIRS)
def test_pairs_of_trl_are_read_in_each_of_their_forms(record: dict[str, object]) -> None:
    pair = pair_from_record({**record, "score_chosen": 8.5}, "a.jsonl:1")
    assert pair == PreferencePair(
        "a.jsonl:1", (Message("User", "Tea?"),), "Assistant", "Yes.", "No.", "trl", {"score_chosen": 8.5}
    )


def test_a_prompt_of_trl_keeps_all_its_messages() -> None:
    system = {"role": "system", "content": "A café."}
    record = {"id": 7, "prompt": [system, USER_SAYS, REPLY, USER_SAYS], "chosen": [REPLY], "rejected": "No."}
    pair = pair_from_record(record, "a.jsonl:1")
    texts = [(message.speaker, message.text) for message in pair.messages]
    said = [("User", "Tea?"), ("Assistant", "Yes."), ("User", "Tea?")]
    assert (pair.id, texts) == ("7", [(NARRATOR, "A café."), *said])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"prompt": 3}, "prompt is 3: expected a text or a list of messages"),
        ({"chosen": []}, "chosen is []: expected a text or a list"),
        ({"prompt": "\n\nHuman: Tea?\n\nAssistant:"}, "prompt is a transcript"),
        ({"chosen": [USER_SAYS]}, "chosen ends with a message of the user; expected the assistant's reply"),
        ({"chosen": [{"role": "user", "content": "Milk?"}, REPLY]}, OTHER_CONTEXT),
        ({"rejected": [{"role": "assistant", "content": "No.", "tool_calls": [1]}]}, "rejected: message 0: tool_calls"),
        ({"tools": [{"name": "tea"}]}, "tools"),
        ({"chosen": "No."}, SAME_REPLY),
    ],
)
def test_other_records_with_the_keys_of_trl_are_refused(changed: dict[str, object], problem: str) -> None:
    with pytest.raises((RecordError, DialogueError), match=re.escape(problem)):
        pair_from_record({**TRL_PAIRS[0], **changed}, "a.jsonl:1")
