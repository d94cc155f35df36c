"""The rows of a Parquet file or a part of it: whole row groups, with a few rows in memory at a time."""

from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from data.sources.line_reader import share
from data.sources.record import RecordError, SourceError

_BATCH_ROWS = 64


def parquet_rows(path: Path, part: int = 0, n_parts: int = 1) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """(number from 1, row) of every row of a part, or the reason why it cannot be read. Times become unix seconds (UTC
    if without a zone), dates ISO 8601. Raises SourceError for an unreadable file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            begin, end = share(len(sizes), part, n_parts)
            number = sum(sizes[:begin])
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(begin, end))):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _row(batch.slice(index, 1))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as Parquet ({error}); the file is missing or damaged") from None


def n_row_groups(path: Path) -> int:
    """The number of row groups. Raises SourceError for an unreadable file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_row_groups
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as Parquet ({error}); the file is missing or damaged") from None


def plain(value: Any) -> Any:
    """A value of a row as in JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value


def _row(batch: Any) -> dict[str, Any] | RecordError:
    try:
        return plain(batch.to_pylist(maps_as_pydicts="strict")[0])
    except UnicodeDecodeError as error:
        return RecordError(f"byte {error.start} of a string is not UTF-8")
    except (ValueError, OverflowError) as error:  # a time outside Python's range
        return RecordError(f"a value that cannot be read: {error}")
