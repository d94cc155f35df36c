"""The lines of a file, or of one part of it: streamed, with their places, and never more of one than a limit."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

MAX_LINE_BYTES = 8 * 2**20  # a longer line is no conversation: it is neither held in memory nor parsed
_CHUNK_BYTES = 2**20
_SHOWN_BYTES = 2_000  # of a line over the limit
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LongLine(bytes):
    """How a line over MAX_LINE_BYTES begins; `n_bytes` is the length of the whole, without its line break."""

    n_bytes: int

    @classmethod
    def of(cls, beginning: bytes, n_bytes: int) -> "LongLine":
        line = cls(beginning)
        line.n_bytes = n_bytes
        return line


class LineReader:
    """Iterates over the lines of a stream that are not blank: (byte where the line begins, the line with its break); of
    a line over MAX_LINE_BYTES a LongLine.

    Lines end with a line feed. Those are given that begin in the bytes from `begin` to `end`, so that ranges side by
    side give every line once and in order; a range that does not begin at 0 needs a plain file. A byte order mark at
    the beginning of the stream is left out.
    """

    def __init__(self, stream: IO[bytes], begin: int = 0, end: int | None = None) -> None:
        self._stream, self._begin, self._end = stream, begin, end
        self._first = 0  # byte where the first line of the range begins
        self._n_read = 0  # lines of the range read, blank ones too
        self._n_before: int | None = None

    @property
    def number(self) -> int:
        """The number of the latest line in the whole stream, from 1; the lines before the range are counted when this
        is first asked for."""
        if self._n_before is None:
            self._n_before = _line_breaks(self._stream, self._first)
        return self._n_before + self._n_read

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        offset = self._begin
        if self._begin > 0:  # a line that begins before the range is not of it
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
    """The file's bytes, those of a .gz uncompressed."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def share(n_bytes: int, part: int, n_parts: int) -> tuple[int, int]:
    """Where a part of a file of `n_bytes` begins and ends."""
    if not 0 <= part < n_parts:
        raise ValueError(f"part {part} of {n_parts}: expected a number from 0 to {n_parts - 1}")
    return part * n_bytes // n_parts, (part + 1) * n_bytes // n_parts


def _skip_rest(stream: IO[bytes]) -> tuple[int, bool]:
    """Read to the end of the line: how many bytes that was, and whether a line break ended them."""
    n_bytes = 0
    while chunk := stream.readline(_CHUNK_BYTES):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            return n_bytes, True
    return n_bytes, False


def _line_breaks(stream: IO[bytes], n_bytes: int) -> int:
    """The line feeds among the first bytes of a plain file, whose position stays."""
    count = position = 0
    while position < n_bytes:
        chunk = os.pread(stream.fileno(), min(n_bytes - position, _CHUNK_BYTES), position)
        if not chunk:
            break
        count += chunk.count(b"\n")
        position += len(chunk)
    return count
