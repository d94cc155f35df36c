"""Run a command of this checkout that receives Ctrl-C at a given place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interrupted_at_import(
    module: str, directory: Path, command: list[str], swallowed: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m <command>`, which receives SIGINT when it first imports `module`. swallowed: code that catches all
    exceptions, as torch's import of NumPy from C does, receives it.

    `directory` is for a sitecustomize.py. The process has its own session and the default handler: shells ignore
    SIGINT in background jobs, and their children inherit that.
    """
    (directory / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        f"                if not {swallowed}: raise\n"
        "sys.meta_path.insert(0, Interrupts())\n"
    )
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{directory}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
