"""What a source of dialogues is: a recipe section that finds its files and reads them as records, good and bad."""

import difflib
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.dialogue import Dialogue
from recipes.loader import Section


class SourceError(ValueError):
    """A source that cannot be read at all; the message names the file or package and says what to do."""


class RecordError(ValueError):
    """One record that cannot be a dialogue; the message says why. The record is quarantined."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A whole record that is not to be trained on; counted by its reason, a few words."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not become a dialogue: where it stands, why, and how it begins."""

    file: str
    line: int | str  # the line of a text file, or the key of the record
    reason: str
    record: str


class DialogueSource(Section, ABC):
    """Base of the sources. A new corpus is a subclass in a module of its own, and one line in registry.py."""

    kind: str  # a subclass narrows it to its one name

    @abstractmethod
    def files(self) -> list[Path]:
        """The files it reads. Raises SourceError when one is missing."""

    @abstractmethod
    def read(self) -> Iterator[Dialogue | LeftOut | Rejected]:
        """Every record in the order of the files: a Dialogue, or why it is none."""


def find_files(path: str, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz"), pattern: str = "*") -> list[Path]:
    """The file `path`, or the files of the directory `path` with these suffixes, sorted by name."""
    found = Path(path)
    if found.is_file():
        return [found]
    if not found.is_dir():
        beside = sorted(p.name for p in found.parent.iterdir()) if found.parent.is_dir() else []
        close = difflib.get_close_matches(found.name, beside, n=1)
        hint = f"; did you mean {found.parent / close[0]}?" if close else ""
        raise SourceError(f"source path {path}: no such file or directory{hint}")
    files = sorted(p for p in found.glob(pattern) if p.name.endswith(suffixes) and p.is_file())
    if not files:
        raise SourceError(f"source path {path}: a directory without any {' or '.join(suffixes)} file")
    return files


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, gzip or plain, blank ones left out. Raises SourceError where it cannot be read."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        after = f" after line {number}" if number else ""
        raise SourceError(f"{path}: cannot be read{after} ({error}); the file is missing or damaged") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises RecordError saying what the line is instead."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"byte {error.start} is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return record


def beginning(record: bytes | str) -> str:
    """The start of a bad record, for the quarantine file."""
    text = record.decode("utf-8", "replace") if isinstance(record, bytes) else record
    return text.rstrip("\r\n")[:500].encode("utf-8", "replace").decode("utf-8")
