"""Base of the published corpora: a path to the corpus as distributed, read record by record."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data.format.dialogue import Dialogue
from data.sources.corpus_file import CorpusFile, find_corpus_files, read_corpus_files
from data.sources.folder_files import unread_files
from data.sources.record import LeftOut, RecordError, Rejected, read_record, rejected
from data.sources.source import DialogueSource
from data.sources.strict_json import parse_json
from recipes.run_identity import Location

WHOLE_FILE = "whole file"  # the place of a bad record that is a whole file


class CorpusSource(DialogueSource):
    """Base of sources with a path; a subclass reads the files."""

    suffixes: ClassVar[tuple[str, ...]]

    path: Location  # the corpus as distributed: a file, an archive, or a directory of either

    def files(self) -> list[Path]:
        return find_corpus_files(self.path, self.suffixes)

    def unread(self) -> list[str]:
        return unread_files(self.path, self.inputs())


class RecordSource(CorpusSource):
    """Base of sources that split files into records, and turn records into dialogues."""

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        if part == 0:
            for file in read_corpus_files([path], self.suffixes):
                yield from self._read(file)

    def _read(self, file: CorpusFile) -> Iterator[Dialogue | LeftOut | Rejected]:
        try:
            for place, record in self.records(file):
                make = partial(self.dialogue, file, place, record)
                yield read_record(make, file.place, lambda place=place: place, record)  # type: ignore[misc]
        except RecordError as error:
            yield rejected(file.place, WHOLE_FILE, str(error), file.content)

    @abstractmethod
    def records(self, file: CorpusFile) -> Iterator[tuple[int | str, Any]]:
        """The records of a file, each with its place: a line or a key. Raises RecordError if the rest of the file
        cannot be parsed, which counts as one bad record."""

    @abstractmethod
    def dialogue(self, file: CorpusFile, place: int | str, record: Any) -> Dialogue | LeftOut:
        """The dialogue of a record. Raises RecordError or DialogueError for an invalid record."""


def json_of(file: CorpusFile, expected: type[list] | type[dict]) -> Any:
    """The JSON document of a file. Raises RecordError for invalid JSON or an unexpected type."""
    document = parse_json(file.text())
    if not isinstance(document, expected):
        raise RecordError(f"the file holds a {type(document).__name__}, expected a {expected.__name__} of records")
    return document
