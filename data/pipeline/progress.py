"""The progress display of data.prepare and data.feedback: one line per step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps(Progress):
    """The display; disabled if the console is not a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description:24}"),
            BarColumn(30),
            TextColumn("{task.completed:>7,} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=not console.is_terminal,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called at each refresh; updates the running step."""
        for task in self.tasks:
            if not task.finished:
                self.update(task.id, completed=task.fields["n_done"]())
        yield from super().get_renderables()

    @contextmanager
    def following(
        self, name: str, unit: str, n_done: Callable[[], int], total: Callable[[], int] | None = None
    ) -> Iterator[None]:
        """Show a step while the block runs."""
        task = self.add_task(name, total=total() if total else None, unit=unit, n_done=n_done)
        yield
        done = n_done()
        self.update(task, completed=done, total=done)
