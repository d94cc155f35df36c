"""Data sets of the Hugging Face Hub, streamed by `datasets`, and local Parquet and JSON lines with any columns."""

import difflib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data.format.dialogue import Dialogue, DialogueError
from data.sources.chat_jsonl import ChatJsonlFormat
from data.sources.corpus_file import find_corpus_files
from data.sources.hh_rlhf import HhRlhfFormat
from data.sources.json_source import JsonSource
from data.sources.line_reader import share
from data.sources.openai_messages import OpenaiMessagesFormat
from data.sources.parquet import n_row_groups, parquet_rows, plain
from data.sources.preference_pairs import PreferencePairsFormat
from data.sources.record import LeftOut, RecordError, Rejected, SourceError, read_record
from data.sources.record_keys import RECORD_ALIASES, TRAINED_FLAGS
from data.sources.sharegpt import SharegptFormat
from data.sources.strict_json import without_nulls
from recipes.loader import Section
from recipes.run_identity import Location

LOOK_UP_SECONDS = 10.0
_PARQUET = ".parquet"
_KNOWN_KEYS = sorted(
    {*RECORD_ALIASES, *(alias for aliases in RECORD_ALIASES.values() for alias in aliases), *TRAINED_FLAGS}
    | {"character", "participants", "metadata", "prompt", "completion", "chosen", "rejected"}
)
"""Keys that formats read; formats that keep other keys keep them as metadata."""

Format = Annotated[
    ChatJsonlFormat | HhRlhfFormat | OpenaiMessagesFormat | PreferencePairsFormat | SharegptFormat,
    Field(discriminator="kind"),
]


class HubDataset(Section):
    """A data set of the Hub at one commit."""

    name: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    # The commit, so that the data cannot change. Without it, an error names the newest commit.
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    split: str
    config: str | None = None  # null if it is the only one


class DatasetsSource(JsonSource):
    """Rows of `hub` or of the files in `path`, each read as a record of `format`. A part of a file is a range of row
    groups of Parquet or of JSON lines; of a data set, some of its shards. Parquet and streamed data are never fully in
    memory. A bad row is rejected; a failing download ends with an error."""

    suffixes: ClassVar = (_PARQUET, ".jsonl")

    kind: Literal["datasets"]
    path: Location | None = None  # type: ignore[assignment]  # a file, or a directory of .parquet, .jsonl and .jsonl.gz
    hub: HubDataset | None = None
    format: Format
    # Key of the format: name of the column. Only these are read; null reads all columns under their own names. A
    # column may be missing in a row of JSON lines (the same as null there), but not in Parquet.
    columns: dict[str, str] | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> "DatasetsSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("expected path (local files) or hub (a data set's name), one of the two")
        return self

    @field_validator("columns")
    @classmethod
    def _keys_are_spelled_right(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        """A misspelled key would become metadata, without a word."""
        for key in columns or {}:
            close = [] if key in _KNOWN_KEYS else difflib.get_close_matches(key, _KNOWN_KEYS, n=1, cutoff=0.8)
            if close:
                raise ValueError(f"unknown key {key!r}; did you mean {close[0]!r}?")
        return columns

    def files(self) -> list[Path]:
        if self.hub is None:
            return find_corpus_files(self.path or "", self.suffixes)
        _look_up(self.hub)
        return [Path(self.hub.name)]

    def inputs(self) -> list[Path]:
        return self.files() if self.hub is None else []  # part of the recipe

    def n_parts(self, path: Path, part_bytes: int) -> int:
        if self.hub is not None:
            return _stream(self.hub).num_shards
        if path.suffix.lower() == _PARQUET:
            return max(1, min(n_row_groups(path), -(-path.stat().st_size // part_bytes)))
        return super().n_parts(path, part_bytes)

    def read_file(self, path: Path, part: int = 0, n_parts: int = 1) -> Iterator[Dialogue | LeftOut | Rejected]:
        if self.hub is not None:
            yield from self._of_hub(self.hub, part, n_parts)
        elif path.suffix.lower() == _PARQUET:
            name = self._name_in_source(path, path.name)
            for number, row in parquet_rows(path, part, n_parts):
                make = partial(self._of_row, f"{name}:{number}", row)
                yield read_record(make, str(path), lambda number=number: number, row)  # type: ignore[misc]
        else:
            yield from super().read_file(path, part, n_parts)

    @property
    def end_means_partner_left(self) -> bool:
        return self.format.end_means_partner_left

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue | LeftOut:
        record["id"] = self._identity(place, record)
        return self.format.dialogue(place, record)

    def _of_object(self, place: str, record: dict[str, Any]) -> Dialogue | LeftOut:
        if self.columns is None:
            return super()._of_object(place, record)
        lacking = self._lacking(record)
        given = {key: record[column] for key, column in self.columns.items() if column in record}
        try:
            return super()._of_object(place, given)
        except (RecordError, DialogueError) as error:
            raise RecordError(f"{error}; {lacking}" if lacking else str(error)) from None

    def _lacking(self, record: dict[str, Any]) -> str:
        """The columns that a record lacks."""
        lacking = [column for column in (self.columns or {}).values() if column not in record]
        return f"no column {lacking[0]!r}; found {', '.join(map(repr, record))[:300]}" if lacking else ""

    def _of_row(self, place: str, row: dict[str, Any] | RecordError) -> Dialogue | LeftOut:
        if isinstance(row, RecordError):
            raise row
        if self.hub is None and (lacking := self._lacking(row)):
            raise RecordError(lacking)
        return self._of_object(place, without_nulls(row))

    def _of_hub(self, hub: HubDataset, part: int, n_parts: int) -> Iterator[Dialogue | LeftOut | Rejected]:
        """Shard by shard, so that ids do not depend on the parts."""
        stream = _stream(hub)
        for shard in range(*share(stream.num_shards, part, n_parts)):
            rows = _rows(hub, stream.shard(stream.num_shards, shard), shard)
            for number, row in enumerate(rows, start=1):
                place = f"{shard}:{number}"
                make = partial(self._of_row, f"{hub.name}/{hub.split}:{place}", row)
                yield read_record(make, f"{hub.name}@{hub.revision}", lambda place=place: place, row)  # type: ignore[misc]


def _look_up(hub: HubDataset) -> None:
    """Raise SourceError unless the data set exists at the commit."""
    from huggingface_hub import HfApi

    try:
        newest = HfApi().dataset_info(hub.name, revision=hub.revision, timeout=LOOK_UP_SECONDS).sha
    except Exception as error:  # of the library, and of its HTTP client
        raise SourceError(
            f"hub data set {hub.name}{f' at {hub.revision}' if hub.revision else ''}: cannot be looked up "
            f"({type(error).__name__}: {_first_line(error)}); check the name, the revision and the network, or "
            "download the files and give their path"
        ) from error
    if hub.revision is None:
        raise SourceError(f"hub data set {hub.name}: no revision; the newest is now {newest}: write revision: {newest}")


def _stream(hub: HubDataset) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True)
    except Exception as error:
        raise SourceError(
            f"hub data set {hub.name}, split {hub.split}: cannot be opened ({type(error).__name__}: "
            f"{_first_line(error)})"
        ) from error


def _rows(hub: HubDataset, shard: Any, number: int) -> Iterator[dict[str, Any]]:
    n_read = 0
    try:
        for row in shard:
            yield plain(row)
            n_read += 1
    except Exception as error:
        raise SourceError(
            f"hub data set {hub.name}, split {hub.split}: shard {number} breaks off after row {n_read} "
            f"({type(error).__name__}: {_first_line(error)}); download its files and give their path, and bad rows "
            "are quarantined"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
