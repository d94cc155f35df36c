"""Of a folder, hidden files are not read, suffixes match in any case, and whatever is not read is named."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.format.dialogue import Dialogue
from data.sources.folder_files import describe_unread, find_files, is_packed, unread_files
from data.sources.record import SourceError
from data.sources.registry import SOURCES

LINE = json.dumps({"id": "c", "messages": [{"speaker": "Ann", "text": "Hi"}, {"speaker": "Bob", "text": "Yo"}]})
JSONL = (".jsonl", ".jsonl.gz")


def folder(path: Path) -> Path:
    for name in ("a.jsonl", "b.ndjson", "c.JSONL", ".hidden.jsonl", "._a.jsonl", "e.txt", "f.json"):
        (path / name).write_text(LINE)
    (path / "d.jsonl.bz2").write_bytes(bz2.compress(LINE.encode()))
    (path / "g.NDJSON.GZ").write_bytes(gzip.compress(LINE.encode()))
    for inner in (".cache", "2024"):
        (path / inner).mkdir()
        (path / inner / "h.jsonl").write_text(LINE)
    return path


def test_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    files = find_files(str(folder(tmp_path)), JSONL)
    assert [file.name for file in files] == ["a.jsonl", "b.ndjson", "c.JSONL", "g.NDJSON.GZ"]
    unread = unread_files(str(tmp_path), files)
    hidden = ["._a.jsonl", ".cache/h.jsonl", ".hidden.jsonl"]
    assert unread == ["2024/h.jsonl", "d.jsonl.bz2", "e.txt", "f.json", *hidden], "hidden ones last"
    assert describe_unread(unread) == (
        "7 files not read: 2024/h.jsonl, d.jsonl.bz2, e.txt, f.json, ._a.jsonl, ...; decompress .bz2 files to have "
        "them read"
    )
    assert describe_unread(["e.txt"]) == "1 file not read: e.txt"
    assert unread_files(str(tmp_path / "a.jsonl"), []) == [], "a file alone leaves none out"


def test_links_that_are_not_followed_are_named(tmp_path: Path) -> None:
    for name in ("logs", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("{}")
    logs = tmp_path / "logs"
    (logs / "b.jsonl").symlink_to(tmp_path / "more" / "a.jsonl")
    (logs / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (logs / "inner").symlink_to(tmp_path / "more")
    files = find_files(str(logs), pattern="**/*")
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl"]
    gone, inner = unread_files(str(logs), files)
    assert gone == "gone.jsonl (a link to a missing file)"
    assert inner == "inner (a link to a folder; give it as a source of its own)"


def test_every_found_file_gives_its_dialogue(tmp_path: Path) -> None:
    source = SOURCES["chat_jsonl"].model_validate({"kind": "chat_jsonl", "path": str(folder(tmp_path))})
    names = [file.relative_to(tmp_path).as_posix() for file in source.files()]
    assert names == ["2024/h.jsonl", "a.jsonl", "b.ndjson", "c.JSONL", "g.NDJSON.GZ"]
    read = list(source.read())
    assert len(read) == 5 and all(isinstance(record, Dialogue) for record in read)
    assert not set(source.unread()) & set(names)
    assert len(source.unread()) + len(names) == sum(file.is_file() for file in tmp_path.rglob("*"))


def test_a_list_with_an_uppercase_suffix_is_a_list(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "a.JSON").write_text(json.dumps([chat, chat], indent=1))
    source = SOURCES["openai_messages"].model_validate({"kind": "openai_messages", "path": str(tmp_path)})
    assert [type(record) for record in source.read()] == [Dialogue, Dialogue]


@pytest.mark.parametrize("name", ["logs.zip", "LOGS.TAR"])
def test_hidden_members_of_an_archive_are_not_read(tmp_path: Path, name: str) -> None:
    path, members = tmp_path / name, ("a.jsonl", "b.NDJSON", "__MACOSX/._a.jsonl")
    if name == "logs.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, LINE)
    else:
        with tarfile.open(path, "w") as tar:
            for member in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(LINE)
                tar.addfile(entry, io.BytesIO(LINE.encode()))
    source = SOURCES["chat_jsonl"].model_validate({"kind": "chat_jsonl", "path": str(tmp_path)})
    assert [type(record) for record in source.read()] == [Dialogue, Dialogue]


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["chat_jsonl", "feedback_events", "datasets"])
def test_other_compression_is_refused_by_name(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(b"\0")
    settings = {"kind": kind, **({"format": {"kind": "chat_jsonl"}} if kind == "datasets" else {})}
    for given in (path, tmp_path):
        source = SOURCES[kind].model_validate({**settings, "path": str(given)})
        with pytest.raises(SourceError, match=rf"d\.jsonl\{suffix}.*decompress") as raised:
            list(source.read())
        assert str(given) in str(raised.value)


def test_archives_are_read_by_corpora_only(tmp_path: Path) -> None:
    assert not any(map(is_packed, ("a.jsonl", "a.jsonl.gz", "a.tar.xz", "a.tar.gz", "a.zip", "A.TGZ")))
    assert all(map(is_packed, ("a.jsonl.bz2", "a.JSONL.XZ", "a.tar.bz2", "a.7z")))
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"a\.tar\.gz.*decompress"):
        find_files(str(tmp_path / "a.tar.gz"), JSONL)
