"""The pipeline runs what is missing and keeps what is finished; stop requests and kills reach its stages."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from recipes.child_process import StopRequests, run_child
from recipes.pipeline import main, plan, stage_environment
from recipes.run_directory import read_done
from recipes.stages import STAGES, EntryPoint

ROOT = Path(__file__).parents[2]

STAGE = '''
"""A stage that copies its input's length; it can be told to fail, to wait, or to end early."""
import os, sys, time
from pathlib import Path
from typing import Literal
from recipes.loader import Section, parse_command_line
from recipes.run_identity import Location
from recipes.run_directory import RunState, finish_run, prepare_run_directory

class First(Section):
    stage: Literal["data"]
    run_dir: Location
    value: int = 1
    do: Literal["finish", "fail", "wait", "leave"] = "finish"

    def inputs(self):
        return {}

class Second(First):
    stage: Literal["eval"]
    data: Location

    def inputs(self):
        return {"data": self.data}

if __name__ == "__main__":
    recipe = parse_command_line(First if "first" in sys.argv[1] else Second).recipe
    inputs = recipe.inputs()
    with prepare_run_directory(recipe.run_dir, recipe, inputs) as state:
        with (Path(recipe.run_dir).parent / "launched").open("a") as file:
            file.write(f"{recipe.stage} {state.value}\\n")
        if recipe.do == "wait":
            print(os.getpid(), flush=True)
            time.sleep(600)
        if recipe.do == "fail":
            sys.exit(7)
        if recipe.do == "finish":
            finish_run(recipe.run_dir, recipe, inputs, f"value {recipe.value}", time.time())  # no two are equal
'''
DRIVER = """
import sys
from recipes.stages import STAGES, EntryPoint
STAGES["data"] = STAGES["eval"] = EntryPoint("toy_stage")
from recipes.pipeline import main
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "toy_stage.py").write_text(STAGE)
    (tmp_path / "drive.py").write_text(DRIVER)
    recipes = tmp_path / "recipes_of_toy"
    recipes.mkdir()
    (recipes / "pipeline.yaml").write_text("runs: runs/toy\nstages: [{recipe: first.yaml}, {recipe: second.yaml}]\n")
    (recipes / "first.yaml").write_text("stage: data\nrun_dir: runs/toy/first\n")
    (recipes / "second.yaml").write_text("stage: eval\nrun_dir: runs/toy/second\ndata: runs/toy/first\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_stage", raising=False)
    monkeypatch.setitem(STAGES, "data", EntryPoint("toy_stage"))
    monkeypatch.setitem(STAGES, "eval", EntryPoint("toy_stage"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("COLUMNS", "150")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield recipes
    for number, handler in before.items():
        signal.signal(number, handler)


class Pipeline:
    """Runs the pipeline in this process, its stages as real children."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]):
        self.folder, self.capfd = folder, capfd

    def __call__(self, *arguments: str) -> tuple[int, str]:
        code = main([self.folder.name, *arguments])
        captured = self.capfd.readouterr()
        return code, captured.out + captured.err


@pytest.fixture
def pipeline(folder: Path, capfd: pytest.CaptureFixture[str]) -> Pipeline:
    return Pipeline(folder, capfd)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The pipeline in a process of its own, to be stopped or killed."""
    return subprocess.Popen(
        [sys.executable, "drive.py", folder.name, *arguments],
        cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launched(folder: Path, runs: str = "runs/toy") -> list[str]:
    file = folder.parent / runs / "launched"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_what_is_finished_is_kept(folder: Path, pipeline: Pipeline) -> None:
    code, output = pipeline()
    assert (code, launched(folder)) == (0, ["data new", "eval new"]), output
    assert "value 1" in output
    assert "report: runs/toy/second/report.html" in output
    code, output = pipeline()
    assert (code, launched(folder)) == (0, []), output
    assert output.count("kept") == 2
    # a comment, or a key in another order, is the same recipe
    (folder / "first.yaml").write_text("# same\nrun_dir: runs/toy/first\nstage: data\n")
    assert pipeline()[0] == 0
    assert launched(folder) == []


def test_a_changed_recipe_runs_it_and_what_depends_on_it_again(folder: Path, pipeline: Pipeline) -> None:
    pipeline()
    launched(folder)
    code, output = pipeline("first.value=2")
    assert (code, launched(folder)) == (0, ["data new", "eval new"]), output
    assert "first: runs/toy/first held another run (value: there 1, here 2); moved to" in output
    assert "input data (runs/toy/first): its content differs" in output
    kept = read_done(folder.parent / "runs/toy/first.replaced-1")
    assert kept is not None
    assert kept["key_figure"] == "value 1"
    code, output = pipeline("first.value=2", "second.value=3")
    assert (code, launched(folder)) == (0, ["eval new"]), output


def test_a_missing_upstream_runs_again(folder: Path, pipeline: Pipeline) -> None:
    pipeline()
    launched(folder)
    (folder.parent / "runs/toy/first").rename(folder.parent / "runs/elsewhere")
    assert pipeline()[0] == 0
    assert launched(folder) == ["data new", "eval new"]


@pytest.mark.parametrize("runs", ["runs/toy/", "./runs/toy", "runs/../runs//toy", "absolute", "linked"])
def test_another_spelling_is_the_same_run(folder: Path, pipeline: Pipeline, runs: str) -> None:
    pipeline()
    launched(folder)
    (folder.parent / "linked").symlink_to(folder.parent / "runs" / "toy")
    place = str(folder.parent / "runs" / "toy") if runs == "absolute" else runs
    code, output = pipeline("--runs", place)
    assert (code, launched(folder)) == (0, []), output
    for name in ("first", "second"):
        file = folder / f"{name}.yaml"
        file.write_text(file.read_text().replace("runs/toy", place))
    code, output = pipeline()
    assert (code, launched(folder)) == (0, []), output
    if runs != "linked":  # another folder by name, and what lies in it is asked for by that name
        code, output = pipeline("--runs", "copied")
        assert (code, launched(folder, "copied")) == (0, ["data new", "eval new"]), output


def test_a_moved_folder_goes_on_from_another_working_directory(
    folder: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline("second.do=leave")
    assert launched(folder) == ["data new", "eval new"]
    (folder.parent / "there").mkdir()
    (folder.parent / "runs" / "toy").rename(folder.parent / "there" / "moved")
    monkeypatch.chdir(folder.parent / "there")
    command = [str(folder), "--runs", "moved", "second.do=leave"]
    code = main(command)
    assert (code, launched(folder, "there/moved")) == (1, ["eval unfinished"]), capfd.readouterr()
    assert main([*command, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "finished" in shown and "unfinished" in shown and "another recipe" not in shown


def test_a_missing_input_moves_nothing_aside(folder: Path, pipeline: Pipeline) -> None:
    (folder / "pipeline.yaml").write_text("runs: runs/toy\nstages: [{recipe: second.yaml}]\n")
    pipeline("second.data=recipes_of_toy/first.yaml")
    launched(folder)
    (folder / "first.yaml").rename(folder / "gone.yaml")
    code, output = pipeline("second.data=recipes_of_toy/first.yaml")
    assert (code, launched(folder)) == (2, [])
    assert "input data: recipes_of_toy/first.yaml does not exist" in output
    assert not list((folder.parent / "runs" / "toy").glob("*.replaced-*"))
    (folder / "gone.yaml").write_text("changed")
    code, output = pipeline("second.data=recipes_of_toy/gone.yaml")
    assert (code, launched(folder)) == (0, ["eval new"]), output
    assert "input data (recipes_of_toy/gone.yaml): its content differs" in output


def test_runs_can_go_elsewhere(folder: Path, pipeline: Pipeline) -> None:
    other = folder.parent / "other: place"
    code, output = pipeline("--runs", str(other))
    assert code == 0, output
    assert launched(folder, "other: place") == ["data new", "eval new"]
    assert not (folder.parent / "runs").exists()
    recipe = YAML(typ="safe").load((other / "second" / "recipe.yaml").read_text())
    assert (recipe["run_dir"], recipe["data"]) == (f"{other}/second", f"{other}/first")


def test_a_failing_stage_is_named_with_its_code_and_how_to_run_it(folder: Path, pipeline: Pipeline) -> None:
    code, output = pipeline("first.do=fail", "first.value=4")
    assert (code, launched(folder)) == (7, ["data new"]), output
    assert "first failed with exit code 7" in output
    assert "to run it alone: python -m toy_stage recipes_of_toy/first.yaml do=fail value=4" in output
    code, output = pipeline("second.do=leave")
    assert (code, launched(folder)) == (1, ["data new", "eval new"]), output
    assert "second ended before it was finished" in output


def test_every_bad_recipe_is_told_before_anything_runs(folder: Path, pipeline: Pipeline) -> None:
    (folder / "second.yaml").write_text("stage: eval\nrun_dir: runs/toy/second\nadta: runs/toy/first\n")
    code, output = pipeline("first.valeu=3")
    assert (code, launched(folder)) == (2, []), output
    assert "valeu" in output
    assert "did you mean data?" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frist.value=3"], "did you mean first.value=3?"),
        (["value=3"], "expected stage.dotted.key=value; stages are first, second"),
        (["first.value"], "expected dotted.key=value"),
    ],
)
def test_a_bad_override_is_told(folder: Path, pipeline: Pipeline, arguments: list[str], message: str) -> None:
    code, output = pipeline(*arguments)
    assert (code, launched(folder)) == (2, [])
    assert message in output


def test_a_dry_run_runs_nothing(folder: Path, pipeline: Pipeline) -> None:
    code, output = pipeline("--dry-run", "second.value=3")
    assert code == 0, output
    assert "toy_stage recipes_of_toy/second.yaml value=3" in output
    assert not (folder.parent / "runs").exists()


def waiting_stage(process: subprocess.Popen[str]) -> psutil.Process:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdecimal():
            return psutil.Process(int(line))
    raise AssertionError("the stage did not start")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_request_reaches_the_stage(folder: Path, number: int, code: int) -> None:
    process = start(folder, "first.do=wait")
    stage = waiting_stage(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "first has stopped; run the same command to continue" in output
    assert not stage.is_running()
    assert launched(folder) == ["data new"]


def test_a_killed_pipeline_leaves_no_stage_behind_and_continues(folder: Path) -> None:
    (folder / "first.yaml").write_text("stage: data\nrun_dir: runs/toy/first\ndo: wait\n")
    process = start(folder)
    stage = waiting_stage(process)
    process.kill()
    process.communicate(timeout=60)
    stage.wait(20)
    launched(folder)
    process = start(folder)
    waiting_stage(process)
    process.kill()
    process.communicate(timeout=60)
    assert launched(folder) == ["data unfinished"]


@pytest.mark.usefixtures("folder")
def test_a_second_request_kills_what_does_not_listen() -> None:
    # on SIGTERM the child does nothing but ask us a second time; it asks a first time once it listens
    ask = "os.kill(os.getppid(), 15)"
    deaf = f"import os, signal, time; signal.signal(15, lambda *_: {ask}); {ask}\nwhile True: time.sleep(1)"
    ended = run_child([sys.executable, "-c", deaf], os.environ, StopRequests())
    assert ended.code == -signal.SIGKILL
    assert ended.peak_bytes > 0


def test_cores_are_divided_among_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [stage_environment(n)["OMP_NUM_THREADS"] for n in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert stage_environment(1)["OMP_NUM_THREADS"] == "5"


def test_several_ranks_of_a_stage_are_started_by_the_launcher() -> None:
    commands = {planned.name: planned.command()[2:] for planned in plan(ROOT / "recipes" / "demo", None, [])}
    assert commands["pretrain"][0] == "train.pretrain"
    assert commands["eval"][0] == "eval.run"
    alone = plan(ROOT / "recipes" / "demo", None, [])[1]
    several = dataclasses.replace(alone, nproc_per_node=2)
    assert several.command()[2:7] == ["train.launch", "--nproc-per-node", "2", "-m", "train.pretrain"]
    assert several.typed().startswith("python -m train.launch --nproc-per-node 2 -m train.pretrain ")
