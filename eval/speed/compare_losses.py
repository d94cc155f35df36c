"""Compare the training losses of runs with those of the first run, step by step.

python -m eval.speed.compare_losses runs/bench/zero_1 runs/bench/zero_2 runs/bench/zero_3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.parts.training_curve import METRICS, MetricsError, read_records
from recipes.json_text import as_number
from recipes.loader import print_error


class CompareError(ValueError):
    """Runs that cannot be compared."""


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, of a run's metrics.jsonl."""
    path = run_dir / METRICS
    if not path.is_file():
        raise CompareError(f"{path} does not exist; expected the directory of a training run")
    return {int(step): as_number(record["loss"]) for step, record in read_records(path) if "loss" in record}


def largest_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, int, int]:
    """(largest |ours - theirs| / theirs over common steps, its step, number of common steps)."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise CompareError("the runs have no step in common; log every step of both (loop.log_every: 1)")
    differences = {step: abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in common}
    worst = max(differences, key=lambda step: differences[step])
    return differences[worst], worst, len(common)


def main() -> int:
    """Entry point: 0, or 2 for runs that cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="run_dir", help="the first one is the reference")
    first, *others = parser.parse_args().runs
    console = Console()
    table = Table("run", "steps", "largest relative difference", "at step", title=f"training loss against {first}")
    try:
        reference = losses(first)
        for run_dir in others:
            difference, step, n_steps = largest_difference(losses(run_dir), reference)
            table.add_row(str(run_dir), str(n_steps), f"{difference:.1e}", str(step))
    except (CompareError, MetricsError) as error:
        print_error(error)
        return 2
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
