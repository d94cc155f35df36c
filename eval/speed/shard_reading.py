"""The cost of reading packed shards in training: the batches of an epoch, from disk and from the page cache.

python -m eval.speed.shard_reading runs/demo/data
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.packed.batch import collate
from data.packed.mixture import training_order
from data.packed.sampler import rows_of_rank
from data.packed.shards import PackedDataset, ShardError
from recipes.loader import print_error


def forget(directory: Path) -> None:
    """Drop the files from the page cache, so that they are read from disk."""
    for path in directory.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def seconds_of_epoch(dataset: PackedDataset, rows_per_micro_batch: int, micro_batches: int) -> tuple[float, int]:
    """(seconds of one thread for all batches of an epoch, their tokens)."""
    order = training_order(dataset, seed=0)
    per_step = rows_per_micro_batch * micro_batches
    n_steps = dataset.n_rows // per_step
    began = time.perf_counter()
    for step in range(n_steps):
        for rows in rows_of_rank(order.rows(step * per_step, per_step), rows_per_micro_batch, 0, 1):
            collate(dataset, rows)
    return time.perf_counter() - began, n_steps * per_step * dataset.row_length


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 for data that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the run_dir of data.prepare")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    parser.add_argument("--tokens-per-second", type=float, default=60_000, help="of the training beside it")
    arguments = parser.parse_args(argv)
    table = Table("files in", "tokens", "tokens/s", f"of a step at {arguments.tokens_per_second:,.0f} tokens/s")
    try:
        for name in ("disk", "memory"):
            dataset = PackedDataset(arguments.data / "train")
            if name == "disk":
                forget(arguments.data / "train")
            seconds, n_tokens = seconds_of_epoch(dataset, arguments.rows, arguments.micro_batches)
            if not n_tokens:
                raise ShardError(f"{arguments.data}: {dataset.n_rows} rows are less than a step; lower --rows")
            rate = n_tokens / seconds
            table.add_row(name, f"{n_tokens:,}", f"{rate:,.0f}", f"{arguments.tokens_per_second / rate:.2%}")
    except (ShardError, OSError) as error:
        print_error(error)
        return 2
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
