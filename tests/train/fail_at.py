"""Pre-training one rank of which fails in its third step: `torchrun ... tests/train/fail_at.py HOW RANK RECIPE`.

HOW: loop (it runs for ever), freeze (SIGSTOP), kill (SIGKILL). Or slow: nothing fails, but the rank takes its time to
prepare, to write a checkpoint, and to write the model.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from train import pretrain, run
from train.deepspeed.engine import TrainingEngine


def turn_for_ever() -> None:
    while True:
        pass


def after_a_while(action: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def slowly(*arguments: Any) -> Any:
        if os.environ["RANK"] == str(rank):
            time.sleep(5)
        return action(*arguments)

    return slowly


FAILURES = {
    "loop": turn_for_ever,
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main() -> int:
    """Entry point."""
    how, rank = sys.argv.pop(1), int(sys.argv.pop(1))
    if how == "slow":
        preparing = patch("train.pretrain.prepare", after_a_while(pretrain.prepare, rank))
        with preparing, patch("train.run._write_model", after_a_while(run._write_model, rank)):
            return pretrain.main()
    fail = FAILURES[how]
    step = TrainingEngine.step

    def failing(engine: TrainingEngine, *arguments: Any) -> tuple[float, bool]:
        if engine.world.rank == rank and engine.world.progress.step == 2:
            fail()
        return step(engine, *arguments)

    with patch("train.deepspeed.engine.TrainingEngine.step", failing):
        return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
