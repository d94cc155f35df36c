"""A run directory belongs to one recipe and one set of inputs; done.json, written last, says that it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from recipes.loader import dump_recipe

RECIPE, DONE, LOCK, INPUTS, ENVIRONMENT = "recipe.yaml", "done.json", ".lock", "inputs.json", "environment.json"


class RunDirectoryError(ValueError):
    """A run directory is another run's, in use, or an input of it is not there."""


class RunState(Enum):
    """What a run directory held before this run."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


@contextmanager
def prepare_run_directory(run_dir: str | Path, recipe: BaseModel, inputs: Mapping[str, str]) -> Iterator[RunState]:
    """Hold `run_dir` for this run (one process at a time) and say what it held before.

    Writes recipe.yaml, inputs.json and environment.json when it is new. Raises RunDirectoryError when it holds a run
    of another recipe or other inputs, when another process holds it, or when an input is missing or unfinished.
    """
    run_dir = Path(run_dir)
    digests = {name: input_digest(name, path) for name, path in inputs.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as lock:
        _take(lock, run_dir)
        if (run_dir / RECIPE).exists():
            difference = differences(run_dir, recipe, digests)
            if difference:
                raise RunDirectoryError(
                    f"{run_dir} holds a run of another recipe or other inputs:\n  " + "\n  ".join(difference)
                    + f"\nuse another run_dir, or move {run_dir} away"
                )
            yield RunState.FINISHED if read_done(run_dir) else RunState.UNFINISHED
        else:
            write_atomically(run_dir / ENVIRONMENT, json.dumps(_environment(), indent=2) + "\n")
            write_atomically(run_dir / INPUTS, json.dumps(digests, indent=2) + "\n")
            write_atomically(run_dir / RECIPE, dump_recipe(recipe))
            yield RunState.NEW


def finish_run(
    run_dir: str | Path,
    recipe: BaseModel,
    inputs: Mapping[str, str],
    key_figure: str,
    seconds: float,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Mark a run as whole: the last thing a stage does."""
    content = {
        "recipe_sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "inputs": {name: input_digest(name, path) for name, path in inputs.items()},
        "key_figure": key_figure,
        "seconds": round(seconds, 2),
        "figures": dict(figures or {}),
    }
    write_atomically(Path(run_dir) / DONE, json.dumps(content, indent=2) + "\n")


def read_done(run_dir: str | Path) -> dict[str, Any] | None:
    """What finish_run wrote, or None when the run is not finished."""
    try:
        content = json.loads((Path(run_dir) / DONE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def differences(run_dir: Path, recipe: BaseModel, digests: Mapping[str, str]) -> list[str]:
    """In what the run that `run_dir` holds differs from this recipe and these inputs; empty when in nothing."""
    yaml = YAML(typ="safe")
    held = _flat(yaml.load((run_dir / RECIPE).read_text()))
    asked = _flat(yaml.load(dump_recipe(recipe)))
    lines = [
        f"{key}: {held.get(key, 'not set')!r} there, {asked.get(key, 'not set')!r} here"
        for key in sorted(held.keys() | asked.keys())
        if held.get(key) != asked.get(key)
    ]
    try:
        held_inputs = json.loads((run_dir / INPUTS).read_text())
    except (OSError, ValueError):
        held_inputs = {}
    return lines + [f"input {name} has changed" for name in digests if held_inputs.get(name) != digests[name]]


def input_digest(name: str, path: str) -> str:
    """sha256 of a file, or of a run directory's done.json. Raises RunDirectoryError when it is not there."""
    target = Path(path) / DONE if Path(path).is_dir() else Path(path)
    try:
        return hashlib.sha256(target.read_bytes()).hexdigest()
    except FileNotFoundError:
        what = f"{path} is not finished (it has no {DONE})" if Path(path).is_dir() else f"{path} does not exist"
        raise RunDirectoryError(f"{name}: {what}; run its stage first") from None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, durably."""
    staging = path.with_name(f".{path.name}.writing")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(lock: Any, run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise RunDirectoryError(f"{run_dir} is in use by process {lock.read().strip() or 'unknown'}") from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        return {prefix: node}
    return {key: value for name, part in pairs for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _environment() -> dict[str, Any]:
    """Versions and git state, for whoever wants to repeat the run."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    packages = ("torch", "deepspeed", "transformers", "sentencepiece", "numpy")
    installed = {name: metadata.version(name) for name in packages if _is_installed(name)}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
