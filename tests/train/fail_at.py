"""Pre-training one rank of which fails in its third step: `torchrun ... tests/train/fail_at.py HOW RECIPE`.

HOW: loop (it runs for ever), freeze (SIGSTOP), kill (SIGKILL). The failing rank is 1.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest.mock import patch

from train import pretrain
from train.engine import Engine


def turn_for_ever() -> None:
    while True:
        pass


FAILURES = {
    "loop": turn_for_ever,
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main() -> int:
    """Entry point."""
    fail = FAILURES[sys.argv.pop(1)]
    step = Engine.step

    def failing(engine: Engine, *arguments: Any) -> tuple[float, bool]:
        if engine.world.rank == 1 and engine.world.progress.step == 2:
            fail()
        return step(engine, *arguments)

    with patch("train.engine.Engine.step", failing):
        return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
