"""Atomic checkpoints, written in the background: staged, hashed, renamed. Resume takes the newest intact one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from data.packed.sampler import DataPosition
from recipes.files import atomic_file, durable_rename, sync_path, write_json
from train.checkpoint.best import Best, best_of, json_of
from train.checkpoint.hashed_file import file_hash
from train.deepspeed.background import POLL_SECONDS, Background, on_main
from train.deepspeed.world import World

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
_NONE, _ALL_DAMAGED = -1.0, -2.0

Write = Callable[[Path, threading.Event], Mapping[Path, str]]
"""Writes and fsyncs one rank's files below a directory; their hashes. Fails soon after the event is set."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no existing one can be read."""


@dataclass(frozen=True)
class CheckpointState:
    """State of the loop in a checkpoint, besides tensors.

    max_steps: of the run that saved it (the schedule depends on it). skipped_in_a_row: why each of the last steps was
    skipped. recent_steps: windows of `loop.skip_spikes`. best: best evaluation of `loop.keep_best`.
    """

    step: int
    position: DataPosition
    world_size: int
    max_steps: int
    skipped_steps: int = 0
    skipped_in_a_row: tuple[str, ...] = ()
    recent_steps: dict[str, list[float]] | None = None
    best: Best | None = None


@dataclass
class _Pending:
    """A checkpoint being written: first every rank writes its part, then rank 0 completes it."""

    state: CheckpointState
    staging: Path
    target: Path
    work: Background | None
    completing: bool = False
    abandoned: threading.Event = field(default_factory=threading.Event)


class Checkpoints:
    """The `checkpoints/` folder of a run: step_N directories, and `latest` naming the newest.

    A thread of each rank writes its files. The threads' status is added to a sum that the training loop takes anyway
    (`report`, then `advance` with the sums), so that all ranks see the same status at the same step.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        world: World,
        console: Console,
        max_steps: int = 0,
        stable_steps: Callable[[int], int] = lambda max_steps: 0,
    ):
        """Keep the newest `keep`, and the newest up to step `stable_steps(max_steps)`, from which a longer run resumes.

        stable_steps: max_steps -> number of initial steps whose learning rate is the same in any longer run.
        """
        self.directory, self._keep, self._world, self._console = directory, keep, world, console
        self._max_steps, self._stable_steps = max_steps, stable_steps
        self._pending: _Pending | None = None

    def save(self, state: CheckpointState, snapshot: Callable[[], Write]) -> None:
        """Start saving step_N: `snapshot()` copies the state and returns the function that writes this rank's share.

        Waits for an unfinished earlier save. When any rank fails, every rank raises CheckpointError, here or in a later
        `advance` or `finish`; older checkpoints are unchanged.
        """
        self.finish()
        target = self.directory / f"step_{state.step:08d}"
        staging = self.directory / f".writing_{target.name}"
        pending = self._pending = _Pending(state, staging, target, work=None)
        _, failure = on_main(self._world, lambda: self._make_room(staging))
        if failure:
            raise self._error(failure)
        write = snapshot()
        pending.work = Background(lambda: self._write_part(pending, write))

    def report(self) -> tuple[float, float]:
        """(thread is busy, thread has failed) of this rank, as numbers to be summed over all ranks."""
        work = self._pending.work if self._pending else None
        return float(bool(work and work.busy)), float(bool(work and work.failure))

    def advance(self, n_busy: float, n_failed: float) -> None:
        """Continue the pending save, given the sum of all ranks' reports."""
        pending = self._pending
        if pending is None or n_busy:
            return
        if n_failed:
            raise self._error(self._world.first_text(pending.work.failure if pending.work else None))
        if pending.completing:
            self._pending = None
            return
        pending.completing = True
        pending.work = Background(lambda: self._complete(pending)) if self._world.is_main else None

    def finish(self) -> None:
        """Wait until the pending save is complete (called on every rank)."""
        while self._pending:
            if self._pending.work:
                self._pending.work.wait(POLL_SECONDS)
            self.advance(*self._world.sum([*self.report()]))

    def abandon(self) -> None:
        """Abandon a save that is still being written, for an urgent newer one (called on every rank)."""
        pending = self._pending
        if pending is None or pending.completing:
            return
        assert pending.work is not None, "only a save that is completing has ranks without work"
        pending.abandoned.set()
        while self._world.sum([self.report()[0]])[0]:
            pending.work.wait(POLL_SECONDS)
        self._pending = None  # the next save removes its files

    def newest(self) -> tuple[Path, CheckpointState] | None:
        """The newest checkpoint whose files match their hashes; None when there is no checkpoint.

        Prints and passes over damaged ones, and those that a shorter run saved after its learning rate decay began.
        Raises CheckpointError when all are damaged.
        """
        number, failure = on_main(self._world, self._newest_intact)
        if failure:
            raise CheckpointError(failure)
        if number == _NONE:
            return None
        if number == _ALL_DAMAGED:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; remove the folder to start from the beginning"
            )
        path = self.directory / f"step_{int(number):08d}"
        return path, _read_state(path)

    def tidy(self, newest: Path | None) -> None:
        """Clean up after a killed process, given the newest intact checkpoint (called on every rank).

        Removes partial checkpoints and those beyond `keep`, and corrects `latest`.
        """

        def work() -> None:
            self._remove_leftovers()
            if newest:
                self._make_newest(newest)

        _, failure = on_main(self._world, work)
        if failure:
            raise CheckpointError(f"{self.directory} could not be cleaned up: {failure}")

    def _newest_intact(self) -> float:
        any_damaged = False
        for path in sorted(self.directory.glob("step_*"), reverse=True):
            problem = damage(path)
            if problem is None:
                if (reason := self._other_schedule(_read_state(path))) is None:
                    return float(path.name.removeprefix("step_"))
                self._console.print(f"not continuing from {path}: {reason}", highlight=False, soft_wrap=True)
                continue
            any_damaged = True
            self._console.print(f"[bold red]checkpoint {path} is damaged[/]: {problem}", soft_wrap=True)
            self._console.print("trying the one before it")
        return _ALL_DAMAGED if any_damaged else _NONE

    def _other_schedule(self, state: CheckpointState) -> str | None:
        """Why a run of our `max_steps` could not have saved this checkpoint; None when it could."""
        shared = self._stable_steps(min(state.max_steps, self._max_steps))
        if state.max_steps == self._max_steps or state.step <= shared:
            return None
        return (
            f"it was saved with max_steps={state.max_steps}, whose learning rate decays from step {shared} on; "
            "looking for one before that"
        )

    def _error(self, reason: str) -> CheckpointError:
        pending, self._pending = self._pending, None
        assert pending is not None
        if self._world.is_main:
            shutil.rmtree(pending.staging, ignore_errors=True)
        return CheckpointError(
            f"checkpoint {pending.target} could not be written: {reason}. Older checkpoints are untouched; "
            "run the same command again once there is room"
        )

    def _make_room(self, staging: Path) -> None:
        self._remove_leftovers()
        staging.mkdir(parents=True)

    def _remove_leftovers(self) -> None:
        for leftover in self.directory.glob(".*_step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write_part(self, pending: _Pending, write: Write) -> None:
        staging = pending.staging
        try:
            hashes = write(staging, pending.abandoned)
        except RuntimeError:
            _try_to_write(staging)
            raise
        by_name = {str(path.relative_to(staging)): of_file for path, of_file in hashes.items()}
        write_json(_part(staging, self._world.rank), by_name)

    def _complete(self, pending: _Pending) -> None:
        staging, target = pending.staging, pending.target
        nested = {"position": pending.state.position.to_dict(), "best": json_of(pending.state.best)}
        write_json(staging / STATE, {**asdict(pending.state), **nested})
        hashes = {STATE: file_hash(staging / STATE)}
        for rank in range(self._world.size):
            hashes |= json.loads(_part(staging, rank).read_text())
            _part(staging, rank).unlink()
        write_json(staging / MANIFEST, hashes)
        for path in (p for p in staging.rglob("*") if p.is_dir()):
            sync_path(path)
        if target.exists():
            _remove(target)
        durable_rename(staging, target)
        for path in self.directory.glob("step_*"):
            if path > target:  # damaged: the resume passed over it
                _remove(path)
        self._make_newest(target)

    def _make_newest(self, target: Path) -> None:
        """Point `latest` to `target`, and keep only the `keep` newest up to it."""
        latest = self.directory / LATEST
        if not latest.exists() or latest.read_text() != target.name + "\n":
            with atomic_file(latest, "w") as file:
                file.write(target.name + "\n")
        there = sorted(path for path in self.directory.glob("step_*") if path <= target)
        stable = self.directory / f"step_{self._stable_steps(self._max_steps):08d}"
        before_decay = [path for path in there if path <= stable][-1:] if stable.name != "step_00000000" else []
        for path in there[: -self._keep]:
            if path not in before_decay:
                _remove(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file has its recorded hash."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_hash(path / name) != expected:
            return f"{name} does not have the hash it was written with"
    return None


def _read_state(path: Path) -> CheckpointState:
    content = json.loads((path / STATE).read_text())
    position, in_a_row = DataPosition.from_dict(content["position"]), tuple(content["skipped_in_a_row"])
    best = best_of(content["best"])
    return CheckpointState(**{**content, "position": position, "skipped_in_a_row": in_a_row, "best": best})


def _remove(checkpoint: Path) -> None:
    # rename first: a half-removed directory must not look like a checkpoint
    hidden = checkpoint.with_name(f".removing_{checkpoint.name}")
    durable_rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def _try_to_write(directory: Path) -> None:
    """Raise the OSError that a write there raises now: torch.save's RuntimeError does not mention a full disk."""
    with (directory / ".trial").open("wb") as file:
        file.write(bytes(1 << 20))


def _part(staging: Path, rank: int) -> Path:
    return staging / f".rank_{rank}.json"
