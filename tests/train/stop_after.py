"""Pre-training that is asked to stop after some of its own steps: `python tests/train/stop_after.py STEPS RECIPE`."""

from __future__ import annotations

import sys
from unittest.mock import patch

from train import pretrain


def main() -> int:
    """Entry point. The request comes as if by SIGTERM, once the loop has taken the steps."""
    steps = int(sys.argv.pop(1))
    answers = iter([False] * steps)
    with patch("train.health.stopping.StopRequest.requested", lambda self: next(answers, True)):
        return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
