"""The progress display of data.prepare and data.feedback: one line for each step."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LOOKS = 0.5


class Steps:
    """The display, while inside `with`; nothing where the console is no terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(30),
            TextColumn("{task.completed:>7,} {task.fields[unit]}"),
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

    @contextmanager
    def following(
        self, name: str, unit: str, n_done: Callable[[], int], total: Callable[[], int] | None = None
    ) -> Iterator[None]:
        """A step, while inside: how much of it is done is asked for again and again by a thread."""
        task = self._progress.add_task(name, total=total() if total else None, unit=unit, completed=n_done())
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                self._progress.update(task, completed=n_done())

        thread = threading.Thread(target=follow, daemon=True)
        if not self._progress.disable:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if not self._progress.disable:
                thread.join()
        done = n_done()
        self._progress.update(task, completed=done, total=done)
