"""A run directory belongs to one recipe, its inputs and one process; it is finished only when it says so last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from recipes import run_directory
from recipes.loader import Section, load_recipe
from recipes.run_directory import (
    MayChange,
    RunDirectoryError,
    RunState,
    digest_inputs,
    finish_run,
    inspect_run_directory,
    prepare_run_directory,
    read_begun,
    read_done,
    recipe_digest,
    write_atomically,
)


class Recipe(Section):
    stage: Literal["sft"] = "sft"
    run_dir: str
    steps: int = 10
    seed: int = 0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "sft"


def recipe_of(run_dir: Path, **keys: int) -> Recipe:
    return Recipe(stage="sft", run_dir=str(run_dir), **keys)


def state_of(run_dir: Path, recipe: Recipe, inputs: dict[str, str] | None = None) -> RunState:
    with prepare_run_directory(run_dir, recipe, inputs or {}) as state:
        return state


def finish(run_dir: Path, recipe: Recipe, inputs: dict[str, str] | None = None) -> None:
    with prepare_run_directory(run_dir, recipe, inputs or {}):
        finish_run(run_dir, recipe, inputs or {}, "loss 3.2", 12.34, {"loss": 3.2})


def test_a_run_is_new_then_unfinished_then_finished(run_dir: Path) -> None:
    recipe = recipe_of(run_dir, steps=5)
    assert state_of(run_dir, recipe) is RunState.NEW
    assert state_of(run_dir, recipe) is RunState.UNFINISHED
    assert read_done(run_dir) is None
    finish(run_dir, recipe)
    assert state_of(run_dir, recipe) is RunState.FINISHED
    done = read_done(run_dir)
    assert done is not None
    assert (done["key_figure"], done["seconds"], done["figures"]) == ("loss 3.2", 12.3, {"loss": 3.2})
    assert done["recipe_sha256"] == recipe_digest(recipe)


def test_the_directory_holds_the_resolved_recipe_the_written_keys_and_every_start(run_dir: Path) -> None:
    recipe = recipe_of(run_dir, steps=5)
    state_of(run_dir, recipe)
    state_of(run_dir, recipe)
    assert load_recipe(Recipe, run_dir / "recipe.yaml") == recipe
    begun = read_begun(run_dir)
    written = {"stage": "sft", "run_dir": str(run_dir), "steps": 5}
    assert begun == {"written": written, "may_change": [], "inputs": {}}
    starts = json.loads((run_dir / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert {"time", "command", "python", "versions", "git"} <= starts[0].keys()


def test_another_recipe_is_refused_with_the_keys_that_differ(run_dir: Path) -> None:
    finish(run_dir, recipe_of(run_dir, steps=5))
    with pytest.raises(RunDirectoryError) as caught:
        state_of(run_dir, recipe_of(run_dir, steps=6))
    assert str(caught.value).splitlines()[1:] == [
        "  steps: there 5, here 6",
        "move it aside, or choose another run_dir",
    ]


class Loop(Section):
    steps: int = 10
    keep: MayChange[int] = 2


class Training(Section):
    run_dir: str
    loop: Loop = Loop()
    threads: MayChange[int | None] = None


def test_keys_that_do_not_change_the_result_may_change(run_dir: Path) -> None:
    begun = Training(run_dir=str(run_dir), loop=Loop(steps=5, keep=1))
    with prepare_run_directory(run_dir, begun, {}):
        pass
    other = Training(run_dir=str(run_dir), loop=Loop(steps=5, keep=3), threads=2)
    with prepare_run_directory(run_dir, other, {}) as state:
        assert state is RunState.UNFINISHED
    assert load_recipe(Training, run_dir / "recipe.yaml") == other
    refused = Training(run_dir=str(run_dir), loop=Loop(steps=6, keep=1))
    with pytest.raises(RunDirectoryError) as caught, prepare_run_directory(run_dir, refused, {}):
        pass
    assert str(caught.value).splitlines()[1:-1] == ["  loop.steps: there 5, here 6"]

    written = {"run_dir": str(run_dir), "loop": {"steps": 5}}
    assert inspect_run_directory(run_dir, written) == (RunState.UNFINISHED, [])
    state, differences = inspect_run_directory(run_dir, {**written, "loop": {"steps": 7}})
    assert differences == ["loop.steps: there 5, here 7"]


def test_other_inputs_are_refused_by_name(run_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one")
    recipe, inputs = recipe_of(run_dir), {"corpus": str(corpus)}
    state_of(run_dir, recipe, inputs)
    corpus.write_text("two")
    with pytest.raises(RunDirectoryError, match=r"input corpus \(.*corpus.jsonl\): its content is not the same"):
        state_of(run_dir, recipe, inputs)
    with pytest.raises(RunDirectoryError, match="input corpus"):
        state_of(run_dir, recipe)


def test_an_upstream_run_counts_by_what_it_finished_with(run_dir: Path, tmp_path: Path) -> None:
    upstream = tmp_path / "upstream"
    recipe, inputs = recipe_of(run_dir), {"data": str(upstream)}
    with pytest.raises(RunDirectoryError, match=r"input data: .*upstream does not exist"):
        state_of(run_dir, recipe, inputs)
    assert not run_dir.exists()
    state_of(upstream, recipe_of(upstream))
    with pytest.raises(RunDirectoryError, match=r"holds no finished run \(no done.json\)"):
        state_of(run_dir, recipe, inputs)
    finish(upstream, recipe_of(upstream))
    finish(run_dir, recipe, inputs)
    done = read_done(run_dir)
    assert done is not None
    assert done["inputs"] == digest_inputs(inputs)
    assert state_of(run_dir, recipe, inputs) is RunState.FINISHED


def test_an_input_that_changes_under_the_run_keeps_it_from_finishing(run_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one")
    recipe, inputs = recipe_of(run_dir), {"corpus": str(corpus)}
    with prepare_run_directory(run_dir, recipe, inputs):
        corpus.write_text("two")
        with pytest.raises(RunDirectoryError, match="changed while the stage was running"):
            finish_run(run_dir, recipe, inputs, "figure", 1.0)
    assert read_done(run_dir) is None


def test_a_directory_of_something_else_is_left_alone(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match=r"holds no run but other files \(thesis.tex\)"):
        state_of(run_dir, recipe_of(run_dir))
    assert not (run_dir / "recipe.yaml").exists()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(RunDirectoryError, match="a file, expected a directory"):
        state_of(path, recipe_of(path))


@pytest.mark.parametrize(("name", "content"), [("done.json", "{"), ("done.json", "[]"), ("recipe.yaml", "a: [")])
def test_a_damaged_record_is_named(run_dir: Path, name: str, content: str) -> None:
    finish(run_dir, recipe_of(run_dir))
    (run_dir / name).write_text(content)
    with pytest.raises(RunDirectoryError, match=rf"{name} is damaged"):
        state_of(run_dir, recipe_of(run_dir))


def test_what_a_crash_leaves_while_preparing_does_not_make_it_a_run(run_dir: Path) -> None:
    state_of(run_dir, recipe_of(run_dir))
    (run_dir / "recipe.yaml").unlink()
    (run_dir / ".recipe.yaml.writing").write_text("sta")
    assert read_begun(run_dir) is None
    assert state_of(run_dir, recipe_of(run_dir, steps=7)) is RunState.NEW
    assert [path.name for path in run_dir.glob(".*")] == [".lock"], "leftovers do not pile up"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "done.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


HOLDER = """
import sys, time
from recipes.run_directory import prepare_run_directory
from tests_recipe import Recipe
with prepare_run_directory(sys.argv[1], Recipe(run_dir=sys.argv[1]), {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_share_a_directory_until_one_is_killed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "LOCK_WAIT_SECONDS", 0.0)
    schema = "from recipes.loader import Section\nclass Recipe(Section):\n    run_dir: str\n"
    (tmp_path / "tests_recipe.py").write_text(schema)
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=f"in use by process {holder.pid} on "):
            state_of(run_dir, recipe_of(run_dir))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with pytest.raises(RunDirectoryError, match="another recipe"):  # held no longer: now the recipe is looked at
        state_of(run_dir, recipe_of(run_dir))
