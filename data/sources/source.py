"""The interface of a source of dialogues: a recipe section that finds files and reads them as good and bad records."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from data.format.dialogue import Dialogue
from data.sources.line_reader import MAX_LINE_BYTES, LineReader, LongLine, open_unpacked
from data.sources.record import LeftOut, RecordError, Rejected, SourceError
from data.sources.strict_json import parse_json
from recipes.loader import Section


class DialogueSource(Section, ABC):
    """Base of the sources. A new corpus is a subclass in its own module, and one line in registry.py.

    Files can be read in any order and by several processes: the records of a file, ids included, do not depend on other
    files. (A source that needs another file to read one says so.)
    """

    splittable: ClassVar[bool] = False  # whether `read_file` can split a large file into parts

    kind: str  # a subclass narrows it to its own name

    @property
    def end_means_partner_left(self) -> bool:
        """Whether a dialogue ends because the partner stopped writing, which gives the last reply an engagement label.
        False if a record ends by construction: at a rated reply, at the end of a task, at the end of an excerpt."""
        return False

    @abstractmethod
    def files(self) -> list[Path]:
        """The arguments of `read_file`, in order. Raises SourceError if a file is missing."""

    @abstractmethod
    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        """Every record of a file, or of one part of it.

        The concatenated parts are the whole file for any number of parts; if a file cannot be split, part 0 is the
        whole and the others are empty.
        """

    def read(self) -> Iterator[Dialogue | LeftOut | Rejected]:
        """Every record in file order: a Dialogue, or the reason why it is none."""
        for path in self.files():
            yield from self.read_file(path)

    def inputs(self) -> list[Path]:
        """The local files that the records come from, whose digests identify a run."""
        return self.files()

    def unread(self) -> list[str]:
        """The files of a folder that it does not read, relative to the folder: another kind, or hidden."""
        return []

    def n_parts(self, path: Path, part_bytes: int) -> int:
        """The number of parts of about `part_bytes` into which to split a file."""
        return max(1, -(-path.stat().st_size // part_bytes)) if self.splittable else 1


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines of a file, gzip or plain. Raises SourceError if it cannot be read."""
    number = 0
    try:
        with open_unpacked(path) as file:
            reader = LineReader(file)
            for _, line in reader:
                number = reader.number
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        after = f" after line {number}" if number else ""
        raise SourceError(f"{path}: cannot be read{after} ({error}); the file is missing or damaged") from None


def parse_object(line: bytes, *, keeps_nulls: bool = True) -> dict[str, Any]:
    """The JSON object of a line, without null keys unless `keeps_nulls`. Raises RecordError that says what it is
    instead."""
    if isinstance(line, LongLine):
        raise RecordError(f"a line of {line.n_bytes:,} bytes; the limit is {MAX_LINE_BYTES:,}")
    try:
        record = parse_json(line.decode("utf-8"), keeps_nulls=keeps_nulls)
    except UnicodeDecodeError as error:
        raise RecordError(f"byte {error.start} is not UTF-8; {_remedy(line)}") from None
    if not isinstance(record, dict):
        remedy = "; write each record on one line" if isinstance(record, list) else ""
        raise RecordError(f"expected a JSON object, found {type(record).__name__}{remedy}")
    return record


def _remedy(line: bytes) -> str:
    """What to do about bytes that are not UTF-8, from the first ones of a file."""
    if line.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip, so add .gz to the file's name"
    encoding = "UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "its encoding"
    return f"convert the file from {encoding} to UTF-8"
