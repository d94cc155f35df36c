"""Checkpoints that are whole or absent: staged, hashed, renamed; the newest sound one is resumed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from data.atomic_file import sync_path
from data.sampler import DataPosition
from data.shards import file_sha256
from train.engine import World

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there can be read."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows besides tensors: all that decides which data comes next, and who wrote it."""

    step: int
    position: DataPosition
    world_size: int
    skipped_steps: int = 0


class Checkpoints:
    """The `checkpoints/` folder of a run: step_N directories, and `latest` naming the newest."""

    def __init__(self, directory: Path, keep: int, world: World, console: Console):
        self.directory, self._keep, self._world, self._console = directory, keep, world, console

    def save(self, state: CheckpointState, write: Callable[[Path], None]) -> None:
        """Write step_N: `write(staging)` is called on every rank and fills the staging directory.

        Raises CheckpointError on every rank when any rank failed; older checkpoints are then as they were.
        """
        target = self.directory / f"step_{state.step:08d}"
        staging = self.directory / f".writing_{target.name}"
        if self._world.is_main:
            self._remove_leftovers()
            staging.mkdir(parents=True)
        self._world.barrier()
        failure = _attempt(lambda: write(staging))
        (n_failed,) = self._world.sum([float(failure is not None)])
        if self._world.is_main and not n_failed:
            failure = _attempt(lambda: self._complete(staging, target, state))
        (n_failed,) = self._world.sum([float(failure is not None)])
        if n_failed:
            if self._world.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            reason = failure or "another rank could not write its part"
            raise CheckpointError(
                f"checkpoint {target} could not be written: {reason}. Older checkpoints are untouched; "
                "run the same command again once there is room"
            )

    def newest(self) -> tuple[Path, CheckpointState] | None:
        """The newest checkpoint whose every file has its recorded hash, or None when there is none at all.

        A damaged one is named aloud and the one before it is tried. Raises CheckpointError when all are damaged.
        """
        found = sorted(self.directory.glob("step_*"), reverse=True)
        for path in found:
            problem = damage(path)
            if problem is None:
                return path, _read_state(path)
            if self._world.is_main:
                self._console.print(f"[bold red]checkpoint {path} is damaged[/]: {problem}", soft_wrap=True)
                self._console.print("trying the one before it")
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; remove the folder to start from the beginning"
            )
        return None

    def _complete(self, staging: Path, target: Path, state: CheckpointState) -> None:
        content = {**asdict(state), "position": state.position.to_dict()}
        (staging / STATE).write_text(json.dumps(content, indent=2) + "\n")
        hashes = {str(path.relative_to(staging)): file_sha256(path) for path in _files(staging)}
        (staging / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
        for path in (*_files(staging), *(p for p in staging.rglob("*") if p.is_dir()), staging):
            sync_path(path)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        sync_path(self.directory)
        pointer = self.directory / f".{LATEST}"
        pointer.write_text(target.name + "\n")
        sync_path(pointer)
        pointer.rename(self.directory / LATEST)
        sync_path(self.directory)
        for old in sorted(self.directory.glob("step_*"))[: -self._keep]:
            # out of sight first: a half-removed directory must not look like a checkpoint
            doomed = old.rename(old.with_name(f".removing_{old.name}"))
            shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for leftover in (*self.directory.glob(".writing_*"), *self.directory.glob(".removing_*")):
            shutil.rmtree(leftover, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file is as it was written."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != expected:
            return f"{name} does not have the hash it was written with"
    return None


def _read_state(path: Path) -> CheckpointState:
    content = json.loads((path / STATE).read_text())
    return CheckpointState(**{**content, "position": DataPosition.from_dict(content["position"])})


def _attempt(action: Callable[[], None]) -> str | None:
    """Run `action`; the reason when the disk refused. torch reports a full disk as RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
