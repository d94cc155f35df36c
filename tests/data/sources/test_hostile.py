"""Whatever a file holds, reading it gives dialogues that can be written, or says of each record why it is none."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.clean.ledger import Ledger
from data.clean.records import Filters, passing
from data.format.dialogue import Dialogue
from data.format.dialogue_json import from_json, to_json
from data.sources.line_reader import MAX_LINE_BYTES
from data.sources.record import LeftOut, Rejected
from data.sources.registry import SOURCES
from data.sources.source import DialogueSource

TURNS = {
    "chat_jsonl": lambda texts: {
        "id": "1",
        "messages": [{"speaker": "AB"[i % 2], "text": text} for i, text in enumerate(texts)],
    },
    "openai_messages": lambda texts: {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    },
    "sharegpt": lambda texts: {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    },
    "hh_rlhf": lambda texts: {
        "chosen": "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts)),
        "rejected": "",
    },
}
EXTRA = {"chat_jsonl": "metadata", "openai_messages": "info", "sharegpt": "info"}  # where other data survives
# kind: the name of a file, for the sources that do not read JSON lines.
NAMES = {
    "casino": "casino.json",
    "chitchat": "dataset.json",
    "irc_ubuntu": "2005-07-06.ascii.txt",
    "qmsum": "meeting.json",
    "self_dialogue": "batch.csv",
    "shakespeare": "play.xml",
    "star": "1.json",
    "synthetic_persona_chat": "chats.csv",
    "topical_chat": "valid.json",
    "sharegpt": "chats.json",
    "openai_messages": "chats.json",
}

# "ha", 99 to the power of nine times
ENTITIES = (
    b"<!DOCTYPE PLAY [<!ENTITY a 'ha'>"
    + b"".join(b"<!ENTITY %c '%s'>" % (98 + i, b"&%c;" % (97 + i) * 99) for i in range(9))
    + b"]><PLAY><ACT><SCENE><SPEECH><SPEAKER>&j;</SPEAKER></SPEECH></SCENE></ACT></PLAY>"
)


def source(kind: str, path: Path) -> DialogueSource:
    return SOURCES[kind].model_validate({"kind": kind, "path": str(path)})


def check_written(records: list[Dialogue | LeftOut | Rejected]) -> None:
    """Everything that comes out can be written as UTF-8, and dialogues come back as they were."""
    for record in records:
        if isinstance(record, Dialogue):
            line = to_json(record)
            assert from_json(line).messages == record.messages
        elif isinstance(record, Rejected):
            assert record.reason
            assert len(record.reason) <= 500 and len(record.record) <= 500
            json.dumps([record.file, record.line, record.reason, record.record], ensure_ascii=False).encode()
        else:
            assert record.reason


def lines(kind: str) -> tuple[bytes, Callable[[str], bytes]]:
    """A good line, and the line with some JSON where the text of the first message stands."""
    good = json.dumps(TURNS[kind](["hi", "yo"])).encode()
    return good, lambda text: json.dumps(TURNS[kind](["MARK", "yo"])).replace('"MARK"', text).encode()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


HOSTILE: dict[str, tuple[str, str]] = {  # a JSON value in place of a message's text, and the reason
    "wrong type": ("17", ""),
    "list": ('["hi"]', ""),
    "lone surrogate": (r'"\ud800"', "surrogate"),
    "raw control character": ('"a\x00b"', "not JSON"),
    "NaN": ("NaN", "NaN is no number"),
    "Infinity": ("-Infinity", "-Infinity is no number"),
    "number beyond a float": ("1e999", "beyond the range"),
    "huge integer": ("9" * 5000, "not JSON"),
    "nested bomb": (nested(100_000), "nested too deeply"),
    "object bomb": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
    "duplicate key": ('{"a": 1, "a": 2}', "'a' is twice"),
    "cut": ('"hi', "not JSON"),
}


@pytest.mark.parametrize("kind", [kind for kind in TURNS if kind != "hh_rlhf"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_rejected_with_its_place(tmp_path: Path, kind: str, name: str) -> None:
    value, reason = HOSTILE[name]
    good, with_text = lines(kind)
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([good, b"", with_text(value), good]))
    records = list(source(kind, path).read())
    check_written(records)
    first, bad, last = records
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(path), 3)
    assert reason in bad.reason


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'"hi"', "expected a JSON object, found str"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", ""),
        (b"\x00", "not JSON"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
        (b'{"id": "caf\xe9"}', "is not UTF-8"),
        (b'{"id": "\xed\xa0\x80"}', "is not UTF-8"),
        (b'{"id": "1", "id": "2"}', "'id' is twice"),
        (b"{'id': 1}", "not JSON"),
        (b'{"id": "' + b"m" * 10_000_000 + b'"}', "a line of 10,000,011 bytes; the limit is 8,388,608"),
    ],
)
def test_a_hostile_line_is_rejected_with_its_place(tmp_path: Path, kind: str, line: bytes, reason: str) -> None:
    good, _ = lines(kind)
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n" + line + b"\r\n" + good)
    records = list(source(kind, path).read())
    check_written(records)
    first, bad, last = records
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(path), 3)
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b'{"id": "1"},\n', "remove the comma after the record"),
        (b'{"id": "1",}\n', "remove the comma before }"),
        (b'{"id": "1"} {"id": "2"}\n', "several records stand one a line in a file named .jsonl"),
        (b'{\n  "id": "1"\n}\n', "write each record on one line"),
        (b'[{"id": "1"}]\n', "found list; write each record on one line"),
        ('{"id": "1"}\n'.encode("utf-16"), "convert the file from UTF-16 to UTF-8"),
        ('{"id": "caf\xe9"}\n'.encode("latin-1"), "convert the file from its encoding to UTF-8"),
        (gzip.compress(b'{"id": "1"}\n'), "compressed with gzip, so add .gz to the file's name"),
    ],
)
def test_a_usual_mistake_is_rejected_with_what_to_do(tmp_path: Path, content: bytes, remedy: str) -> None:
    (tmp_path / "f.jsonl").write_bytes(content)
    for kind in ("chat_jsonl", "openai_messages"):
        bad = next(iter(source(kind, tmp_path / "f.jsonl").read()))
        assert isinstance(bad, Rejected) and bad.reason.endswith(remedy)


def test_lines_in_a_json_file_are_rejected_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"messages": []}\n' * 2)
    (bad,) = source("openai_messages", tmp_path / "f.json").read()
    assert isinstance(bad, Rejected) and bad.reason.endswith("several records stand one a line in a file named .jsonl")


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (nested(65), "nested more than 64 levels"),
        (str(2**64), "more than 64 bits"),
        (r'"\udfff"', "lone surrogate"),
        (r'{"\ud800": 1}', "lone surrogate"),
    ],
)
def test_hostile_metadata(tmp_path: Path, kind: str, value: str, reason: str) -> None:
    path = tmp_path / "f.jsonl"
    for given_value, expected in ((value, Rejected), (nested(60), Dialogue), (str(2**63), Dialogue)):
        record = json.dumps(TURNS[kind](["hi", "yo"]) | {EXTRA[kind]: {"a": "MARK"}}).replace('"MARK"', given_value)
        path.write_text(record)
        (read,) = source(kind, path).read()
        assert isinstance(read, expected)
        check_written([read])
        if isinstance(read, Rejected):
            assert reason in read.reason


@pytest.mark.parametrize("time", ["1e300", "1700000000000", "1" + "0" * 400, '"noon"', "true", "-1e15"])
def test_hostile_times(tmp_path: Path, time: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"id": "1", "messages": [{{"speaker": "A", "text": "hi", "time": {time}}}]}}')
    (bad,) = source("chat_jsonl", path).read()
    assert isinstance(bad, Rejected)
    assert ("milliseconds" in bad.reason) == (time == "1700000000000")


@pytest.mark.parametrize("kind", TURNS)
def test_one_speaker_where_two_are_needed_is_filtered_and_counted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f.jsonl"
    alone: dict[str, Any] = {
        "chat_jsonl": {"id": "1", "messages": [{"speaker": "A", "text": "hi"}, {"speaker": "A", "text": "ho"}]},
        "openai_messages": {"messages": [{"role": "assistant", "content": "hi"}]},
        "sharegpt": {"conversations": [{"from": "gpt", "value": "hi"}]},
        "hh_rlhf": {"chosen": "\n\nAssistant: hi"},
    }
    path.write_text(json.dumps(alone[kind]) + "\n" + json.dumps(TURNS[kind](["hi", "yo"])))
    dialogues = [record for record in source(kind, path).read() if isinstance(record, Dialogue)]
    assert len(dialogues) == 2
    ledger = Ledger(read=2)
    assert len(list(passing(dialogues, Filters(), ledger))) == 1
    assert ledger.filtered == {"fewer than 2 speakers": 1}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"17",
        b"[17]",
        b'{"a": 17}',
        b'[{"a": NaN}]',
        b"\xff\xfe\x00",
        b"\x00" * 99,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"[" * 500 + b"]" * 500,
        b'{"a": 1, "a": 1}',
        b"9" * 5_000,
        b"x" * 10_000_000,
        b"<PLAY>" * 20_000,
        ENTITIES,
        b'<?xml version="1.0" encoding="utf-77"?><PLAY/>',
        b'a,b\n"',
        b"a,a\n1,2\n",
        b"a,b\n1\n",
        b"a\n1,2\n",
    ],
    ids=lambda content: content[:12].decode("latin-1"),
)
def test_a_hostile_file_is_rejected_and_counted(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / NAMES[kind]
    path.write_bytes(content)
    if kind == "irc_ubuntu":
        (tmp_path / "2005-07-06.annotation.txt").write_text("0 0 -\n0 1 -\n")
    records = list(source(kind, path).read())
    check_written(records)
    assert not any(isinstance(record, Dialogue) for record in records)
    assert records


@given(content=st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"\n", b"{}", b"\r\n", b"\n\n"]))))
@pytest.mark.parametrize("kind", TURNS)
def test_any_bytes_as_lines(tmp_path_factory: pytest.TempPathFactory, kind: str, content: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "f.jsonl"
    path.write_bytes(b"".join(content))
    records = list(source(kind, path).read())
    check_written(records)
    given_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(records) == sum(bool(line.strip()) for line in given_lines)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "messages",
                    "speaker",
                    "text",
                    "time",
                    "metadata",
                    "character",
                    "participants",
                    "role",
                    "content",
                    "name",
                    "conversations",
                    "from",
                    "value",
                    "chosen",
                    "type",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(objects=st.lists(JSON, max_size=4))
@pytest.mark.parametrize("kind", TURNS)
def test_any_json_as_lines(tmp_path_factory: pytest.TempPathFactory, kind: str, objects: list[Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    records = list(source(kind, path).read())
    check_written(records)
    assert len(records) == len(objects)


@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("kind", NAMES)
def test_any_bytes_as_a_file(tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / NAMES[kind]).write_bytes(content)
    if kind == "irc_ubuntu":
        (folder / "2005-07-06.annotation.txt").write_text("0 0 -\n0 1 -\n")
    records = list(source(kind, folder / NAMES[kind]).read())
    check_written(records)
    is_empty = content.removeprefix(b"\xef\xbb\xbf").translate(None, b" \t\r\n") in (b"[]", b"{}")
    assert records or is_empty


def test_a_row_that_is_not_utf8_is_the_only_one_rejected(tmp_path: Path) -> None:
    columns = ["user 1 personas", "user 2 personas", "Best Generated Conversation"]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *([["I ski.", "I sew.", "User 1: caf\xe9\nUser 2: yo"]] * 3)])
    content = text.getvalue().encode()
    place = content.index("\xe9".encode(), len(content) // 2)
    path = tmp_path / "chats.csv"
    path.write_bytes(content[:place] + b"\xe9" + content[place + 2 :])
    good, bad, last = source("synthetic_persona_chat", path).read()
    assert isinstance(good, Dialogue) and isinstance(last, Dialogue)
    assert isinstance(bad, Rejected)
    assert bad.line == 2
    assert "surrogate" in bad.reason


def test_a_long_cell_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    rows = "".join(f'a,b,"User 1: {text}\nUser 2: yo"\n' for text in ("m" * (MAX_LINE_BYTES + 1), "hi"))
    path.write_text(f"user 1 personas,user 2 personas,Best Generated Conversation\n{rows}")
    bad, good = source("synthetic_persona_chat", path).read()
    assert isinstance(bad, Rejected)
    assert "the limit is 8,388,608" in bad.reason
    assert isinstance(good, Dialogue)
