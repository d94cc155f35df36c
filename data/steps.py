"""The progress display of data.prepare: one line for each step."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

StepProgress = Callable[[int], None]


class Steps:
    """The display, while inside `with`; nothing where the console is no terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(30),
            TextColumn("{task.completed:>9,} {task.fields[unit]}"),
        )
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Steps":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, unit: str = "", total: int | None = None) -> StepProgress:
        """Start a step; call what it returns with the amount done since."""
        for task in self._progress.tasks:
            if task.total is None:
                self._progress.update(task.id, total=max(task.completed, 1), completed=max(task.completed, 1))
        task_id = self._progress.add_task(name, total=total, unit=unit)
        return lambda amount: self._progress.advance(task_id, amount)
