"""A file that is hashed and brought to the disk while it is written, not in three passes one after the other."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

_Hash = xxhash.xxh3_128
"""It is to find damage, not forgery: ten times as fast as SHA-256, which would be slower than a disk."""
_PIECE = 16 << 20
_SYNC_EVERY = 256 << 20


class AbandonedError(Exception):
    """Nobody wants the file any more."""


class HashedFile:
    """What `torch.save` writes to (`write`, `flush`). At the end of its block the file is synced, and `hash` known.

    Writing, hashing and syncing are each a thread's work, so that a file takes as long as the slowest of them. Raises
    OSError as the file does, a late one of the disk too, and AbandonedError once that event is set.
    """

    def __init__(self, path: Path, abandoned: threading.Event) -> None:
        self._abandoned = abandoned
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._digest = _Hash()
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._unsynced = 0

    @property
    def hash(self) -> str:
        """Hex digest of what has been written."""
        return self._digest.hexdigest()

    def write(self, content: bytes | memoryview) -> int:
        """Write all of `content`."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE):
            if self._abandoned.is_set():
                raise AbandonedError
            piece = view[start : start + _PIECE]
            hashed = self._hasher.submit(self._digest.update, piece)
            try:
                self._write_piece(piece)
            finally:
                hashed.result()  # the memory is the caller's again when this returns
        return len(view)

    def flush(self) -> None: ...

    def _write_piece(self, piece: memoryview) -> None:
        while piece:
            n_written = self._file.write(piece)
            piece = piece[n_written:]
            self._unsynced += n_written
        if self._unsynced >= _SYNC_EVERY and (self._sync is None or self._sync.done()):
            self._begin_sync()

    def _begin_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()
        self._sync, self._unsynced = self._syncer.submit(os.fdatasync, self._file.fileno()), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._begin_sync()
                assert self._sync is not None
                self._sync.result()
                os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
            self._syncer.shutdown()
            self._file.close()


def file_hash(path: Path) -> str:
    """What `HashedFile.hash` was when the file was written, if it is as it was written."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _Hash).hexdigest()
