"""What a sweep shows while it runs: the runs in progress and the time left; lines where there is no terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recipes.pipeline import minutes

if TYPE_CHECKING:
    from recipes.sweep import Running, SweepRun

_SECONDS_BETWEEN_LINES = 20.0
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps taken, and its last training loss where one is known."""

    step: int
    loss: float | None


def read_progress(metrics: Path) -> Progress:
    """The last whole lines of a metrics.jsonl that is being written; step 0 where there is none yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return Progress(0, None)
    step, loss = 0, None
    for line in lines:
        try:
            record = json.loads(line)
            step, loss = int(record["step"]), record.get("loss", loss)
        except (ValueError, KeyError, TypeError):
            continue  # the first line of the tail is cut, and the last may be half-written
    return Progress(step, loss)


class SweepDisplay:
    """Shows the runs of a sweep. Drawn by its owner's loop alone: no thread of its own."""

    def __init__(self, runs: Sequence[SweepRun], console: Console):
        self._runs, self._console = runs, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._began = self._last_line = time.monotonic()
        self._kept = sum(run.max_steps for run in runs if run.outcome == "kept")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line (or more) that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def began(self, one: Running) -> None:
        """Say that a run has started."""
        where = "" if one.device is None else f" on device {one.device}"
        self.say(f"{minutes_since(self._began)} {one.run.planned.name} starts{where}: {one.run.log}")

    def ended(self, one: Running) -> None:
        """Say how a run ended."""
        self.say(f"{minutes_since(self._began)} {one.run.planned.name} {one.run.outcome} ({minutes_since(one.began)})")

    def show(self, running: Sequence[Running]) -> None:
        """Draw the table anew; without a terminal, a line now and then."""
        progress = {id(one): one.progress() for one in running}
        summary = self._summary(sum(one.step for one in progress.values()), len(running))
        if self._live:
            table = Table("running", "device", "step", "loss", "time", box=None)
            for one in running:
                step, loss = progress[id(one)].step, progress[id(one)].loss
                table.add_row(
                    one.run.planned.name, one.device or "", f"{step}/{one.run.max_steps}",
                    "" if loss is None else f"{loss:.3f}", minutes_since(one.began),
                )  # fmt: skip
            self._live.update(Group(table, Text(summary)), refresh=True)
        elif running and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            steps = ", ".join(f"{one.run.planned.name} {progress[id(one)].step}" for one in running)
            self.say(f"{minutes_since(self._began)} {summary}; steps: {steps}")

    def _summary(self, running_steps: int, n_running: int) -> str:
        ended = [run for run in self._runs if run.ended is not None]
        total = sum(run.max_steps for run in self._runs) - self._kept
        taken = sum(run.max_steps for run in ended) + running_steps
        counts = {name: sum(run.outcome == name for run in self._runs) for name in ("finished", "kept", "failed")}
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        parts += [f"{n_running} running", f"{len(self._runs) - sum(counts.values()) - n_running} waiting"]
        seconds = time.monotonic() - self._began
        left = minutes((total - taken) / taken * seconds) if taken else "-:--"
        return f"{', '.join(parts)}; {minutes(seconds)} so far, about {left} left"


def minutes_since(began: float) -> str:
    """`m:ss` since a moment of the monotonic clock."""
    return minutes(time.monotonic() - began)
