"""The formats whose speakers are roles: OpenAI messages and ShareGPT, as JSON lines and as a JSON list."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.openai_messages import OpenaiMessagesSource
from data.sources.record import Rejected
from data.sources.sharegpt import SharegptSource

OPENAI = [
    {"role": "system", "content": "You are Zed."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
    {"role": "user", "content": "me too", "name": "Bob"},
    {"role": "assistant", "content": "Yo"},
]
SHAREGPT = [
    {"from": "system", "value": "You are Zed."},
    {"from": "human", "value": "Hi!"},
    {"from": "gpt", "value": "Yo"},
]


def openai(path: Path, **settings: Any) -> list[Any]:
    return list(OpenaiMessagesSource(kind="openai_messages", path=str(path), **settings).read())


def sharegpt(path: Path, **settings: Any) -> list[Any]:
    return list(SharegptSource(kind="sharegpt", path=str(path), **settings).read())


def test_openai_messages(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    lines = [{"messages": OPENAI, "id": "c1", "model": "m"}, {"messages": OPENAI[1:]}]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    first, second = openai(path, assistant="Zed")
    said = (Message("User", "Hi\n!"), Message("Bob", "me too"), Message("Zed", "Yo"))
    assert first == Dialogue("c1", (Message(NARRATOR, "You are Zed."), *said), "Zed", (), {"model": "m"})
    assert second == Dialogue("log.jsonl@277", said, "Zed")


def test_sharegpt(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": "c1", "conversations": SHAREGPT, "lang": "en"}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": SHAREGPT[1:]}) + "\n")
    first, second = sharegpt(tmp_path, user="Ann")
    said = (Message("Ann", "Hi!"), Message("Assistant", "Yo"))
    assert first == Dialogue("c1", (Message(NARRATOR, "You are Zed."), *said), "Assistant", (), {"lang": "en"})
    assert second == Dialogue("b.jsonl@0", said, "Assistant")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"mesages": []}', "no messages; expected messages or conversations, found keys ['mesages']"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "message 0: role is 'tool'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message is by the assistant"),
        ('{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}', "message 0: content is missing"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "message 0: content holds {'type': 'image_url'}:",
        ),
        ('{"messages": ["hi"]}', "message 0: expected an object with role and content, found hi"),
    ],
)
def test_bad_openai_records(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": OPENAI}) + f"\n{line}\n")
    good, bad = openai(tmp_path)
    assert isinstance(good, Dialogue)
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(tmp_path / "log.jsonl"), 2)
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "expected a JSON object, found int"),
        ({"items": []}, "no messages; expected messages or conversations"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "message 0: from is 'tool'"),
        ({"conversations": SHAREGPT[:2]}, "no message is by the assistant"),
        ({"conversations": [{"from": "gpt"}]}, "message 0: content is missing"),
    ],
)
def test_bad_sharegpt_records(tmp_path: Path, record: Any, reason: str) -> None:
    (tmp_path / "log.json").write_text(json.dumps([record]))
    (bad,) = sharegpt(tmp_path)
    assert isinstance(bad, Rejected)
    assert bad.line == 1
    assert reason in bad.reason


def test_a_file_that_is_no_list_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text("{}")
    (bad,) = sharegpt(tmp_path)
    assert (bad.file, bad.line) == (str(tmp_path / "log.json"), "whole file")
    assert bad.reason == "the file holds a dict, expected a list of records"
    (tmp_path / "log.json").write_text("[")
    (bad,) = openai(tmp_path)
    assert (bad.line, bad.record) == ("whole file", "[")
    assert bad.reason.startswith("not JSON: ")
