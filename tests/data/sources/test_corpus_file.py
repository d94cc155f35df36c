"""Corpora are read as they are distributed; whatever holds a file, its name and content are the same."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.sources.corpus_file import find_corpus_files, read_corpus_files
from data.sources.record import SourceError

CONTENT = {"corpus/a/one.csv": b"1\n", "corpus/b/two.csv": b"2\n", "corpus/notes.md": b"not data"}
CSV = (".csv",)


def tar(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in CONTENT.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read(path: Path) -> dict[str, bytes]:
    return {file.name: file.content for file in read_corpus_files(find_corpus_files(str(path), CSV), CSV)}


@pytest.mark.parametrize("name", ["c.tar.xz", "c.tar.gz", "c.tgz", "c.tar", "c.zip"])
@pytest.mark.parametrize("as_directory", [False, True])
def test_an_archive_is_read_in_place(tmp_path: Path, name: str, as_directory: bool) -> None:
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for inside, content in CONTENT.items():
                archive.writestr(inside, content)
    else:
        tar(path, {"xz": "w:xz", "gz": "w:gz", "tgz": "w:gz", "tar": "w"}[name.rsplit(".", 1)[1]])
    (tmp_path / "LICENSE").write_text("free")
    given = tmp_path if as_directory else path
    assert read(given) == {"corpus/a/one.csv": b"1\n", "corpus/b/two.csv": b"2\n"}
    (file, _) = read_corpus_files([path], CSV)
    assert (file.place, file.stem) == (f"{path}/{'' if name.endswith('.zip') else './'}corpus/a/one.csv", "one")


def test_an_unpacked_corpus_is_found_in_its_folders(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "corpus" / "b" / "three.csv.gz").write_bytes(gzip.compress(b"3\n"))
    assert list(read(tmp_path).values()) == [b"1\n", b"3\n", b"2\n"]


@pytest.mark.parametrize("name", ["c.tar.gz", "c.zip", "c.csv.gz"])
def test_a_file_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"0" * 10_000
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.csv", content)
    elif name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("a.csv")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    else:
        path.write_bytes(gzip.compress(content))
    monkeypatch.setattr("data.sources.corpus_file.MAX_PACKED_BYTES", 10_000)
    assert list(read(path).values()) == [content]
    monkeypatch.setattr("data.sources.corpus_file.MAX_PACKED_BYTES", 9_999)
    with pytest.raises(SourceError, match="more than 9,999 bytes unpacked"):
        read(path)
    (tmp_path / "plain.csv").write_bytes(content)
    assert list(read(tmp_path / "plain.csv").values()) == [content], "what is not packed has no limit"


def test_damaged_and_foreign_files_are_one_error(tmp_path: Path) -> None:
    tar(tmp_path / "whole.tar.xz", "w:xz")
    whole = (tmp_path / "whole.tar.xz").read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.zip").write_bytes(b"PK")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"1,2\n" * 99)[:-9])
    for name in ("cut.tar.xz", "no.zip", "cut.csv.gz"):
        with pytest.raises(SourceError, match=rf"{name}: cannot be read"):
            read(tmp_path / name)
    with pytest.raises(SourceError, match=r"whole\.tar\.xz: an archive without any \.json file"):
        list(read_corpus_files([tmp_path / "whole.tar.xz"], (".json",)))
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9")
    (file,) = read_corpus_files([tmp_path / "latin.csv"], CSV)
    assert file.text() == "caf\udce9", "no record that holds this becomes a dialogue"
