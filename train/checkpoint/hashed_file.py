"""Write large files while hashing and syncing them in threads, so that a file takes as long as the slowest of these."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash

_Hash = xxhash.xxh3_128
"""Detects damage, not forgery: ten times as fast as SHA-256, which would be slower than a disk."""
_PIECE = 16 << 20
_SYNC_EVERY = 256 << 20


class AbandonedError(Exception):
    """The file is no longer wanted."""


class HashedFile:
    """The file object that `hashed_file` yields, for torch.save."""

    def __init__(self, file: IO[bytes], threads: Executor, abandoned: threading.Event) -> None:
        self._file, self._threads, self._abandoned = file, threads, abandoned
        self._digest = _Hash()
        self._sync: Future[None] | None = None
        self._unsynced = 0

    @property
    def hash(self) -> str:
        """Hex digest of what has been written."""
        return self._digest.hexdigest()

    def write(self, content: bytes | memoryview) -> int:
        """Write all of `content`. Raises AbandonedError once the event is set."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE):
            if self._abandoned.is_set():
                raise AbandonedError
            piece = view[start : start + _PIECE]
            hashed = self._threads.submit(self._digest.update, piece)
            try:
                self._write_piece(piece)
            finally:
                hashed.result()  # the caller may reuse the memory after this
        return len(view)

    def flush(self) -> None: ...

    def sync(self) -> None:
        """Fsync. Raises OSError for errors of earlier background syncs too."""
        if self._sync is not None:
            self._sync.result()
        os.fsync(self._file.fileno())

    def _write_piece(self, piece: memoryview) -> None:
        while piece:
            n_written = self._file.write(piece)
            piece = piece[n_written:]
            self._unsynced += n_written
        if self._unsynced >= _SYNC_EVERY and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._sync, self._unsynced = self._threads.submit(os.fdatasync, self._file.fileno()), 0


@contextmanager
def hashed_file(path: Path, abandoned: threading.Event) -> Iterator[HashedFile]:
    """Open a file for writing; at the end of the block it is fsynced. `.hash` is then what `file_hash` returns."""
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(2) as threads:
        writer = HashedFile(file, threads, abandoned)
        yield writer
        writer.sync()


def file_hash(path: Path) -> str:
    """Hex XXH3-128 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _Hash).hexdigest()
