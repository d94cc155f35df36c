"""A hashed file holds what was written, with its hash, however it is cut; and errors of the disk are raised."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint import hashed_file as module
from train.checkpoint.hashed_file import AbandonedError, file_hash, hashed_file


@given(parts=st.lists(st.binary(max_size=40), max_size=6), piece=st.integers(1, 9), sync_every=st.integers(1, 30))
def test_content_and_hash(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], piece: int, sync_every: int
) -> None:
    path = tmp_path_factory.mktemp("hashed") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        patch.setattr(module, "_SYNC_EVERY", sync_every)
        with hashed_file(path, threading.Event()) as file:
            for part in parts:
                assert file.write(memoryview(part)) == len(part)
    assert path.read_bytes() == b"".join(parts)
    assert file.hash == xxhash.xxh3_128_hexdigest(b"".join(parts)) == file_hash(path)


def test_a_write_that_takes_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hashed_file(tmp_path / "f", threading.Event()) as file:
        inner = file._file
        partial = SimpleNamespace(write=lambda view: inner.write(view[:3]), fileno=inner.fileno)
        monkeypatch.setattr(file, "_file", partial)
        assert file.write(b"0123456789") == 10
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert file.hash == file_hash(tmp_path / "f")


def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space left"), hashed_file(Path("/dev/full"), threading.Event()) as file:
        file.write(b"x")


def test_an_abandoned_file_is_not_written_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1)
    abandoned = threading.Event()
    with hashed_file(tmp_path / "file", abandoned) as file:
        file.write(b"x")
        abandoned.set()
        with pytest.raises(AbandonedError):
            file.write(b"y")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_background_syncs_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a failed write-back once: the fsync at the end may succeed."""

    def fails(descriptor: int) -> None:
        raise OSError("write-back failed")

    monkeypatch.setattr(module, "_SYNC_EVERY", 1)
    monkeypatch.setattr("os.fdatasync", fails)
    with pytest.raises(OSError, match="write-back failed"), hashed_file(tmp_path / "f", threading.Event()) as file:
        file.write(b"x")


def test_a_file_is_synced_after_its_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with hashed_file(tmp_path / "f", threading.Event()) as file:
        file.write(b"abc")
        assert sizes == []
    assert sizes == [3]
