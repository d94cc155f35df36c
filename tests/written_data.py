"""Shards and dialogue files as data.prepare leaves them, written at once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.format.dialogue import Dialogue
from data.format.dialogue_json import to_json
from data.packed.dialogue_table import dialogue_table
from data.packed.shards import PackedRow, join_groups, write_group


def write_shards(
    directory: Path,
    rows: Iterable[PackedRow],
    *,
    row_length: int,
    vocab_size: int,
    rows_per_shard: int,
    tokenizer_sha256: str,
    dialogues: pa.Table | None = None,
    statistics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write rows as shards and return the manifest. `dialogues` (None: not known) is the dialogue_table that the
    documents' numbers point into."""
    directory.mkdir(parents=True, exist_ok=True)
    group = write_group(directory, rows, row_length=row_length, vocab_size=vocab_size, rows_per_shard=rows_per_shard)
    return join_groups(
        directory,
        [(directory, group)],
        [dialogue_table([], []) if dialogues is None else dialogues],
        row_length=row_length,
        vocab_size=vocab_size,
        rows_per_shard=rows_per_shard,
        tokenizer_sha256=tokenizer_sha256,
        statistics=statistics,
    )


def write_dialogues(path: Path, dialogues: Iterable[Dialogue]) -> None:
    """Write one dialogue a line."""
    path.write_bytes(b"".join(to_json(dialogue) + b"\n" for dialogue in dialogues))
