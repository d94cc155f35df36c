"""Run directories: who may write one, whether it holds this very run, and when that run is finished.

recipe.yaml, run.json and environment.json are there from the start, done.json is written last: a directory without it
is unfinished and may be continued, whatever happened to the process, and with other values of the keys whose type is
`MayChange`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from recipes.json_text import finite_figures, json_text
from recipes.loader import dump_recipe
from recipes.yaml_text import YamlError, parse_yaml

LOCK_WAIT_SECONDS = 3.0
_LOCK = ".lock"
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "pydantic", "wandb")


T = TypeVar("T")


class _MayChange:
    """Marks a key in a schema."""


MayChange = Annotated[T, _MayChange()]
"""Type of a recipe's key that an unfinished run may be continued with another value of: its result is the same."""


class RunDirectoryError(ValueError):
    """A run directory (or an upstream one) that cannot be used as asked."""


class RunState(Enum):
    """What a run directory holds of the run that is asked for."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


@contextmanager
def prepare_run_directory(
    run_dir: str | Path, recipe: BaseModel, inputs: Mapping[str, str | Path]
) -> Iterator[RunState]:
    """Hold `run_dir` for this process while inside: `with prepare_run_directory(...) as state`.

    `inputs` maps a name to an upstream run directory (which must be finished) or to a file. Only one process may hold a
    directory; only rank 0 may call this. Raises RunDirectoryError when the directory is held, holds a run of another
    recipe or of other inputs, or anything that is no run, and when an input is missing.
    """
    run_dir = Path(run_dir)
    asked: dict[str, Any] = {
        "written": recipe.model_dump(mode="json", exclude_unset=True),
        "may_change": _keys_that_may_change(recipe),
        "inputs": digest_inputs(inputs),
    }
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"run_dir {run_dir}: a file, expected a directory; choose another run_dir")
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(_lock(run_dir))
            state = _state(run_dir, recipe, asked["inputs"], asked["may_change"])
            if state is not RunState.FINISHED:
                starts = _read_json(run_dir / "environment.json") or {"starts": []}
                starts["starts"].append(describe_environment())
                write_atomically(run_dir / "environment.json", _to_json(starts))
                write_atomically(run_dir / "run.json", _to_json(asked))
                write_atomically(run_dir / "recipe.yaml", dump_recipe(recipe))
        except OSError as error:
            raise RunDirectoryError(
                f"run_dir {run_dir} cannot be written ({error}); make room or choose another run_dir"
            ) from error
        yield state


def finish_run(
    run_dir: str | Path,
    recipe: BaseModel,
    inputs: Mapping[str, str | Path],
    key_figure: str,
    seconds: float,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Declare the run whole. Call it last, after every output is on disk; `extra` are figures for machines."""
    run_dir = Path(run_dir)
    began = _read_json(run_dir / "run.json")
    assert began is not None, "finish_run outside prepare_run_directory"
    digests = digest_inputs(inputs)
    if changed := _changed(began["inputs"], digests):
        raise RunDirectoryError(f"{run_dir}: changed while the stage was running: {', '.join(changed)}; run it again")
    done = {
        "stage": getattr(recipe, "stage", None),
        "recipe_sha256": recipe_digest(recipe),
        "inputs": digests,
        "key_figure": key_figure,
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": finite_figures(extra or {}),
    }
    write_atomically(run_dir / "done.json", _to_json(done))


def read_done(run_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run says of itself (done.json), or None where no run has finished."""
    return _read_json(Path(run_dir) / "done.json")


def read_begun(run_dir: str | Path) -> dict[str, Any] | None:
    """The keys as written in the recipe, and the inputs, of the run a directory was begun for; None for no run.

    `written` holds no defaults, so it is equal to the plain data of the recipe file (and overrides) it came from.
    """
    run_dir = Path(run_dir)
    return _read_json(run_dir / "run.json") if (run_dir / "recipe.yaml").exists() else None


def inspect_run_directory(run_dir: str | Path, written: Mapping[str, Any]) -> tuple[RunState, list[str]]:
    """What a stage would find, without running it: the state, and in what the held run differs from what is asked.

    `written` is the plain data of the recipe. The inputs are looked up where the held run had them, as they are now.
    """
    begun = read_begun(run_dir)
    if begun is None:
        return RunState.NEW, []
    state = RunState.FINISHED if read_done(run_dir) else RunState.UNFINISHED
    if differences := _differences(begun["written"], written, begun.get("may_change", [])):
        return state, differences
    try:
        now = digest_inputs({name: held["path"] for name, held in begun["inputs"].items()})
    except RunDirectoryError as error:
        return state, [str(error)]
    return state, _changed(begun["inputs"], now)


def move_aside(run_dir: str | Path) -> Path:
    """Rename a run directory that no process holds to `<run_dir>.replaced-<n>`, which is returned."""
    run_dir = Path(run_dir)
    with _lock(run_dir):
        number = 1
        while (target := run_dir.with_name(f"{run_dir.name}.replaced-{number}")).exists():
            number += 1
        return run_dir.rename(target)


def recipe_digest(recipe: BaseModel) -> str:
    """SHA-256 of the resolved recipe."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def digest_inputs(inputs: Mapping[str, str | Path]) -> dict[str, dict[str, str]]:
    """{name: {path, sha256}}: of a run directory its done.json is hashed, of a file its bytes."""
    digests = {}
    for name, given in inputs.items():
        path = Path(given)
        file = path / "done.json" if path.is_dir() else path
        if not file.is_file():
            found = "holds no finished run (no done.json)" if path.is_dir() else "does not exist"
            raise RunDirectoryError(f"input {name}: {path} {found}; finish the stage that writes it first")
        with file.open("rb") as stream:
            digests[name] = {"path": str(given), "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    return digests


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file holding `text`, durably: after a crash it is the old or the new one, never a part.

    Only by the process that holds the directory. The temporary name is always the same: a killed process leaves one.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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


def _state(run_dir: Path, recipe: BaseModel, inputs: Mapping[str, Any], may_change: Sequence[str]) -> RunState:
    if not (run_dir / "recipe.yaml").exists():
        known = ("environment.json", "run.json")
        others = sorted(path.name for path in run_dir.iterdir() if path.name[0] != "." and path.name not in known)
        if others:
            raise RunDirectoryError(
                f"run_dir {run_dir} holds no run but other files ({', '.join(others[:5])}); choose another run_dir"
            )
        return RunState.NEW
    stored = _read_yaml(run_dir / "recipe.yaml")
    ours = _read_yaml_text(dump_recipe(recipe), "this recipe")
    begun = _read_json(run_dir / "run.json") or {"inputs": {}}
    differences = _differences(stored, ours, may_change) + _changed(begun["inputs"], inputs)
    if differences:
        raise RunDirectoryError(
            f"run_dir {run_dir} holds a run of another recipe or other inputs:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nmove it aside, or choose another run_dir"
        )
    return RunState.FINISHED if read_done(run_dir) else RunState.UNFINISHED


def _differences(stored: Any, ours: Any, may_change: Sequence[str], key: str = "") -> list[str]:
    """Lines `key: there X, here Y` for every leaf that differs, but for the keys in `may_change`."""
    if key in may_change:
        return []
    if isinstance(stored, dict) and isinstance(ours, dict):
        names = [*stored, *(name for name in ours if name not in stored)]
        return [
            line
            for name in names
            for line in _differences(
                stored.get(name, "absent"), ours.get(name, "absent"), may_change, f"{key}.{name}" if key else name
            )
        ]
    return [] if stored == ours else [f"{key}: there {stored!r}, here {ours!r}"]


def _keys_that_may_change(section: BaseModel, prefix: str = "") -> list[str]:
    """Dotted keys marked as `MayChange`, of the section and of those inside it."""
    keys = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if any(isinstance(mark, _MayChange) for mark in field.metadata):
            keys.append(prefix + name)
        elif isinstance(value, BaseModel):
            keys += _keys_that_may_change(value, f"{prefix}{name}.")
    return keys


def _changed(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [*stored, *(name for name in now if name not in stored)]
    return [
        f"input {name} ({(now.get(name) or stored[name])['path']}): its content is not the same"
        for name in names
        if (stored.get(name) or {}).get("sha256") != (now.get(name) or {}).get("sha256")
    ]


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


def _read_yaml(path: Path) -> Any:
    try:
        return _read_yaml_text(path.read_text(encoding="utf-8"), str(path))
    except (YamlError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error}); move the run directory aside") from None


def _read_yaml_text(text: str, source: str) -> Any:
    return parse_yaml(text, source).data
