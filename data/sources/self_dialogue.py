"""The Self-dialogue Corpus (BSD-3): conversations on 23 topics, both sides written by one crowd worker."""

import os
from collections.abc import Iterator
from functools import cached_property
from itertools import count
from pathlib import PurePath
from typing import ClassVar, Literal

from data.clean.stable_hash import pseudonym
from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.character import any_speaker
from data.sources.corpus_file import CorpusFile, read_corpus_files
from data.sources.corpus_source import RecordSource
from data.sources.csv_rows import check_row, csv_rows
from data.sources.first_names import first_names
from data.sources.folder_files import has_suffix
from data.sources.record import LeftOut, RecordError

_COLUMNS = ("WorkerId", "WorkTimeInSeconds", "Answer.sentence1")
_BLOCKED = "blocked_workers.txt"  # the corpus's own list of workers to exclude


class SelfDialogueSource(RecordSource):
    """One dialogue per row. The speakers get first names by a hash of the row, and the narrator gives the topic. The
    character is one of the two. The participant is the hashed worker. Rows of blocked workers are left out; their list
    is read with every other file."""

    suffixes: ClassVar = (".csv", _BLOCKED)

    kind: Literal["self_dialogue"]

    @cached_property
    def blocked_workers(self) -> frozenset[str]:
        """The ids in blocked_workers.txt; empty if the path does not have that file."""
        paths = [path for path in self.files() if not has_suffix(path.name, (".csv", ".csv.gz"))]
        lists = filter(_is_list, read_corpus_files(paths, self.suffixes))
        return frozenset(worker for file in lists for worker in file.text().split())

    def records(self, file: CorpusFile) -> Iterator[tuple[int, dict[str, str]]]:
        return iter(()) if _is_list(file) else csv_rows(file, _COLUMNS, 2)

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, str]) -> Dialogue | LeftOut:
        check_row(record)
        worker = record["WorkerId"]
        if worker in self.blocked_workers:
            return LeftOut("written by a blocked worker")
        folder, name = PurePath(os.path.abspath(file.place)).parts[-2:]
        topic, identity = folder.replace("_", " "), f"{folder}/{name}:{place}"
        names = list(first_names([f"{identity} {side}" for side in (1, 2)]).values())
        said = _sentences(record)
        return Dialogue(
            id=identity,
            messages=(
                Message(NARRATOR, f"A conversation about {topic}."),
                *(Message(names[number % 2], text) for number, text in enumerate(said)),
            ),
            character=any_speaker(identity, names[: len(said)]),
            participants=(pseudonym("self_dialogue", worker),),
            metadata={"topic": topic, "work_seconds": int(record["WorkTimeInSeconds"])},
        )


def _is_list(file: CorpusFile) -> bool:
    return has_suffix(file.name, (_BLOCKED,))


def _sentences(record: dict[str, str]) -> list[str]:
    """The columns Answer.sentence1, 2, ... up to the first empty one."""
    columns = (f"Answer.sentence{number}" for number in count(1))
    said = []
    for column in columns:
        text = record.get(column)
        if not text:
            break
        said.append(text)
    if not said:
        raise RecordError(f"Answer.sentence1 is empty; found the columns {', '.join(map(str, record))[:200]}")
    return said
