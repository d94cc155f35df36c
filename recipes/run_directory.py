"""Run directories: locking, the identity of the run in a directory, and when that run is finished.

recipe.yaml, run.json and environment.json are written first and done.json last: a directory without done.json is
unfinished and can be continued. A run is the same if its recipe has the same identity (run_identity.py) and its inputs
have the same content (run_inputs.py), wherever the directory is.
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
    """A run directory, of this run or of an input, that cannot be used."""


class MissingInputError(RunDirectoryError):
    """An input of a run that is missing, unfinished or damaged."""


class RunState(Enum):
    """The state of a run directory with respect to a recipe."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    DAMAGED = "finished, but damaged: made again"


@contextmanager
def prepare_run_directory(
    run_dir: str | Path, recipe: BaseModel, inputs: Mapping[str, str | Path]
) -> Iterator[RunState]:
    """Lock `run_dir` and prepare it for a run: `with prepare_run_directory(...) as state`.

    `inputs` maps a name to an upstream run directory, which must be finished, or to a file; if there is work to do,
    their content is verified. Only rank 0 may call this. Raises RunDirectoryError if another process holds the
    directory, if it holds another run or other files, and if an input is missing. Damaged outputs of a finished run are
    printed, and the stage makes them again. After a user error inside the block (ValueError, FileNotFoundError) before
    any checkpoint, the directory can be used by a corrected recipe.
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
                (run_dir / "done.json").unlink(missing_ok=True)  # a finished run continues to a larger max_steps
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
    """Release the directory for a corrected recipe after a user error, unless there are checkpoints.

    Without recipe.yaml the directory holds no run. The remaining files record what they were made from.
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
    """Write done.json. Call it last, after every output is on disk; `extra` are figures for later stages.

    `outputs`: files and folders of `run_dir` that later stages read; their content identifies this run to them.
    `by_size`: other files, which are not hashed. If a file of either is missing or changes its size, the run is not
    finished.
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
    """The content of done.json, or None if no run has finished."""
    return _read_json(Path(run_dir) / "done.json")


def damage(run_dir: str | Path) -> list[str]:
    """One line for every file of a finished run that is missing or whose size changed."""
    return damaged_outputs(Path(run_dir), read_done(run_dir) or {})


def inspect_run_directory(
    run_dir: str | Path, recipe: BaseModel, inputs: Callable[[], Mapping[str, str | Path]]
) -> tuple[RunState, list[str]]:
    """The state of a run directory, and how the run in it differs from the recipe and its inputs.

    Raises MissingInputError if the inputs of the run in it are missing, so that the two cannot be compared.
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
    """Rename a run directory that no process holds to `<run_dir>.replaced-<n>`; returns the new path."""
    run_dir = Path(run_dir)
    with _lock(run_dir):
        number = 1
        while (target := run_dir.with_name(f"{run_dir.name}.replaced-{number}")).exists():
            number += 1
        durable_rename(run_dir, target)
        return target


def describe_environment() -> dict[str, Any]:
    """Time, command, machine, package versions and git state of a start."""
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
    """Commit and changed files of the checkout; None without git or a checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Lock the directory. The operating system releases the lock when the process ends."""
    with (run_dir / _LOCK).open("a+") as file:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS  # a process that was just killed may still be exiting
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
        if others and not (run_dir / "run.json").exists():  # run.json: left by a run that failed
            raise RunDirectoryError(
                f"run_dir {run_dir} holds files that are not of a run ({', '.join(others[:5])}); choose another run_dir"
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
