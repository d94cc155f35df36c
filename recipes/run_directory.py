"""Run directories: who may write one, whether it holds this very run, and when that run is finished.

recipe.yaml, run.json and environment.json are there from the start, done.json is written last: a directory without it
is unfinished and may be continued, whatever happened to the process. It is the same run where the recipe has the same
identity (run_identity.py) and the inputs have the same content (run_inputs.py), wherever the directory lies.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recipes.files import durable_rename, write_text
from recipes.json_text import finite_figures, json_text
from recipes.loader import dump_recipe
from recipes.run_identity import differences, grown, identity, recipe_digest
from recipes.run_inputs import (
    Digests,
    InputError,
    changed_inputs,
    check_content,
    content_digest,
    damaged_outputs,
    digest_inputs,
    output_sizes,
)
from recipes.yaml_text import YamlError, parse_yaml

LOCK_WAIT_SECONDS = 3.0
_LOCK = ".lock"
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "pydantic", "wandb")


class RunDirectoryError(ValueError):
    """A run directory (or an upstream one) that cannot be used as asked."""


class MissingInputError(RunDirectoryError):
    """An input of a run that is not there, not finished, or damaged."""


class RunState(Enum):
    """What a run directory holds of the run that is asked for."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    DAMAGED = "finished, but damaged: made again"


@contextmanager
def prepare_run_directory(
    run_dir: str | Path, recipe: BaseModel, inputs: Mapping[str, str | Path]
) -> Iterator[RunState]:
    """Hold `run_dir` for this process while inside: `with prepare_run_directory(...) as state`.

    `inputs` maps a name to an upstream run directory (which must be finished) or to a file. Only one process may hold a
    directory; only rank 0 may call this. Raises RunDirectoryError when the directory is held, holds a run of another
    recipe or of other inputs, or anything that is no run, and when an input is missing. An error of the user's
    inside (ValueError, FileNotFoundError) before anything is trained leaves the directory to a corrected recipe.
    Files that a finished run wrote and that are missing or of another size now are printed: the stage makes them again.
    Where something is to be done, the inputs are read once to see that they are what was written.
    """
    run_dir = Path(run_dir)
    digests = _digests(inputs, run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"run_dir {run_dir}: a file, expected a directory; choose another run_dir")
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(_lock(run_dir))
            state = _state(run_dir, recipe, digests)
            if state is not RunState.FINISHED:
                _check_content(inputs)
                for line in damage(run_dir):
                    print(f"{line}: made again")
                (run_dir / "done.json").unlink(missing_ok=True)  # of a run that goes on to a larger number of steps
                starts = _read_json(run_dir / "environment.json") or {"starts": []}
                starts["starts"].append(describe_environment())
                write_text(run_dir / "environment.json", _to_json(starts))
                write_text(run_dir / "run.json", _to_json({"identity": identity(recipe), "inputs": digests}))
                write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
        except OSError as error:
            raise RunDirectoryError(
                f"run_dir {run_dir} cannot be written ({error}); make room or choose another run_dir"
            ) from error
        try:
            yield state
        except (ValueError, FileNotFoundError):
            _withdraw(run_dir)
            raise


def _withdraw(run_dir: Path) -> None:
    """After an error of the user's: while nothing is trained, a corrected recipe may use the directory.

    Without recipe.yaml it holds no run. What a stage has left there says itself what it was made from.
    """
    trained = any((run_dir / "checkpoints").glob("step_*"))
    if not trained and not (run_dir / "done.json").exists():
        (run_dir / "recipe.yaml").unlink(missing_ok=True)


def finish_run(
    run_dir: str | Path,
    recipe: BaseModel,
    inputs: Mapping[str, str | Path],
    key_figure: str,
    seconds: float,
    extra: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = (),
    by_size: Sequence[str] = (),
) -> None:
    """Declare the run whole. Call it last, after every output is on disk; `extra` are figures for machines.

    `outputs` are the files and folders of `run_dir` that later stages read: by their content they know this run.
    `by_size` are further ones, too large to hash or read by people. Where one of either goes missing or changes its
    size, the run is not finished any more.
    """
    run_dir = Path(run_dir)
    began = _read_json(run_dir / "run.json")
    assert began is not None, "finish_run outside prepare_run_directory"
    digests = _digests(inputs, run_dir)
    if changed := changed_inputs(began["inputs"], digests):
        raise RunDirectoryError(f"{run_dir}: changed while the stage was running: {', '.join(changed)}; run it again")
    done = {
        "stage": getattr(recipe, "stage", None),
        "recipe_sha256": recipe_digest(recipe),
        "inputs": digests,
        "key_figure": key_figure,
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": finite_figures(extra or {}),
        "outputs": output_sizes(run_dir, (*outputs, *by_size)),
        **({"content": content_digest(run_dir, outputs), "content_of": list(outputs)} if outputs else {}),
    }
    write_text(run_dir / "done.json", _to_json(done))


def read_done(run_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run says of itself (done.json), or None where no run has finished."""
    return _read_json(Path(run_dir) / "done.json")


def damage(run_dir: str | Path) -> list[str]:
    """A line for every file of a finished run that is missing or of another size than it was written with."""
    return damaged_outputs(Path(run_dir), read_done(run_dir) or {})


def inspect_run_directory(
    run_dir: str | Path, recipe: BaseModel, inputs: Callable[[], Mapping[str, str | Path]]
) -> tuple[RunState, list[str]]:
    """What a stage would find, without running it: the state, and in what the held run differs from what is asked.

    Raises MissingInputError where the directory holds a run whose inputs are not there now: whether it is the one that
    is asked for cannot be told.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").exists() or (begun := _read_json(run_dir / "run.json")) is None:
        return RunState.NEW, []
    state = _held_state(run_dir, begun, recipe)
    if found := differences(begun.get("identity", {}), recipe):
        return state, found
    try:
        now = _digests(inputs(), run_dir)
    except (ValueError, OSError) as error:
        raise MissingInputError(str(error)) from None
    return state, changed_inputs(begun.get("inputs", {}), now)


def _digests(inputs: Mapping[str, str | Path], run_dir: Path) -> Digests:
    try:
        return digest_inputs(inputs, run_dir)
    except InputError as error:
        raise MissingInputError(str(error)) from None


def _check_content(inputs: Mapping[str, str | Path]) -> None:
    try:
        check_content(inputs)
    except InputError as error:
        raise MissingInputError(str(error)) from None


def move_aside(run_dir: str | Path) -> Path:
    """Rename a run directory that no process holds to `<run_dir>.replaced-<n>`, which is returned."""
    run_dir = Path(run_dir)
    with _lock(run_dir):
        number = 1
        while (target := run_dir.with_name(f"{run_dir.name}.replaced-{number}")).exists():
            number += 1
        durable_rename(run_dir, target)
        return target


def describe_environment() -> dict[str, Any]:
    """When, by what command, on what machine, with which versions and which code a run was started."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit and changed files of the checkout; None where there is no git or no checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Hold the directory. The system releases it with the process, however that ends."""
    with (run_dir / _LOCK).open("a+") as file:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS  # a process that was just killed may still be going away
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RunDirectoryError(
                        f"run_dir {run_dir} is in use by process {holder}; wait for it or choose another run_dir"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _state(run_dir: Path, recipe: BaseModel, inputs: Digests) -> RunState:
    if not (run_dir / "recipe.yaml").exists():
        others = sorted(p.name for p in run_dir.iterdir() if p.name[0] != "." and p.name != "environment.json")
        if others and not (run_dir / "run.json").exists():  # with it, they are what a run has left that ended in error
            raise RunDirectoryError(
                f"run_dir {run_dir} holds no run but other files ({', '.join(others[:5])}); choose another run_dir"
            )
        return RunState.NEW
    _check_readable(run_dir / "recipe.yaml")
    begun = _read_json(run_dir / "run.json") or {}
    if found := differences(begun.get("identity", {}), recipe) + changed_inputs(begun.get("inputs", {}), inputs):
        raise RunDirectoryError(
            f"run_dir {run_dir} holds a run of another recipe or other inputs:\n"
            + "\n".join(f"  {difference}" for difference in found)
            + "\nmove it aside, or choose another run_dir"
        )
    return _held_state(run_dir, begun, recipe)


def _held_state(run_dir: Path, begun: Mapping[str, Any], recipe: BaseModel) -> RunState:
    if not read_done(run_dir) or grown(begun.get("identity", {}), recipe):
        return RunState.UNFINISHED
    return RunState.DAMAGED if damage(run_dir) else RunState.FINISHED


def _to_json(data: Mapping[str, Any]) -> str:
    return json_text(data, indent=1) + "\n"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error}); move the run directory aside") from None
    if not isinstance(data, dict):
        raise RunDirectoryError(f"{path} is damaged: not a JSON object; move the run directory aside")
    return data


def _check_readable(path: Path) -> None:
    try:
        parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (YamlError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error}); move the run directory aside") from None
