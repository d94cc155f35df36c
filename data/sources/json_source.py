"""Base of the sources of JSON objects: lines of a .jsonl, streamed and in parts, or the elements of a .json list."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data.format.dialogue import Dialogue
from data.sources.corpus_file import OpenFile, as_source_error, is_plain, open_corpus_files
from data.sources.corpus_source import WHOLE_FILE, CorpusSource, json_of
from data.sources.folder_files import has_suffix
from data.sources.line_reader import LineReader, share
from data.sources.record import LeftOut, RecordError, Rejected, read_record, rejected
from data.sources.record_keys import RECORD_ALIASES, take
from data.sources.source import parse_object
from data.sources.strict_json import without_nulls
from recipes.loader import Section


class JsonFormat(Section, ABC):
    """How a JSON object becomes a dialogue; its fields are the recipe's keys besides the location."""

    kind: str  # a subclass narrows it to its own name

    @property
    def end_means_partner_left(self) -> bool:
        """As in DialogueSource, for records of this format."""
        return False

    @abstractmethod
    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue | LeftOut:
        """The dialogue of a record, which may be modified. `place` is its id if it has none: the file, and the byte at
        which the line begins or the number in the list. Raises RecordError or DialogueError for an invalid record."""

    def _identity(self, place: str, record: dict[str, Any]) -> str:
        """Remove the id from the record; `place` if it has none."""
        identity = take(record, "id", RECORD_ALIASES)
        if identity is None:
            return place
        if isinstance(identity, bool) or not isinstance(identity, str | int | float) or identity == "":
            raise RecordError(f"id is {repr(identity)[:40]}: expected a non-empty string or a number")
        return str(identity)


class JsonSource(JsonFormat, CorpusSource):
    """Files of objects: lines are streamed, those of a plain file also in parts; a .json list is read whole."""

    splittable: ClassVar = True
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        with as_source_error(path):
            if _is_lines(path.name) and is_plain(path):
                begin, end = share(os.path.getsize(path), part, n_parts)
                for file in open_corpus_files(path, self.suffixes):
                    yield from self._of_lines(path, file, LineReader(file.stream, begin, end))
            elif part == 0:
                for file in open_corpus_files(path, self.suffixes):
                    if _is_lines(file.name):
                        yield from self._of_lines(path, file, LineReader(file.stream))
                    else:
                        yield from self._of_list(path, file)

    def n_parts(self, path: Path, part_bytes: int) -> int:
        return super().n_parts(path, part_bytes) if _is_lines(path.name) and is_plain(path) else 1

    def _name_in_source(self, path: Path, name: str) -> str:
        """`name` with the folders of `path` below the source's: files of several folders can have the same name."""
        root = Path(self.path)
        return (path.relative_to(root).parent / name).as_posix() if root in path.parents else name

    def _of_lines(self, path: Path, file: OpenFile, reader: LineReader) -> Iterator[Dialogue | LeftOut | Rejected]:
        name = self._name_in_source(path, file.name)
        for offset, line in reader:
            make = partial(self._made, f"{name}@{offset}", _object_of_line, line)
            yield read_record(make, file.place, lambda: reader.number, line)

    def _of_list(self, path: Path, file: OpenFile) -> Iterator[Dialogue | LeftOut | Rejected]:
        name, whole = self._name_in_source(path, file.name), file.read()
        try:
            records = json_of(whole, list)
        except RecordError as error:
            yield rejected(file.place, WHOLE_FILE, str(error), whole.content)
            return
        for number, record in enumerate(records, start=1):
            make = partial(self._made, f"{name}:{number}", _object, record)
            yield read_record(make, file.place, lambda number=number: number, record)  # type: ignore[misc]

    def _made(self, place: str, parse: Callable[[Any], dict[str, Any]], record: Any) -> Dialogue | LeftOut:
        return self._of_object(place, parse(record))

    def _of_object(self, place: str, record: dict[str, Any]) -> Dialogue | LeftOut:
        return self.dialogue(place, record)


def _is_lines(name: str) -> bool:
    return not has_suffix(name, (".json", ".json.gz"))


def _object_of_line(line: bytes) -> dict[str, Any]:
    return parse_object(line, keeps_nulls=False)


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return without_nulls(record)
