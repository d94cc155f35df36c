"""Ctrl-C ends an entry point with one line and exit code 130, whatever it was doing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import recipes.pipeline
import recipes.sweep
from recipes.interrupt import EXIT_CODE
from tests.interrupted import interrupted_at_import

ROOT = Path(__file__).parents[2]


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
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path, module: str, imported: str) -> None:
    done = interrupted_at_import(imported, tmp_path, [module, "recipes/demo", "--dry-run"])
    assert (done.returncode, done.stdout) == (EXIT_CODE, "")
    assert done.stderr.split("\n") == ["", "interrupted; run the same command again", ""]


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
