"""A hashed file holds what was written, with its hash, however it is cut; and errors of the disk are raised."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint import hashed_file
from train.checkpoint.hashed_file import AbandonedError, HashedFile, file_hash


@given(parts=st.lists(st.binary(max_size=40), max_size=6), piece=st.integers(1, 9), sync_every=st.integers(1, 30))
def test_content_and_hash(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], piece: int, sync_every: int
) -> None:
    path = tmp_path_factory.mktemp("hashed") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed_file, "_PIECE", piece)
        patch.setattr(hashed_file, "_SYNC_EVERY", sync_every)
        with HashedFile(path, threading.Event()) as file:
            for part in parts:
                assert file.write(memoryview(part)) == len(part)
    assert path.read_bytes() == b"".join(parts)
    assert file.hash == xxhash.xxh3_128_hexdigest(b"".join(parts)) == file_hash(path)


def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space left"), HashedFile(Path("/dev/full"), threading.Event()) as file:
        file.write(b"x")


def test_an_abandoned_file_is_not_written_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "_PIECE", 1)
    abandoned = threading.Event()
    with HashedFile(tmp_path / "file", abandoned) as file:
        file.write(b"x")
        abandoned.set()
        with pytest.raises(AbandonedError):
            file.write(b"y")
    assert (tmp_path / "file").read_bytes() == b"x"
