"""Atomic and durable file writes (temporary name, fsync, rename, fsync of the directory), and SHA-256 of files."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under `path` only when the block ends without an exception.

    An OSError without a file name (full disk) is raised again with the path.
    """
    temporary = path.with_name(f".{path.name}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    durable_rename(temporary, path)


def durable_rename(source: Path, target: Path) -> None:
    """Rename within one directory, replacing `target` if it is a file, and fsync the directory."""
    os.replace(source, target)
    sync_path(target.parent)


def replace_directory(staging: Path, directory: Path) -> None:
    """Fsync the files of `staging` (a flat directory beside `directory`) and rename it, removing an older directory."""
    for path in staging.iterdir():
        sync_path(path)
    sync_path(staging)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    durable_rename(staging, directory)
    shutil.rmtree(old, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Fsync a file, or a directory (the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
