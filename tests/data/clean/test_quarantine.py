"""What the quarantine says of a bad record holds no personal data, wherever sources cut the record and their quotes."""

import json
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.clean.quarantine import NOT_SHOWN, general_reason, scrub_rejected
from data.clean.scrub import HashedIds, Scrub
from data.format.dialogue import Dialogue, DialogueError, Message
from data.format.dialogue_json import messages_from_records
from data.sources.record import Rejected, read_record, rejected

RULE = Scrub()
WITH_IDS = Scrub(ids=HashedIds(salt="a salt of tests"))
VALUES = {
    "email": "ann.kowalska@mail.example.org",
    "phone": "(415) 555-0132",
    "card": "4242 4242 4242 4242",
    "ip": "81.169.145.78",
    "url_credentials": "ftp://ann:s3cret@host.example",
}


def shown(value: str, text: str) -> list[str]:
    """What of a value stands in a text."""
    secret = value.removeprefix("ftp://").removesuffix("host.example")
    return [secret[i : i + 7] for i in range(len(secret) - 6) if secret[i : i + 7] in text]


def texts(most: int) -> st.SearchStrategy[str]:
    """Of every length up to a number, so that a cut comes anywhere."""
    fillers = st.sampled_from(["a ", "b\n", "it's ", '"c" ', "é, "])
    return st.builds(lambda filler, length: (filler * most)[:length], fillers, st.integers(0, most))


def bad(reason: str, record: object, line: int | str = 3) -> Rejected:
    return rejected("chats.jsonl", line, reason, record)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(VALUES)),
    before=texts(480),
    after=st.sampled_from(["", " or", "\n", ", thanks" * 80]),
    ascii_only=st.booleans(),
    as_bytes=st.booleans(),
)
@example(kind="email", before="x " * 210, after="", ascii_only=True, as_bytes=True)
@example(kind="card", before="call\n", after="\n", ascii_only=True, as_bytes=True)
def test_a_value_is_found_where_a_record_is_cut_and_escaped(
    kind: str, before: str, after: str, ascii_only: bool, as_bytes: bool
) -> None:
    text = f"{before} {VALUES[kind]}{after}"
    line = json.dumps({"id": "d", "messages": [{"speaker": "Ann", "text": text}], "x": 1}, ensure_ascii=ascii_only)
    result, _ = scrub_rejected(bad("not a record", line.encode() if as_bytes else line), RULE)
    assert not shown(VALUES[kind], result.record)


@given(
    kind=st.sampled_from(sorted(VALUES)),
    before=texts(90),
    form=st.sampled_from(
        ["expected 'Human:', found {0[:60]!r}", "found {0[:60]!r}, expected 'a: b'", "message 0: found {1}", "{2!r}"]
    ),
    rule=st.sampled_from([RULE, WITH_IDS]),
)
def test_a_value_is_found_where_a_reason_cuts_it(kind: str, before: str, form: str, rule: Scrub) -> None:
    text = f"{before} {VALUES[kind]}"
    values = {"{0[:60]!r}": repr(text[:60]), "{1}": str({"txt": text})[:80], "{2!r}": repr(KeyError(text))}
    reason = form
    for place, value in values.items():
        reason = reason.replace(place, value)
    result, _ = scrub_rejected(bad(reason, ""), rule)
    assert not shown(VALUES[kind], result.reason)


@given(said=texts(90).map("{} ann.kowalska@mail.example.org".format))
def test_of_messages_that_are_none_nothing_is_quoted(said: str) -> None:
    with pytest.raises(DialogueError) as raised:
        messages_from_records([said], "Mia")
    for rule in (RULE, WITH_IDS):
        result, _ = scrub_rejected(bad(str(raised.value), said), rule)
        assert "ann.kow" not in result.reason and result.reason.startswith("message ")
    assert result.reason == "message N: expected an object with speaker and text, found .."


def test_short_records_are_shown_scrubbed_and_counted() -> None:
    record = '{"id": "chat 7", "text": "write to \\nann@example.org or 415-555-0132"'
    result, counts = scrub_rejected(bad("not JSON: Expecting ',' delimiter: line 1", record, "ann@example.org/3"), RULE)
    assert result.record == '{"id": "chat 7", "text": "write to  [email] or [phone]"'
    assert result.reason == "not JSON: Expecting ',' delimiter: line 1"
    assert isinstance(result.line, str) and "@" not in result.line
    assert counts == {"email": 2, "phone": 1}
    assert result.file == "chats.jsonl"


worker = st.one_of(st.text(min_size=1), st.integers(10, 10**12), st.sampled_from(["A3RLCGRXA34GC0", "it's", 'a"b']))


@given(worker=worker)
@example(worker="A3RLCGRXA34GC0")
@example(worker="\\u0027 A3 \\x22 B4")
def test_with_ids_no_value_of_a_record_is_written(worker: str | int) -> None:
    def dialogue() -> Dialogue:
        return {"known": Dialogue("d", (Message("A", "x"),), "A")}[worker]  # type: ignore[index]

    given_records = [read_record(dialogue, "f.jsonl", lambda: 1, {"worker_id": worker})]
    given_records += [bad(f"id is {worker!r}: expected a string", {"id": worker})]
    given_records += [bad(f"participants is {[worker, worker]!r}: expected", "")]
    for record in given_records:
        assert isinstance(record, Rejected)
        result, _ = scrub_rejected(record, WITH_IDS)
        assert result.record == NOT_SHOWN and result.line == record.line
        told = Counter(result.reason) - Counter("not a record of this source: KeyError('..') participants is id is N")
        assert not told - Counter("participants is ['..', '..']: expected a string [N, N]") and len(result.reason) < 60


def test_apostrophes_are_no_quotes() -> None:
    reason = "message 3: its time is 5 s before an earlier message's, of 'ann'; the log's 'bob"
    assert general_reason(reason) == "message N: its time is N s before an earlier message's, of '..'; the log's '..'"
