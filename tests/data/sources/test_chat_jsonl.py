"""One's own chat logs: good records become dialogues, bad ones are rejected with file, line and reason."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.format.dialogue import Dialogue, Message
from data.sources.chat_jsonl import ChatJsonlSource
from data.sources.record import Rejected, SourceError


def source(path: Path, **settings: Any) -> ChatJsonlSource:
    return ChatJsonlSource(kind="chat_jsonl", path=str(path), **settings)


def record(**changes: Any) -> dict[str, Any]:
    messages = [{"speaker": "Ann", "text": "hi", "time": 1}, {"speaker": "Bob", "text": "yo\u2581"}]
    return {"id": "1", "messages": messages} | changes


def test_records_become_dialogues(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    lines = [record(character="Bob", participants=["u1"], metadata={"a": 1}), record(id="2")]
    path.write_bytes(gzip.compress("\n\n".join(json.dumps(line) for line in lines).encode()))
    first, second = source(path).read()
    messages = (Message("Ann", "hi", 1), Message("Bob", "yo\u2581"))
    assert first == Dialogue("1", messages, "Bob", ("u1",), {"a": 1})
    assert isinstance(second, Dialogue)
    assert second.character in ("Ann", "Bob")
    (again,) = [d for d in source(path).read() if isinstance(d, Dialogue) and d.id == "2"]
    assert again.character == second.character
    assert [d.character for d in source(path, character="Ann").read() if isinstance(d, Dialogue)] == ["Bob", "Ann"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "1", "mess', "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b"[1]", "expected a JSON object"),
        (json.dumps(record(mesages=[])).encode(), "unknown key 'mesages'"),
        (json.dumps(record(id=[3])).encode(), "id is [3]"),
        (json.dumps({"messages": record()["messages"]}).encode(), "id is missing"),
        (json.dumps(record(messages="x")).encode(), "expected a list"),
        (json.dumps(record(messages=[])).encode(), "narrator"),
        (json.dumps(record(character="Zed")).encode(), "writes nothing"),
        (json.dumps(record(participants="u1")).encode(), "participants"),
        (json.dumps(record(messages=[{"speaker": "A", "text": "\ud800"}])).encode(), "lone surrogate"),
        (
            json.dumps(
                record(messages=[{"speaker": s, "text": "x", "time": t} for s, t in (("A", 5), ("B", 3))])
            ).encode(),
            "2 s before",
        ),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_records_are_rejected_with_their_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n\n" + line + b"\n" + json.dumps(record(id="9")).encode())
    first, bad, last = source(path).read()
    assert isinstance(first, Dialogue)
    assert isinstance(last, Dialogue)
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(path), 3)
    assert reason in bad.reason
    assert len(bad.record) <= 500


def test_missing_files_say_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("")
    with pytest.raises(SourceError, match=r"did you mean .*chats\.jsonl\?"):
        list(source(tmp_path / "chat.jsonl").read())
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"without any \.jsonl"):
        source(tmp_path / "empty").files()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(record()).encode())[:-9])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz.*damaged"):
        list(source(tmp_path / "cut.jsonl.gz").read())


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(record(id=name)))
    (tmp_path / "notes.txt").write_text("not a log")
    assert [d.id for d in source(tmp_path).read() if isinstance(d, Dialogue)] == ["a.jsonl", "b.jsonl"]
