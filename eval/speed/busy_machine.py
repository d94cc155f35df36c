"""Training speed on shared CPU cores by OpenMP settings: spin count and number of threads.

python -m eval.speed.busy_machine --cores 0,1 --neighbors 0,6
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from data.packed.batch import collate
from data.packed.synthetic import SyntheticData, SyntheticRows
from model.attention_ops import Documents
from model.config import ModelConfig
from model.transformer import Transformer
from recipes.loader import read_document
from recipes.openmp import SPINS

SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's default, 300,000 spins": {"GOMP_SPINCOUNT": "300000"},
    "100,000 spins": {"GOMP_SPINCOUNT": "100000"},
    f"{SPINS:,} spins (ours)": {"GOMP_SPINCOUNT": str(SPINS)},
    "5,000 spins": {"GOMP_SPINCOUNT": "5000"},
    "OMP_WAIT_POLICY=PASSIVE, no spins": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
_BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


def tokens_per_second(recipe: Path, seconds: float) -> float:
    """Speed of forward, backward and AdamW steps of a pre-training recipe's model, in this process."""
    written = read_document(recipe).data
    config = ModelConfig.model_validate(written["model"])
    n_rows = int(written["loop"]["rows_per_micro_batch"])
    rows = SyntheticRows(SyntheticData(kind="synthetic", row_length=512, median_document_length=64), config.vocab_size)
    model = Transformer(config, "auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number: int) -> int:
        batch = collate(rows, range(number * n_rows, (number + 1) * n_rows))
        documents = Documents.from_lengths(batch.document_lengths, batch.row_length)
        logits_TV = model.logits(model(batch.tokens_T, documents))
        F.cross_entropy(logits_TV, batch.targets_T).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(batch.tokens_T)

    step(0)
    n_steps = n_tokens = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not n_steps:
        n_steps += 1
        n_tokens += step(n_steps)
    return n_tokens / passed


@contextmanager
def neighbors(n: int) -> Iterator[None]:
    """Run `n` busy processes on the same cores."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(recipe: Path, seconds: float, variables: dict[str, str]) -> float:
    """`tokens_per_second` in a new process, because OpenMP reads its variables when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in _OPENMP} | variables
    command = [sys.executable, "-m", "eval.speed.busy_machine", str(recipe), "--seconds", str(seconds), "--alone"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return float(json.loads(ran.stdout))


def compare(recipe: Path, seconds: float, counts: Sequence[int], rounds: int) -> Table:
    """A table of the median and range of the speeds; each round measures every setting once."""
    n_cores = len(os.sched_getaffinity(0))
    table = Table("setting", title=f"tokens/s of {recipe} on {n_cores} cores", title_justify="left")
    found: dict[tuple[str, int], list[float]] = {}
    for count in counts:
        table.add_column(f"{count} busy neighbors", justify="right")
        with neighbors(count):
            for name, variables in list(SETTINGS.items()) * rounds:
                found.setdefault((name, count), []).append(measure(recipe, seconds, variables))
    for name in SETTINGS:
        cells = [found[name, count] for count in counts]
        table.add_row(name, *(f"{statistics.median(c):,.0f} ({min(c):,.0f} to {max(c):,.0f})" for c in cells))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/demo/pretrain.yaml"))
    parser.add_argument("--cores", help="the CPU cores to stay on, such as 0,1 (default: all)")
    parser.add_argument("--neighbors", default="0,6", help="numbers of busy processes to measure beside")
    parser.add_argument("--seconds", type=float, default=6.0, help="a measurement takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="measure once, with the variables as they are")
    arguments = parser.parse_args(argv)
    if arguments.alone:
        print(json.dumps(tokens_per_second(arguments.recipe, arguments.seconds)))
        return 0
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    counts = [int(count) for count in arguments.neighbors.split(",")]
    Console().print(compare(arguments.recipe, arguments.seconds, counts, arguments.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
