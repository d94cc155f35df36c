"""The dialogues of packed documents and their participants, for confidence intervals of dialogues that share
participants. Row n is the dialogue with number n in documents."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.files import atomic_file

DIALOGUES_FILE = "dialogues.parquet"
SCHEMA = pa.schema([("id", pa.string()), ("participants", pa.list_(pa.int32()))])
"""`participants`: numbered within the side, as used by the split by participant."""


def dialogue_table(ids: Sequence[str], participants: Sequence[Sequence[int]]) -> pa.Table:
    """A table of dialogues."""
    return pa.table({"id": list(ids), "participants": [list(of_one) for of_one in participants]}, SCHEMA)


def table_of_columns(
    id_bytes: np.ndarray, ids_B: np.ndarray, n_participants: np.ndarray, participants: np.ndarray, is_kept: np.ndarray
) -> pa.Table:
    """A table of the dialogues of a mask, from the concatenated bytes of ids and numbers of participants, and their
    counts per dialogue."""
    id_edges, person_edges = (np.append(0, np.cumsum(n)).astype(np.int64) for n in (id_bytes, n_participants))
    text, edges = pa.py_buffer(np.ascontiguousarray(ids_B)), pa.py_buffer(id_edges)
    ids = pa.Array.from_buffers(pa.large_string(), len(id_bytes), [None, edges, text])
    people = pa.LargeListArray.from_arrays(pa.array(person_edges), pa.array(participants, pa.int32()))
    return pa.table({"id": ids, "participants": people}).filter(pa.array(is_kept)).cast(SCHEMA)


def write_dialogue_table(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables as one Parquet file; returns the number of dialogues."""
    n_dialogues = 0
    with atomic_file(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
            n_dialogues += len(table)
    return n_dialogues


def read_dialogue_table(path: Path) -> pa.Table:
    """Read the whole table."""
    return pq.read_table(path, schema=SCHEMA)
