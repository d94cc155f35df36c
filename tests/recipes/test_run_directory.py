"""A run directory belongs to one recipe, its inputs and one process; it is finished only when it says so last."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from recipes import run_directory, run_inputs
from recipes.loader import Section, load_recipe
from recipes.run_directory import (
    MissingInputError,
    RunDirectoryError,
    RunState,
    finish_run,
    inspect_run_directory,
    prepare_run_directory,
    read_done,
)
from recipes.run_identity import Location, MayChange, identity, recipe_digest
from recipes.run_inputs import DigestCache, content_digest, digest_inputs, names_below


class Recipe(Section):
    stage: Literal["sft"] = "sft"
    run_dir: Location
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
    begun = json.loads((run_dir / "run.json").read_text())
    known_by = {"stage": "sft", "run_dir": "(a location)", "steps": 5, "seed": 0}
    assert begun == {"identity": known_by, "inputs": {}}
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
    run_dir: Location
    loop: Loop = Loop()
    threads: MayChange[int | None] = None


def test_keys_that_do_not_change_the_result_may_change(run_dir: Path) -> None:
    begun = Training(run_dir=str(run_dir), loop=Loop(steps=5, keep=1))
    assert identity(begun) == {"run_dir": "(a location)", "loop": {"steps": 5}}
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

    assert inspect_run_directory(run_dir, begun, dict) == (RunState.UNFINISHED, [])
    state, differences = inspect_run_directory(run_dir, refused, dict)
    assert differences == ["loop.steps: there 5, here 6"]


def test_other_inputs_are_refused_by_name(run_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one")
    recipe, inputs = recipe_of(run_dir), {"corpus": str(corpus)}
    state_of(run_dir, recipe, inputs)
    corpus.write_text("two")
    with pytest.raises(RunDirectoryError, match=r"input corpus \(.*corpus.jsonl\): its content differs"):
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
    with pytest.raises(RunDirectoryError, match=r"holds files that are not of a run \(thesis.tex\)"):
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
    (run_dir / ".recipe.yaml.partial").write_text("sta")
    assert inspect_run_directory(run_dir, recipe_of(run_dir), dict) == (RunState.NEW, [])
    assert state_of(run_dir, recipe_of(run_dir, steps=7)) is RunState.NEW
    assert [path.name for path in run_dir.glob(".*")] == [".lock"], "leftovers do not pile up"


class Part(Section):
    path: Location
    weight: float = 1.0


class Known(Section):
    run_dir: Location
    scorer: Location | None = None
    data: Location | Part = "runs/data"
    models: dict[str, Location]
    parts: tuple[Part, ...] = ()
    title: str = "runs/data"


def test_a_run_is_known_by_its_recipe_without_how_places_are_spelled() -> None:
    def recipe(folder: str, **keys: object) -> Known:
        parts = (Part(path=f"{folder}/a"), Part(path=f"{folder}/b", weight=2.0))
        places = {"run_dir": folder, "scorer": f"{folder}/s", "data": f"{folder}/d", "models": {"sft": f"{folder}/m"}}
        return Known.model_validate({**places, "parts": parts, **keys})

    assert identity(recipe("runs")) == identity(recipe("/elsewhere/./runs/"))
    assert recipe_digest(recipe("runs")) == recipe_digest(recipe("../runs"))
    others = [{"scorer": None}, {"title": "runs"}, {"models": {"dpo": "m"}}, {"data": Part(path="d")}, {"parts": ()}]
    for other in others:
        assert recipe_digest(recipe("runs", **other)) != recipe_digest(recipe("runs")), other


def test_a_key_that_the_schema_has_gained_counts_as_its_default(run_dir: Path) -> None:
    finish(run_dir, recipe_of(run_dir, steps=5))
    begun = json.loads((run_dir / "run.json").read_text())
    del begun["identity"]["seed"]
    (run_dir / "run.json").write_text(json.dumps(begun))
    assert state_of(run_dir, recipe_of(run_dir, steps=5)) is RunState.FINISHED
    with pytest.raises(RunDirectoryError, match="seed: there 'absent', here 3"):
        state_of(run_dir, recipe_of(run_dir, steps=5, seed=3))


@pytest.mark.parametrize("how", ["rename", "copytree", "symlink_to"])
def test_a_moved_or_copied_run_is_the_same_run(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "runs", tmp_path / "elsewhere" / "runs"
    (tmp_path / "logs" / "day").mkdir(parents=True)
    (tmp_path / "logs" / "day" / "one.jsonl").write_text("one")

    def inputs(root: Path, logs: str) -> dict[str, Path]:
        return {"data": root / "data", **names_below("logs", logs, Path(logs).rglob("*.jsonl"))}

    monkeypatch.chdir(tmp_path)
    finish(old / "data", recipe_of(old / "data"))
    state_of(old / "sft", recipe_of(old / "sft"), inputs(old, "logs"))  # type: ignore[arg-type]
    new.parent.mkdir()
    if how == "copytree":
        shutil.copytree(old, new)
    elif how == "rename":
        old.rename(new)
    else:
        new.symlink_to(old)
    monkeypatch.chdir(new.parent)
    here = inputs(Path("./runs/"), "../logs/")
    assert inspect_run_directory("runs/sft", recipe_of(Path("runs/sft")), lambda: here) == (RunState.UNFINISHED, [])
    assert state_of(Path("runs/sft/"), recipe_of(Path("runs/sft")), here) is RunState.UNFINISHED  # type: ignore[arg-type]
    finish(Path("runs/sft"), recipe_of(Path("runs/sft")), here)  # type: ignore[arg-type]
    assert state_of(new / "sft", recipe_of(new / "sft"), inputs(new, str(tmp_path / "logs"))) is RunState.FINISHED  # type: ignore[arg-type]
    (tmp_path / "logs" / "day" / "two.jsonl").write_text("two")
    _, differences = inspect_run_directory(new / "sft", recipe_of(new / "sft"), lambda: inputs(new, "../logs"))
    assert differences == ["input logs: day/two.jsonl (../logs/day/two.jsonl): not an input of that run"]
    shutil.rmtree(new / "data")
    with pytest.raises(MissingInputError, match="data does not exist"):
        inspect_run_directory(new / "sft", recipe_of(new / "sft"), lambda: inputs(new, "../logs"))


def test_a_file_is_hashed_again_only_when_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, hashed = tmp_path / "corpus.jsonl", list[Path]()
    corpus.write_text("one")
    real = run_inputs.file_sha256
    monkeypatch.setattr(run_inputs, "file_sha256", lambda path: hashed.append(path) or real(path))

    def digest() -> str:
        return digest_inputs({"corpus": corpus}, tmp_path)["corpus"]["sha256"]

    first = digest()
    assert (digest(), len(hashed)) == (first, 2), "what was written just now may still be being written"
    monkeypatch.setattr(run_inputs, "_SETTLED_SECONDS", -1e9)
    assert [digest(), digest(), digest()] == [first] * 3
    assert len(hashed) == 3
    (tmp_path / "copy").mkdir()
    shutil.copy2(tmp_path / ".digests.json", tmp_path / "copy")
    assert digest_inputs({"corpus": corpus}, tmp_path / "copy")["corpus"]["sha256"] == first
    assert len(hashed) == 3, "a copied run folder brings what is known of its inputs"
    before = corpus.stat()
    corpus.write_text("two")  # of the same length, and with the old time of modification
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest() != first
    (tmp_path / ".digests.json").write_text("[broken")
    assert DigestCache(tmp_path).sha256(corpus) == digest()


def test_a_finished_run_is_known_by_what_it_left(run_dir: Path, tmp_path: Path) -> None:
    def finished(name: str, text: str) -> str:
        upstream = tmp_path / name
        with prepare_run_directory(upstream, recipe_of(upstream), {}):
            (upstream / "model").mkdir(exist_ok=True)
            (upstream / "model" / "weights").write_text(text)
            finish_run(upstream, recipe_of(upstream), {}, "figure", len(name), outputs=("model",))
        return digest_inputs({"data": upstream})["data"]["sha256"]

    assert finished("first", "same") == finished("another", "same") == content_digest(tmp_path / "first", ["model"])
    assert finished("third", "other") != finished("fourth", "same")


def test_after_an_error_of_the_user_s_the_corrected_recipe_may_use_the_directory(run_dir: Path) -> None:
    def fails(error: Exception, steps: int) -> None:
        def attempt() -> None:
            with prepare_run_directory(run_dir, recipe_of(run_dir, steps=steps), {}):
                (run_dir / "pairs").mkdir(exist_ok=True)
                raise error

        with pytest.raises(type(error)):
            attempt()

    fails(ValueError("too few pairs"), 1)
    assert inspect_run_directory(run_dir, recipe_of(run_dir, steps=2), dict) == (RunState.NEW, [])
    fails(FileNotFoundError("pairs.jsonl"), 2)
    assert state_of(run_dir, recipe_of(run_dir, steps=3)) is RunState.NEW
    fails(OSError("disk full"), 3)  # no error of the user's: the run stays what it is
    with pytest.raises(RunDirectoryError, match="steps: there 3, here 4"):
        state_of(run_dir, recipe_of(run_dir, steps=4))
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    fails(ValueError("late"), 3)  # something is trained: it stays too
    with pytest.raises(RunDirectoryError, match="steps: there 3, here 4"):
        state_of(run_dir, recipe_of(run_dir, steps=4))


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


class Growing(Recipe):
    may_grow: MayChange[bool] = True

    @property
    def keys_that_may_grow(self) -> tuple[str, ...]:
        return ("steps",) if self.may_grow else ()


def test_a_finished_run_goes_on_when_a_key_grows_that_may(run_dir: Path) -> None:
    def growing(steps: int, may_grow: bool = True) -> Growing:
        return Growing(run_dir=str(run_dir), steps=steps, may_grow=may_grow)

    finish(run_dir, growing(5))
    assert inspect_run_directory(run_dir, growing(9), dict) == (RunState.UNFINISHED, [])
    assert inspect_run_directory(run_dir, growing(4), dict)[1] == ["steps: there 5, here 4"]
    assert inspect_run_directory(run_dir, growing(9, may_grow=False), dict)[1] == ["steps: there 5, here 9"]
    with pytest.raises(RunDirectoryError, match="steps: there 5, here 4"):
        state_of(run_dir, growing(4))
    assert read_done(run_dir) is not None
    assert state_of(run_dir, growing(9)) is RunState.UNFINISHED
    assert read_done(run_dir) is None
    finish(run_dir, growing(9))
    assert state_of(run_dir, growing(9)) is RunState.FINISHED


@pytest.fixture
def upstream(run_dir: Path) -> Path:
    """A finished run with a model that later stages read, and a report."""
    recipe = recipe_of(run_dir)
    with prepare_run_directory(run_dir, recipe, {}):
        for name in ("model/a.bin", "report.html"):
            (run_dir / name).parent.mkdir(exist_ok=True)
            (run_dir / name).write_text("0123456789")
        finish_run(run_dir, recipe, {}, "loss 3.2", 1.0, outputs=("model",), by_size=("report.html",))
    return run_dir


@pytest.mark.parametrize("name", ["model/a.bin", "report.html"])
@pytest.mark.parametrize("text", [None, "01234", "01234567890"])
def test_a_finished_run_with_a_damaged_output_is_made_again(
    upstream: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, text: str | None
) -> None:
    recipe = recipe_of(upstream)
    assert inspect_run_directory(upstream, recipe, dict) == (RunState.FINISHED, [])
    (upstream / name).unlink() if text is None else (upstream / name).write_text(text)
    found = "is missing" if text is None else f"has {len(text)} bytes"
    told = f"{upstream / name} {found}, 10 bytes were written"
    with pytest.raises(MissingInputError, match="is damaged: ") as caught:
        state_of(tmp_path / "later", recipe_of(tmp_path / "later"), {"init_from": str(upstream)})
    assert told in str(caught.value)
    assert inspect_run_directory(upstream, recipe, dict) == (RunState.DAMAGED, [])
    assert state_of(upstream, recipe) is RunState.DAMAGED
    assert f"{told}: made again" in capfd.readouterr().out
    assert read_done(upstream) is None, "until it is made again"


def test_other_bytes_of_the_same_size_are_told_by_the_stage_that_reads_them(upstream: Path, tmp_path: Path) -> None:
    later, inputs = tmp_path / "later", {"init_from": str(upstream)}
    assert state_of(later, recipe_of(later), inputs) is RunState.NEW
    (upstream / "model" / "a.bin").write_text("012345678X")
    with pytest.raises(MissingInputError, match="the bytes of model differ from what its run wrote"):
        state_of(later, recipe_of(later), inputs)
    (upstream / "model" / "a.bin").write_text("0123456789")
    with prepare_run_directory(later, recipe_of(later), inputs):
        finish_run(later, recipe_of(later), inputs, "figure", 1.0)
    (upstream / "model" / "a.bin").write_text("012345678X")
    assert state_of(later, recipe_of(later), inputs) is RunState.FINISHED, "it reads nothing"
