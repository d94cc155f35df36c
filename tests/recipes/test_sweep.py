"""A sweep runs every recipe with every value, keeps what is finished, names what failed, and stops cleanly."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from recipes.child_process import StopRequests
from recipes.loader import RecipeError
from recipes.run_directory import read_done
from recipes.stages import STAGES, EntryPoint
from recipes.sweep import Variation, child_environment, last_step_and_loss, main, plan, recipe_files, run_all, slots_of

ROOT = Path(__file__).parents[2]

STAGE = '''
"""A stage that trains nothing; it can be told to fail, to wait for a file, or to sleep."""
import json, os, sys, time
from pathlib import Path
from typing import Literal
from recipes.loader import Section, parse_command_line
from recipes.run_directory import RunState, finish_run, prepare_run_directory
from recipes.run_identity import Location

class Toy(Section):
    stage: Literal["pretrain"]
    run_dir: Location
    lr: float
    do: Literal["finish", "fail", "meet", "sleep"] = "finish"
    fails_at: float = 0.0
    loop: dict[str, int] = {}

    def inputs(self):
        return {}

if __name__ == "__main__":
    recipe = parse_command_line(Toy).recipe
    runs = Path(recipe.run_dir).parent
    with prepare_run_directory(recipe.run_dir, recipe, {}) as state:
        with (runs / "launched").open("a") as file:
            file.write(f"{Path(recipe.run_dir).name} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\\n")
        (Path(recipe.run_dir) / "metrics.jsonl").write_text('{"step": 3, "loss": 1.25}\\n')
        print("pid", os.getpid(), flush=True)
        if recipe.do == "sleep":
            time.sleep(600)
        if recipe.do == "meet":  # finishes only if another run is there at the same time
            deadline = time.monotonic() + 60
            while len((runs / "launched").read_text().splitlines()) < 2:
                if time.monotonic() > deadline:
                    sys.exit(3)
                time.sleep(0.05)
        if recipe.do == "fail" or recipe.lr == recipe.fails_at:
            print("the last words", flush=True)
            sys.exit(7)
        finish_run(recipe.run_dir, recipe, {}, f"lr was {recipe.lr}", 1.0)
'''
DRIVER = """
import sys
from recipes.stages import STAGES, EntryPoint
STAGES["pretrain"] = EntryPoint("toy_trainer", distributed=True)
from recipes.sweep import main
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout in miniature: two recipes of a toy stage, and one of a stage that trains nothing."""
    (tmp_path / "toy_trainer.py").write_text(STAGE)
    (tmp_path / "drive.py").write_text(DRIVER)
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"stage: pretrain\nrun_dir: runs/{name}\nlr: 1.0\n")
    (tmp_path / "data.yaml").write_text("stage: data\nrun_dir: runs/data\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_trainer", raising=False)
    monkeypatch.setitem(STAGES, "pretrain", EntryPoint("toy_trainer", distributed=True))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def launched(folder: Path) -> list[str]:
    file = folder / "runs" / "launched"
    lines = sorted(file.read_text().splitlines()) if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def sweep(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["a.yaml", "b.yaml", "data.yaml", *arguments])
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def test_every_recipe_runs_with_every_value_and_is_kept(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vary = ("--vary", "lr=1e-3,2e-3", "--jobs", "2")
    code, output = sweep(capfd, *vary)
    assert code == 0, output
    assert launched(folder) == ["a_lr_1e-3 -", "a_lr_2e-3 -", "b_lr_1e-3 -", "b_lr_2e-3 -"]
    assert "left out: data.yaml (stage data" in output
    assert output.count("lr was 0.002") == 2
    done = read_done(folder / "runs" / "b_lr_2e-3")
    assert done is not None
    assert done["key_figure"] == "lr was 0.002"
    assert "pid" in (folder / "runs" / "b_lr_2e-3.log").read_text()

    code, output = sweep(capfd, *vary)
    assert (code, launched(folder)) == (0, []), output
    assert output.count("kept") >= 4
    code, output = sweep(capfd, "--vary", "lr=2e-3,3e-3")
    assert (code, launched(folder)) == (0, ["a_lr_3e-3 -", "b_lr_3e-3 -"]), output


def test_a_changed_recipe_moves_the_old_run_aside(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep(capfd, "--vary", "lr=1e-3")
    launched(folder)
    code, output = sweep(capfd, "--vary", "lr=1e-3", "fails_at=9.0")
    assert (code, launched(folder)) == (0, ["a_lr_1e-3 -", "b_lr_1e-3 -"]), output
    assert "moved to runs/a_lr_1e-3.replaced-1" in output


def test_a_failed_run_is_named_and_the_others_go_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output = sweep(capfd, "--vary", "lr=1e-3,2e-3", "fails_at=1e-3")
    assert code == 1
    assert len(launched(folder)) == 4
    assert "a_lr_1e-3 failed with exit code 7" in output
    assert "the last words" in output
    assert "runs/a_lr_1e-3.log" in output
    assert read_done(folder / "runs" / "b_lr_2e-3") is not None
    # the next call tries the failed ones again, and shows the end of the new log only
    (folder / "runs" / "a_lr_1e-3.log").write_text("old words\n")
    code, output = sweep(capfd, "--vary", "lr=1e-3,2e-3", "fails_at=1e-3")
    assert (code, launched(folder)) == (1, ["a_lr_1e-3 -", "b_lr_1e-3 -"])
    assert "old words" not in output


def test_jobs_run_at_the_same_time_each_on_its_device(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output = sweep(capfd, "do=meet", "--devices", "0,1")
    assert code == 0, output
    assert launched(folder) == ["a 0", "b 1"]
    assert slots_of(["0", "1"], 2) == ["0", "1", "0", "1"]
    assert slots_of([], 2) == [None, None]


def test_the_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    environment = child_environment("1", 6)
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_dry_run_runs_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, output = sweep(capfd, "--vary", "lr=1e-3,2e-3", "--jobs", "3", "--devices", "0,1", "--dry-run")
    assert code == 0
    assert not (folder / "runs").exists()
    assert "4 runs, 6 at a time, on devices 0, 1" in output
    assert "python -m toy_trainer b.yaml lr=2e-3 run_dir=runs/b_lr_2e-3" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "lr"], "--vary lr: expected dotted.key=value,value"),
        (["--vary", "lr=1,1"], "a value is given twice"),
        (["--vary", "lr=1,,2"], "--vary lr=1,,2: expected"),
        (["--vary", "rate=1,2"], "rate"),
        (["--vary", "lr=fast"], "lr"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["run_dir=runs/same"], "run_dir runs/same is used twice"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, output = sweep(capfd, *arguments)
    assert code == 2
    assert message in output
    assert not (folder / "runs").exists()


def test_recipes_that_train_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"found data\.yaml, expected at least one recipe of a stage that trains"):
        plan([Path("data.yaml")], [], [])


def test_a_folder_stands_for_its_recipes(folder: Path) -> None:
    assert recipe_files([folder, Path("a.yaml")]) == [folder / f"{n}.yaml" for n in ("a", "b", "data")] + [
        Path("a.yaml")
    ]


def test_runs_that_begin_together_are_of_different_recipes(folder: Path) -> None:
    runs, _ = plan([Path("a.yaml"), Path("b.yaml")], [Variation("lr", ("1e-3", "2e-3"))], [])
    assert [run.planned.name for run in runs] == ["a_lr_1e-3", "b_lr_1e-3", "a_lr_2e-3", "b_lr_2e-3"]


def test_ctrl_c_ends_the_children(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "drive.py", "a.yaml", "b.yaml", "do=sleep", "--jobs", "2"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    logs = [folder / "runs" / f"{name}.log" for name in ("a", "b")]
    deadline = time.monotonic() + 60
    while not all(log.exists() and "pid" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    pids = [int(log.read_text().split()[1]) for log in logs]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "run the same command to continue" in output
    assert output.count("stopped") >= 3
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_progress_is_read_from_a_file_being_written(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_step_and_loss(metrics) == (0, None)
    lines = "".join(f'{{"step": {step}, "loss": {step / 10}}}\n' for step in range(1, 1000))
    metrics.write_text(lines + '{"step": 999, "heldout_loss": 3.0}\n{"step": 1000, "lo')
    assert last_step_and_loss(metrics) == (999, 99.9)


class Screen(io.StringIO):
    """A terminal; asks the sweep to stop once the step of a run is on it."""

    def __init__(self, stops: StopRequests) -> None:
        super().__init__()
        self.stops = stops

    def write(self, text: str) -> int:
        if "3/8" in text and not self.stops.received:
            self.stops.received.append(signal.SIGTERM)
        return super().write(text)


def test_a_terminal_shows_step_loss_and_device_of_each_run(folder: Path) -> None:
    stops = StopRequests()
    screen = Screen(stops)
    timer = threading.Timer(60, stops.received.append, [signal.SIGTERM])
    timer.start()
    runs, _ = plan([Path("a.yaml"), Path("b.yaml")], [], ["do=sleep", "loop.max_steps=8"])
    assert run_all(runs, ["gpu7"], Console(file=screen, force_terminal=True, width=120), stops) == 128 + signal.SIGTERM
    timer.cancel()
    shown = screen.getvalue()
    assert re.search(r"a +gpu7 +3/8 +1\.250 ", shown), shown
    assert "1 running, 1 waiting" in shown
    assert [run.outcome for run in runs] == ["stopped", "waiting"]


def test_no_run_starts_once_asked_to_stop(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stops = StopRequests()
    stops.received.append(signal.SIGTERM)
    runs, _ = plan([Path("a.yaml")], [], [])
    assert run_all(runs, [None], Console(), stops) == 128 + signal.SIGTERM
    assert launched(folder) == []
