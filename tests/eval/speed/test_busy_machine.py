"""Settings are measured in processes of their own, beside neighbors that end with the measurement."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eval.speed import busy_machine
from eval.speed.busy_machine import main, neighbors

RECIPE = """\
model: {vocab_size: 64, d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, d_head: 8, d_ff: 16, layers: G,
  window: 8, kv_sharing: {kind: none}, max_length: 512}
loop: {rows_per_micro_batch: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_a_table_has_every_setting_beside_each_number_of_neighbors(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(busy_machine, "measure", lambda recipe, seconds, variables: len(str(variables)))
    assert main([str(recipe), "--neighbors", "0,1", "--rounds", "2"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in busy_machine.SETTINGS)
    assert "1 busy neighbors" in shown


def test_a_setting_is_measured_with_its_variables_only(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    run = subprocess.run

    def recorded(command: list[str], env: dict[str, str], **options: Any) -> Any:
        started.append(env)
        return run(command, env=env, **options)

    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "set by the shell")
    monkeypatch.setattr("eval.speed.busy_machine.subprocess.run", recorded)
    assert busy_machine.measure(recipe, 0, {"OMP_NUM_THREADS": "1"}) > 0
    (environment,) = started
    assert {key: value for key, value in environment.items() if key.startswith(("OMP_", "GOMP_"))} == {
        "OMP_NUM_THREADS": "1"
    }


def test_once_is_a_number(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--alone", "--seconds", "0"]) == 0
    assert json.loads(capsys.readouterr().out) > 0


def test_neighbors_end_with_the_measurement() -> None:
    before = set(os.listdir("/proc"))
    with neighbors(1):
        started = [pid for pid in set(os.listdir("/proc")) - before if pid.isdigit()]
        assert started
    assert not any("parent = os.getppid()" in _command(pid) for pid in started)


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
