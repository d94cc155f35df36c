"""Work that runs beside the ranks' collectives, so that a slow disk neither stops training nor lets a peer time out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from train.deepspeed.world import World

POLL_SECONDS = 0.5


class Background:
    """An action in a thread of its own. `failure` says why it ended early, once it is no longer busy."""

    def __init__(self, action: Callable[[], None]):
        self.failure: str | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)  # a process that is told to end does not wait
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # a full disk alone has several types: OSError, torch's, safetensors'
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]


def on_main(world: World, action: Callable[[], float | None]) -> tuple[float, str | None]:
    """What `action` returns, run by rank 0 alone, and why it failed, on every rank, however long it takes.

    Ranks that waited inside one collective would be ended by the process group's timeout.
    """
    result = [0.0]

    def run() -> None:
        result[0] = action() or 0.0

    work = Background(run) if world.is_main else None
    while True:
        if work:
            work.wait(POLL_SECONDS)
        n_busy, n_failed, value = world.sum(
            [float(bool(work and work.busy)), float(bool(work and work.failure)), result[0]]
        )
        if not n_busy:
            return value, world.first_text(work.failure if work else None) if n_failed else None
