"""Run recipes with every value of some keys, several at a time on each device; what is finished is kept.

    python -m recipes.sweep recipes/ablation --vary optimizer.lr=1e-3,2e-3,4e-3 --jobs 3 --devices 0,1

A folder stands for the recipes in it; those of stages that train nothing are left out. A run's directory is its
recipe's with the values behind it (`runs/ablation/mqa_lr_1e-3`), its output is in a file beside that
(`runs/ablation/mqa_lr_1e-3.log`). Further arguments `dotted.key=value` replace a value in every recipe.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from recipes.child_process import Child, Ended, StopRequests
from recipes.interrupt import tell_interrupt
from recipes.loader import RecipeError, read_document
from recipes.pipeline import (
    Planned,
    check,
    make_room,
    minutes,
    path_override,
    shown_state,
    stage_environment,
    tell_problems,
)
from recipes.run_directory import RunDirectoryError, RunState, read_done
from recipes.stages import STAGES
from recipes.sweep_display import Progress, SweepDisplay, read_progress

_SECONDS_BETWEEN_LOOKS = 0.5
_LOG_LINES_SHOWN = 15
_NOT_IN_A_NAME = re.compile(r"[^-\w.]+", re.ASCII)


@dataclass(frozen=True)
class Variation:
    """A dotted key and the values it takes in turn, as they were written."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variation:
        """Of `dotted.key=value,value`. Raises RecipeError."""
        key, equals, values = text.partition("=")
        found = tuple(value.strip() for value in values.split(","))
        if not equals or not key or not all(found):
            raise RecipeError(f"--vary {text}: expected dotted.key=value,value, as in optimizer.lr=1e-3,2e-3")
        if len(set(found)) < len(found):
            raise RecipeError(f"--vary {text}: a value is given twice; keep one")
        return cls(key, found)


@dataclass
class SweepRun:
    """One recipe with one value of each varied key, and what became of it. `ended` is None until a child of it ends."""

    planned: Planned
    ended: Ended | None = None
    started: bool = False
    stopped: bool = False

    @property
    def log(self) -> Path:
        """Where the output of its children goes, one after the other."""
        return self.planned.run_dir.with_name(f"{self.planned.run_dir.name}.log")

    @property
    def max_steps(self) -> int:
        loop = self.planned.written.get("loop")
        return int(loop.get("max_steps", 0)) if isinstance(loop, dict) else 0

    @property
    def outcome(self) -> str:
        """`finished`, `kept`, `failed`, `stopped` (when we were), or `waiting`."""
        is_done = read_done(self.planned.run_dir) is not None
        if self.ended is None:
            return "kept" if is_done and not self.started else "waiting"
        return "finished" if is_done and not self.ended.code else "stopped" if self.stopped else "failed"


@dataclass
class Running:
    """A run whose child is alive, on a slot of a device, and where its part of the log begins."""

    run: SweepRun
    device: str | None
    child: Child
    log_start: int
    file: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def progress(self) -> Progress:
        """Step and loss, as the last line of its metrics says."""
        return read_progress(self.run.planned.run_dir / "metrics.jsonl")

    def log_end(self) -> str:
        """The last lines of what this child wrote."""
        with self.run.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").rstrip().splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def recipe_files(paths: Sequence[Path]) -> list[Path]:
    """`paths` with every folder replaced by its YAML files, in the order of their names."""
    return [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]


def plan(
    paths: Sequence[Path], variations: Sequence[Variation], overrides: Sequence[str]
) -> tuple[list[SweepRun], list[str]]:
    """Every recipe with every combination of values, and what of `paths` is left out, with the reason.

    All recipes with the first values come first: stopped halfway, a sweep has compared all at one value. Raises
    RecipeError.
    """
    trained, left_out = [], []
    for path in paths:
        stage = read_document(path).data.get("stage")
        if isinstance(stage, str) and stage in STAGES and STAGES[stage].distributed:
            trained.append(path)
        else:
            left_out.append(f"{path} (stage {stage}: it trains nothing)")
    if not trained:
        found = ", ".join(map(str, paths)) or "no file"
        raise RecipeError(f"found {found}, expected at least one recipe of a stage that trains")
    runs, problems = [], []
    for values in itertools.product(*(variation.values for variation in variations)):
        chosen = [(variation.key, value) for variation, value in zip(variations, values, strict=True)]
        for path in trained:
            try:
                runs.append(SweepRun(_plan_run(path, chosen, overrides)))
            except RecipeError as error:
                problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    directories = [run.planned.run_dir.resolve() for run in runs]
    if shared := {str(run.planned.run_dir) for run in runs if directories.count(run.planned.run_dir.resolve()) > 1}:
        raise RecipeError(f"run_dir {', '.join(sorted(shared))} is that of two runs; each needs its own")
    return runs, left_out


def _plan_run(path: Path, chosen: Sequence[tuple[str, str]], overrides: Sequence[str]) -> Planned:
    settings = [*overrides, *(f"{key}={value}" for key, value in chosen)]
    document = read_document(path, settings)
    run_dir = document.data.get("run_dir")
    if not isinstance(run_dir, str):
        raise RecipeError(f"{path}: run_dir: found {run_dir!r}, expected a string")
    suffix = "".join(f"_{key.rpartition('.')[2]}_{_NOT_IN_A_NAME.sub('-', value)}" for key, value in chosen)
    if suffix:
        settings.append(path_override("run_dir", run_dir.rstrip("/") + suffix))
        document = read_document(path, settings)
    stage = STAGES[document.data["stage"]]
    return Planned(path.stem + suffix, stage, path, 1, tuple(settings), document.data)


def slots_of(devices: Sequence[str], jobs: int) -> list[str | None]:
    """`jobs` places on every device, the devices in turn; without devices, `jobs` places that choose none."""
    each: list[str | None] = list(devices) or [None]
    return [device for _ in range(jobs) for device in each]


def child_environment(device: str | None, n_slots: int) -> dict[str, str]:
    """The environment of a run: its share of the cores, and its device alone."""
    environment = stage_environment(n_slots)
    return environment if device is None else environment | {"CUDA_VISIBLE_DEVICES": device}


def start(run: SweepRun, device: str | None, n_slots: int) -> Running:
    """Start the child of a run. One process needs no launcher, and so no port that another run could take."""
    run.started = True
    run.log.parent.mkdir(parents=True, exist_ok=True)
    file = run.log.open("ab")
    planned = run.planned
    command = [sys.executable, "-m", planned.stage.module, str(planned.recipe_path), *planned.overrides]
    return Running(run, device, Child(command, child_environment(device, n_slots), log=file), file.tell(), file)


def run_all(runs: Sequence[SweepRun], slots: Sequence[str | None], console: Console, stops: StopRequests) -> int:
    """Run what is not finished; the exit code: 0, 1 when a run failed, 128 + signal when asked to stop."""
    waiting = deque(run for run in runs if make_room(run.planned, console) is not RunState.FINISHED)
    free, running = deque(slots), list[Running]()
    failures: list[str] = []
    with SweepDisplay(runs, console) as display:
        while running or (waiting and not stops.received):
            while waiting and free and not stops.received:
                running.append(start(waiting.popleft(), free.popleft(), len(slots)))
                display.began(running[-1])
            for one in list(running):
                one.run.ended = one.child.look(stops, measure=False)
                if one.run.ended is None:
                    continue
                one.run.stopped = bool(stops.received)
                one.file.close()
                running.remove(one)
                free.append(one.device)
                display.ended(one)
                if one.run.outcome == "failed":
                    failures.append(f"{_failure(one)}\n{one.log_end()}")
                    display.say(failures[-1])
            display.show(running)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    _tell_end(runs, console)
    for failure in failures:
        console.print(f"\n{failure}", highlight=False, markup=False, soft_wrap=True)
    if stops.received:
        console.print("stopped; the same command continues from here", highlight=False)
        return 128 + stops.received[0]
    return 1 if failures else 0


def _failure(one: Running) -> str:
    ended, planned = one.run.ended, one.run.planned
    assert ended is not None
    how = f"failed with exit code {ended.code}" if ended.code else "ended before it was finished"
    where = "" if one.device is None else f"CUDA_VISIBLE_DEVICES={one.device} "
    again = f"to run it alone: {where}{planned.typed()}"
    return f"{planned.name} {how} after {minutes(ended.seconds)}; {again}\n{one.run.log}:"


def _tell_end(runs: Sequence[SweepRun], console: Console) -> None:
    table = Table("run", "", "key figure", title="the sweep's runs", title_justify="left")
    table.add_column("time", justify="right")
    for run in runs:
        done = read_done(run.planned.run_dir)
        figure = str(done["key_figure"]) if done else str(run.log) if run.started else ""
        colour = {"failed": "[bold red]", "waiting": "[yellow]", "stopped": "[yellow]"}.get(run.outcome, "")
        seconds = minutes(run.ended.seconds) if run.ended else ""
        table.add_row(run.planned.name, f"{colour}{run.outcome}", figure, seconds)
    console.print(table)


def _tell_plan(runs: Sequence[SweepRun], slots: Sequence[str | None], console: Console) -> None:
    table = Table("run", "state", "command", title="what would run", title_justify="left")
    for run in runs:
        table.add_row(run.planned.name, shown_state(run.planned), run.planned.typed())
    console.print(table)
    devices = ", ".join(str(device) for device in dict.fromkeys(slots) if device is not None)
    console.print(f"{len(runs)} runs, {len(slots)} at a time" + (f", on devices {devices}" if devices else ""))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="recipe.yaml, folder or dotted.key=value", help="recipes, and overrides"
    )
    parser.add_argument("--vary", action="append", default=[], metavar="dotted.key=value,value", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each device (default 1)")
    parser.add_argument("--devices", default="", metavar="0,1", help="GPUs, as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe, say what would run, and stop")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = _parse(argv)
    console = Console()
    try:
        if arguments.jobs < 1:
            raise RecipeError(f"--jobs {arguments.jobs}: expected 1 or more")
        paths = recipe_files([Path(word) for word in arguments.recipes if "=" not in word])
        overrides = [word for word in arguments.recipes if "=" in word]
        runs, left_out = plan(paths, [Variation.parse(text) for text in arguments.vary], overrides)
        for line in left_out:
            console.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
        check([run.planned for run in runs])
        slots = slots_of([device for device in arguments.devices.split(",") if device], arguments.jobs)
        if arguments.dry_run:
            _tell_plan(runs, slots, console)
            return 0
        return run_all(runs, slots, console, StopRequests())
    except KeyboardInterrupt:
        return tell_interrupt()
    except (RecipeError, RunDirectoryError) as error:
        tell_problems(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
