"""What the sources of published corpora share: a path to the corpus as it is distributed, read record by record."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from data.dialogue import Dialogue, DialogueError
from data.sources.corpus_file import CorpusFile, find_corpus_files, read_corpus_files
from data.sources.source import (
    DialogueSource,
    LeftOut,
    RecordError,
    Rejected,
    SourceError,
    beginning,
    parse_object,
)

_MALFORMED = (KeyError, TypeError, AttributeError, IndexError)  # what a record without an expected field raises


class CorpusSource(DialogueSource):
    """A subclass says which files it reads."""

    suffixes: ClassVar[tuple[str, ...]]

    path: str  # the corpus as it is distributed: a file, an archive, or a directory of either

    def files(self) -> list[Path]:
        return find_corpus_files(self.path, self.suffixes)

    def contents(self) -> Iterator[CorpusFile]:
        """The files it reads, unpacked."""
        return read_corpus_files(self.files(), self.suffixes)


class RecordSource(CorpusSource):
    """A subclass says also how each file falls into records, and what dialogue a record is."""

    def read(self) -> Iterator[Dialogue | LeftOut | Rejected]:
        for file in self.contents():
            for place, record in self.records(file):
                yield self._read_record(file, place, record)

    def _read_record(self, file: CorpusFile, place: int | str, record: Any) -> Dialogue | LeftOut | Rejected:
        """The dialogue of a record, or why it is none."""
        try:
            return self.dialogue(file, place, record)
        except (DialogueError, RecordError) as error:
            reason = str(error)
        except _MALFORMED as error:
            reason = f"not a record of this corpus: {error!r}"
        shown = record if isinstance(record, str | bytes) else json.dumps(record, ensure_ascii=False, default=str)
        return Rejected(file.place, place, reason, beginning(shown))

    @abstractmethod
    def records(self, file: CorpusFile) -> Iterator[tuple[int | str, Any]]:
        """The records of a file, each with its place: a line or a key. Raises SourceError for a damaged file."""

    @abstractmethod
    def dialogue(self, file: CorpusFile, place: int | str, record: Any) -> Dialogue | LeftOut:
        """The dialogue of a record. Raises RecordError or DialogueError saying why it is none."""


def json_of(file: CorpusFile, expected: type[list] | type[dict]) -> Any:
    """The JSON document of a file. Raises SourceError when it is none, or not of the expected type."""
    try:
        document = json.loads(file.text())
    except (ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file.place}: cannot be read as JSON ({error})") from None
    if not isinstance(document, expected):
        raise SourceError(f"{file.place}: holds a {type(document).__name__}, expected a {expected.__name__} of records")
    return document


def json_records(file: CorpusFile) -> Iterator[tuple[int, Any]]:
    """The lines of a .jsonl as bytes, blank ones left out, or the elements of a .json list; each with its number."""
    if file.name.endswith(".json"):
        yield from enumerate(json_of(file, list), start=1)
    else:
        yield from ((n, line) for n, line in enumerate(file.content.splitlines(), start=1) if line.strip())


def object_of(record: Any) -> dict[str, Any]:
    """A record of `json_records` as an object, a copy. Raises RecordError when it is none."""
    if isinstance(record, bytes):
        return parse_object(record)
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return dict(record)
