"""Ctrl-C ends an entry point with one line and exit code 130, whatever it was doing."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import recipes.pipeline
import recipes.sweep
from recipes.interrupt import EXIT_CODE
from tests.interrupted import interrupted_at_import

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(
    ("module", "imported"),
    [
        *itertools.product(["recipes.pipeline", "recipes.sweep"], ["rich.table", "recipes.stages"]),
        ("data.prepare", "data.format.dialogue"),
        ("data.feedback", "data.feedback.pairs"),
        ("eval.run", "torch"),
        ("serving_export.export", "torch"),
        ("serving_export.server", "torch"),
        ("train.pretrain", "torch"),
        ("model.doctor", "rich.console"),
        ("model.doctor", "torch"),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(
    tmp_path: Path, module: str, imported: str, swallowed: bool
) -> None:
    arguments = [] if module == "model.doctor" else ["recipes/demo", "--dry-run"]
    done = interrupted_at_import(imported, tmp_path, [module, *arguments], swallowed)
    assert (done.returncode, done.stdout) == (EXIT_CODE, "")  # the doctor prints nothing without torch
    assert done.stderr.split("\n") == ["", "interrupted; run the same command again", ""]


def test_ctrl_c_in_code_that_python_runs_from_text_does_not_kill(tmp_path: Path) -> None:
    """Dataclasses are made by exec() of a string; Python then ends by SIGINT, whatever main returns."""
    (tmp_path / "program.py").write_text(
        "from recipes.interrupt import print_interrupt\n"
        "try:\n    exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
        "except KeyboardInterrupt:\n    raise SystemExit(print_interrupt('again'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (EXIT_CODE, "\ninterrupted; again\n")


@pytest.mark.parametrize(
    ("module", "planning", "recipe"),
    [(recipes.pipeline, "check_together", "recipes/demo"), (recipes.sweep, "check", "recipes/ablation/mqa.yaml")],
)
def test_ctrl_c_while_planning_is_one_line(
    module: object, planning: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, planning, interrupted)
    monkeypatch.chdir(ROOT)
    assert module.main([recipe, "--dry-run"]) == EXIT_CODE  # type: ignore[attr-defined]
    assert "interrupted; run the same command again" in capfd.readouterr().err
