"""The rows of a CSV file as dictionaries by column."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from data.sources.corpus_file import CorpusFile
from data.sources.record import RecordError


def csv_rows(file: CorpusFile, columns: Sequence[str], first_number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its number. Raises RecordError for invalid CSV or a missing column."""
    text = file.text()
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # all of it is already in memory
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecordError(f"two columns are called {twice[0][:80]!r}")
        if missing := [name for name in columns if name not in names]:
            raise RecordError(f"no column {missing[0]!r}; found {', '.join(map(repr, names))[:200] or 'an empty file'}")
        yield from enumerate(reader, start=first_number)
    except csv.Error as error:
        raise RecordError(f"not CSV after line {reader.line_num}: {error}") from None


def check_row(row: dict[str, Any]) -> None:
    """Raise RecordError unless the row has a cell for each column."""
    if None in row:
        raise RecordError(f"{len(row[None])} more cells than columns")  # type: ignore[index]
    if missing := [name for name, cell in row.items() if cell is None]:
        raise RecordError(f"{len(missing)} cells fewer than columns: no {missing[0][:80]!r}")
