"""Parquet, JSON lines and data sets of the Hub in any column names; the Hub is a folder here, or a silent server."""

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import data.sources.hub
from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.hub import DatasetsSource
from data.sources.record import Rejected, SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPENAI = {"kind": "openai_messages", "assistant": "Zed"}


def source(**settings: Any) -> DatasetsSource:
    return DatasetsSource.model_validate_json(json.dumps({"kind": "datasets", "format": OPENAI} | settings))


def turns(*texts: str) -> list[dict[str, str | None]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text, "name": None} for i, text in enumerate(texts)]


def write(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)


def test_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [{"messages": turns("hi", "yo"), "id": 7, "lang": "en"}, {"messages": turns("hé", "日本"), "id": None}])
    first, second = source(path=str(path)).read()
    assert first == Dialogue("7", (Message("User", "hi"), Message("Zed", "yo")), "Zed", (), {"lang": "en"})
    assert second == Dialogue("a.parquet:2", (Message("User", "hé"), Message("Zed", "日本")), "Zed")
    assert source(path=str(tmp_path)).inputs() == [path]


def test_parts_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [{"messages": turns(str(i), "yo") if i % 3 else None} for i in range(11)])
    made = source(path=str(path))
    whole = list(made.read())
    assert [record.line for record in whole if isinstance(record, Rejected)] == [1, 4, 7, 10]
    for n_parts in (1, 2, 3, 6, 9):
        assert [record for part in range(n_parts) for record in made.read_file(path, part, n_parts)] == whole
    assert [made.n_parts(path, size) for size in (1, 10**9)] == [6, 1]


def test_columns_are_read_under_other_names(tmp_path: Path) -> None:
    when = datetime(2024, 5, 1, tzinfo=UTC)
    rows = [
        {
            "turns": [{"speaker": "Ann", "text": "hi", "time": when}, {"speaker": NARRATOR, "text": "x", "time": None}],
            "who": ["u1"],
            "about": {"day": when.date(), "stars": 5},
            "unread": b"\x00",
        }
    ]
    write(tmp_path / "a.parquet", rows)
    columns = {"messages": "turns", "participants": "who", "metadata": "about"}
    (dialogue,) = source(path=str(tmp_path), format={"kind": "chat_jsonl"}, columns=columns).read()
    said = (Message("Ann", "hi", when.timestamp()), Message(NARRATOR, "x"))
    assert dialogue == Dialogue("a.parquet:1", said, "Ann", ("u1",), {"day": "2024-05-01", "stars": 5})
    (bad,) = source(path=str(tmp_path), columns={"messages": "chat"}).read()
    assert isinstance(bad, Rejected)
    assert bad.reason == "no column 'chat'; found 'turns', 'who', 'about', 'unread'"


def test_a_misspelled_key_of_columns_is_an_error(tmp_path: Path) -> None:
    """It would become metadata, and the participants, the flag or the system prompt would be missing without a word."""
    rows = {"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "of": "you"}
    (tmp_path / "a.jsonl").write_text(json.dumps(rows) + "\n")
    for misspelled, right in (("partcipants", "participants"), ("sytem", "system"), ("trianed", "trained")):
        with pytest.raises(ValueError, match=f"unknown key '{misspelled}'; did you mean '{right}'"):
            source(path=str(tmp_path), columns={"messages": "turns", misspelled: "of"})
    columns = {"messages": "turns", "mood": "of"}
    (dialogue,) = source(path=str(tmp_path), format={"kind": "openai_messages"}, columns=columns).read()
    assert isinstance(dialogue, Dialogue) and dialogue.metadata == {"mood": "you"}


def test_a_column_that_a_line_lacks_is_null_there(tmp_path: Path) -> None:
    said = [{"speaker": "Ann", "text": "hi"}, {"speaker": "Bob", "text": "yo"}]
    rows = [{"turns": said, "who": ["u1"]}, {"turns": said, "who": None}, {"turns": said}, {"who": ["u2"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"messages": "turns", "participants": "who"}
    *good, bad = source(path=str(tmp_path), format={"kind": "chat_jsonl"}, columns=columns).read()
    assert [one.participants for one in good if isinstance(one, Dialogue)] == [("u1",), (), ()]
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith("no messages;") and bad.reason.endswith("; no column 'turns'; found 'who'")


@pytest.mark.parametrize(
    ("format_", "column", "value"),
    [
        ({"kind": "hh_rlhf", "human": "Ann", "assistant": "Zed"}, "chosen", "\n\nHuman: hi\n\nAssistant: yo"),
        (
            {"kind": "sharegpt", "user": "Ann", "assistant": "Zed"},
            "conversations",
            [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
        ),
    ],
)
def test_other_formats(tmp_path: Path, format_: dict[str, str], column: str, value: Any) -> None:
    write(tmp_path / "a.parquet", [{"text": value}])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": value}) + "\n{\n")
    first, second, bad = source(path=str(tmp_path), format=format_, columns={column: "text"}).read()
    assert isinstance(first, Dialogue) and isinstance(second, Dialogue)
    assert first.messages == second.messages == (Message("Ann", "hi"), Message("Zed", "yo"))
    assert (first.id, second.id) == ("a.parquet:1", "b.jsonl@0")
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(tmp_path / "b.jsonl"), 2)


def test_hostile_rows_of_parquet(tmp_path: Path) -> None:
    text = pa.array([b"hi", b"caf\xe9", b"\x00", b"m" * 8_388_609, b"hi"], pa.binary()).view(pa.string())
    columns = {
        "id": pa.array(["1", "2", "3", "4", "5"]),
        "chosen": transcripts(text),
        "when": pa.array([1, 2, 3, 4, 2**62]),
    }
    columns["when"] = columns["when"].cast(pa.timestamp("ms"))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    good, latin, nul, long, late = source(path=str(tmp_path), format={"kind": "hh_rlhf"}).read()
    assert isinstance(good, Dialogue) and isinstance(nul, Dialogue)
    assert isinstance(latin, Rejected) and isinstance(long, Rejected)
    assert "is not UTF-8" in latin.reason
    assert latin.line == 2
    assert (long.line, "the limit is" in long.reason) == (4, True)
    assert isinstance(late, Rejected)
    assert (late.line, "a value that cannot be read" in late.reason) == (5, True)


def transcripts(texts: pa.Array) -> pa.Array:
    content = [b"\n\nHuman: " + text + b"\n\nAssistant: yo" for text in texts.view(pa.binary()).to_pylist()]
    return pa.array(content, pa.binary()).view(pa.string())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not Parquet at all", b"PAR1" + b"\x00" * 99 + b"PAR1"])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    made = source(path=str(tmp_path))
    with pytest.raises(SourceError, match=r"a\.parquet: cannot be read as Parquet"):
        list(made.read())
    with pytest.raises(SourceError, match=r"a\.parquet: cannot be read as Parquet"):
        made.n_parts(tmp_path / "a.parquet", 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"path": "x", "hub": {"name": "a/b", "split": "train"}},
        {"hub": {"name": "a/b", "split": "train", "revision": "main"}},
        {"hub": {"name": "a/b"}},
        {"hub": {"name": "a/b/c", "split": "train"}},
    ],
)
def test_recipes_that_name_no_place(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        source(**settings)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is read as if it were the data set a/b of the Hub at COMMIT."""
    folder = tmp_path / "hub"
    load = datasets.load_dataset

    def of_folder(name: str, config: str | None, *, revision: str, **settings: Any) -> Any:
        assert (name, revision) == ("a/b", COMMIT)
        return load(str(folder), config, **settings)

    monkeypatch.setattr(datasets, "load_dataset", of_folder)
    monkeypatch.setattr(data.sources.hub, "_look_up", lambda hub: None)
    return folder


def of_hub(split: str = "train") -> DatasetsSource:
    return source(hub={"name": "a/b", "revision": COMMIT, "split": split})


def test_shards_of_the_hub(hub: Path) -> None:
    for shard in range(3):
        rows = [{"messages": turns(f"{shard} {row}", "yo" if row != 1 else "")[: 2 - (row == 2)]} for row in range(4)]
        write(hub / "data" / f"train-0000{shard}-of-00003.parquet", rows)
    made = of_hub()
    (path,) = made.files()
    assert (str(path), made.inputs(), made.n_parts(path, 1)) == ("a/b", [], 3)
    whole = list(made.read())
    assert len(whole) == 12
    assert isinstance(whole[4], Dialogue)
    assert (whole[4].id, whole[4].messages[0].text) == ("a/b/train:1:1", "1 0")
    bad = whole[6]
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (f"a/b@{COMMIT}", "1:3")
    for n_parts in (2, 3, 5):
        assert [record for part in range(n_parts) for record in made.read_file(path, part, n_parts)] == whole


def test_what_the_hub_cannot_give(hub: Path) -> None:
    write(hub / "train.parquet", [{"messages": turns("hi", "yo")}])
    with pytest.raises(SourceError, match=r"a/b, split trian: cannot be opened \(ValueError: Bad split: trian"):
        list(of_hub("trian").read())
    (hub / "train.parquet").unlink()
    (hub / "train.jsonl").write_text(json.dumps({"messages": turns("hi", "yo")}) + "\n{" * 3)
    with pytest.raises(SourceError, match=r"a/b, split train: .* give their path"):
        list(of_hub().read())


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_hub_is_given_up(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent_server)
    monkeypatch.setattr(data.sources.hub, "LOOK_UP_SECONDS", 0.2)
    with pytest.raises(SourceError, match=r"a/b at 0123.*: cannot be looked up \(ReadTimeout.*check the name"):
        of_hub().files()


def test_a_missing_revision_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: huggingface_hub.DatasetInfo(id="a/b", sha=COMMIT)
    )
    with pytest.raises(SourceError, match=f"no revision; the newest is now {COMMIT}: write revision: {COMMIT}"):
        source(hub={"name": "a/b", "split": "train"}).files()
    assert [str(path) for path in of_hub().files()] == ["a/b"]
