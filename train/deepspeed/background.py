"""Background threads for disk I/O, so that a slow disk neither stalls training nor makes a collective time out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from train.deepspeed.world import World

POLL_SECONDS = 0.5


class Background:
    """Runs an action in a thread. `failure`: its error message, set once it is no longer busy."""

    def __init__(self, action: Callable[[], None]):
        self.failure: str | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)  # do not block process exit
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # a full disk alone raises several types
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]


def on_main(world: World, action: Callable[[], float | None]) -> tuple[float, str | None]:
    """Run `action` on rank 0; every rank gets (its result, or 0.0; its error, or None).

    The other ranks poll with short collectives: waiting in a single one would hit the process group's timeout.
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
