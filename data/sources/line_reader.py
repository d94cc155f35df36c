"""The lines of a file or a part of it: streamed, with their places and a size limit."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from data.sources.folder_files import refuse_packed

MAX_LINE_BYTES = 8 * 2**20  # longer lines are not parsed or kept in memory
_CHUNK_BYTES = 2**20
_SHOWN_BYTES = 2_000  # of a line over the limit
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LongLine(bytes):
    """The beginning of a line over MAX_LINE_BYTES; `n_bytes` is the length of the whole line without line break."""

    n_bytes: int

    @classmethod
    def of(cls, beginning: bytes, n_bytes: int) -> "LongLine":
        line = cls(beginning)
        line.n_bytes = n_bytes
        return line


class LineReader:
    """Iterates over the non-blank lines of a stream: (byte at which the line begins, the line with its break); a line
    over MAX_LINE_BYTES is a LongLine.

    Lines end with a line feed. Yields the lines that begin in the bytes from `begin` to `end`, so that adjacent ranges
    give every line once and in order; a range that does not begin at 0 needs a plain file. Skips a byte order mark at
    the beginning of the stream.
    """

    def __init__(self, stream: IO[bytes], begin: int = 0, end: int | None = None) -> None:
        self._stream, self._begin, self._end = stream, begin, end
        self._first = 0  # byte at which the first line of the range begins
        self._n_read = 0  # lines of the range read so far, blank ones included
        self._n_before: int | None = None

    @property
    def number(self) -> int:
        """The number of the last line in the whole stream, from 1; lines before the range are counted on first use."""
        if self._n_before is None:
            self._n_before = _line_breaks(self._stream, self._first)
        return self._n_before + self._n_read

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        offset = self._begin
        if self._begin > 0:  # a line that begins before the range belongs to the previous one
            self._stream.seek(self._begin - 1)
            offset = self._begin - 1 + _skip_rest(self._stream)[0]
        self._first = offset
        while self._end is None or offset < self._end:
            line = self._stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            place, offset = offset, offset + len(line)
            self._n_read += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                n_rest, is_ended = _skip_rest(self._stream)
                offset += n_rest
                yield place, LongLine.of(line[:_SHOWN_BYTES], offset - place - is_ended)
                continue
            if place == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line and not line.isspace():
                yield place, line


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file, decompressing .gz. Raises SourceError for other compression."""
    refuse_packed(path)
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else open(path, "rb")


def share(n_bytes: int, part: int, n_parts: int) -> tuple[int, int]:
    """The byte range of a part of a file of `n_bytes`."""
    if not 0 <= part < n_parts:
        raise ValueError(f"part {part} of {n_parts}: expected a number from 0 to {n_parts - 1}")
    return part * n_bytes // n_parts, (part + 1) * n_bytes // n_parts


def _skip_rest(stream: IO[bytes]) -> tuple[int, bool]:
    """Read to the end of the line; returns its number of bytes, and whether a line break ended it."""
    n_bytes = 0
    while chunk := stream.readline(_CHUNK_BYTES):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            return n_bytes, True
    return n_bytes, False


def _line_breaks(stream: IO[bytes], n_bytes: int) -> int:
    """Count the line feeds in the first bytes of a plain file, without moving its position."""
    count = position = 0
    while position < n_bytes:
        chunk = os.pread(stream.fileno(), min(n_bytes - position, _CHUNK_BYTES), position)
        if not chunk:
            break
        count += chunk.count(b"\n")
        position += len(chunk)
    return count
