"""Run the parts of an evaluation in order, with a progress bar each."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.scoring import OnProgress

Space = TypeVar("Space")
Part = Callable[[Space, OnProgress], dict[str, Any] | None]
"""Figures of one part, from the evaluation's workspace; None if the recipe omits the part."""


def run_parts(
    parts: Mapping[str, Part[Space]], space: Space, console: Console
) -> tuple[dict[str, dict[str, Any] | None], dict[str, float]]:
    """(the figures, the seconds) of every part."""
    width = max(map(len, parts)) + 1
    columns = (TextColumn(f"[bold]{{task.description:<{width}}}"), BarColumn(bar_width=30), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    results: dict[str, dict[str, Any] | None] = {}
    seconds: dict[str, float] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, part in parts.items():
            started = time.monotonic()
            task = progress.add_task(name.replace("_", " "), total=None)
            results[name] = part(space, partial(_advance, progress, task))
            progress.update(task, total=1, completed=1, visible=results[name] is not None)
            seconds[name] = round(time.monotonic() - started, 2)
            if not console.is_terminal and results[name] is not None:
                console.print(f"{name}: {seconds[name]:.1f} s", highlight=False)
    return results, seconds


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, total=total, completed=done)
