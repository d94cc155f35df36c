"""What the sources of JSON objects share: lines of a .jsonl, streamed and in parts, or the elements of a .json list."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data.dialogue import Dialogue
from data.sources.corpus_file import CorpusFile, OpenFile, damage_told, is_plain, open_corpus_files
from data.sources.corpus_source import CorpusSource, json_of
from data.sources.line_reader import LineReader, share
from data.sources.source import LeftOut, RecordError, Rejected, parse_object, read_record


class JsonSource(CorpusSource):
    """A subclass says what dialogue an object is. Lines are streamed, those of a plain file in parts too; a .json list
    is read whole."""

    splittable: ClassVar = True
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")

    @abstractmethod
    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue | LeftOut:
        """The dialogue of a record, which may be taken apart. `place` serves as its id where it has none: the file, and
        the byte where the line begins or the number in the list. Raises RecordError or DialogueError saying why it is
        none."""

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        with damage_told(path):
            if _is_lines(path.name) and is_plain(path):
                begin, end = share(os.path.getsize(path), part, n_parts)
                for file in open_corpus_files(path, self.suffixes):
                    yield from self._of_lines(file, LineReader(file.stream, begin, end))
            elif part == 0:
                for file in open_corpus_files(path, self.suffixes):
                    if _is_lines(file.name):
                        yield from self._of_lines(file, LineReader(file.stream))
                    else:
                        yield from self._of_list(file)

    def n_parts(self, path: Path, part_bytes: int) -> int:
        return super().n_parts(path, part_bytes) if _is_lines(path.name) and is_plain(path) else 1

    def _of_lines(self, file: OpenFile, reader: LineReader) -> Iterator[Dialogue | LeftOut | Rejected]:
        for offset, line in reader:
            make = partial(self._made, f"{file.name}@{offset}", parse_object, line)
            yield read_record(make, file.place, lambda: reader.number, line)

    def _of_list(self, file: OpenFile) -> Iterator[Dialogue | LeftOut | Rejected]:
        records = json_of(CorpusFile(file.place, file.name, file.stream.read()), list)
        for number, record in enumerate(records, start=1):
            make = partial(self._made, f"{file.name}:{number}", _object, record)
            yield read_record(make, file.place, lambda number=number: number, record)  # type: ignore[misc]

    def _made(self, place: str, parse: Callable[[Any], dict[str, Any]], record: Any) -> Dialogue | LeftOut:
        return self.dialogue(place, parse(record))


def _is_lines(name: str) -> bool:
    return not name.endswith((".json", ".json.gz"))


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return dict(record)
