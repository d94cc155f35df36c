"""Run recipes with every value of some keys, several at a time on each device; finished runs are kept.

    python -m recipes.sweep recipes/ablation --vary optimizer.lr=1e-3,2e-3,4e-3 --jobs 3 --devices 0,1

A folder stands for the recipes in it, except those of stages that do not train. A run's directory is its recipe's with
the values appended (`runs/ablation/mqa_lr_1e-3`); its output goes to a log beside it (`runs/ablation/mqa_lr_1e-3.log`).
Further arguments `dotted.key=value` replace a value in every recipe.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recipes.child_process import Child, Ended, StopRequests
from recipes.interrupt import print_interrupt
from recipes.loader import RecipeError, read_document
from recipes.pipeline import (
    PlannedStage,
    check,
    check_run_dirs_differ,
    make_room,
    minutes,
    path_override,
    print_plan,
    print_problems,
    stage_environment,
)
from recipes.run_directory import RunDirectoryError, RunState, read_done
from recipes.stage_errors import USER_ERROR, print_os_error
from recipes.stages import STAGES

_POLL_SECONDS = 0.5
_SECONDS_BETWEEN_LINES = 20.0  # of progress, without a terminal
_LOG_LINES_SHOWN = 15
_METRICS_TAIL_BYTES = 4096
_NOT_IN_A_NAME = re.compile(r"[^-\w.]+", re.ASCII)


@dataclass(frozen=True)
class Variation:
    """A dotted key and its values, as written."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variation:
        """Parse `dotted.key=value,value`. Raises RecipeError."""
        key, equals, values = text.partition("=")
        found = tuple(value.strip() for value in values.split(","))
        if not equals or not key or not all(found):
            raise RecipeError(f"--vary {text}: expected dotted.key=value,value, as in optimizer.lr=1e-3,2e-3")
        if len(set(found)) < len(found):
            raise RecipeError(f"--vary {text}: a value is given twice; keep one")
        return cls(key, found)


@dataclass
class SweepRun:
    """One recipe with one value of each varied key, and the child process that runs it."""

    planned: PlannedStage
    device: str | None = None
    child: Child | None = None
    ended: Ended | None = None
    is_stopped: bool = False
    log_start: int = 0

    @property
    def log(self) -> Path:
        """The output of its children, appended."""
        return self.planned.run_dir.with_name(f"{self.planned.run_dir.name}.log")

    @property
    def max_steps(self) -> int:
        loop = self.planned.written.get("loop")
        return int(loop.get("max_steps", 0)) if isinstance(loop, dict) else 0

    @property
    def outcome(self) -> str:
        """`kept`, `waiting`, `running`, `finished`, `failed`, or `stopped` by a stop request."""
        is_done = read_done(self.planned.run_dir) is not None
        if self.child is None:
            return "kept" if is_done else "waiting"
        if self.ended is None:
            return "running"
        return "finished" if is_done and not self.ended.code else "stopped" if self.is_stopped else "failed"

    def start(self, device: str | None, n_slots: int) -> None:
        """Start a child on `device`. One process needs no launcher, so no two runs can collide on a port."""
        self.device = device
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.child = Child(self.planned.command(), child_environment(device, n_slots), log)

    def failure(self) -> str:
        """How it failed, the command that reproduces it, and the end of its log."""
        assert self.ended is not None
        how = f"failed with exit code {self.ended.code}" if self.ended.code else "ended before it was finished"
        where = "" if self.device is None else f"CUDA_VISIBLE_DEVICES={self.device} "
        lines = self.log.read_bytes()[self.log_start :].decode("utf-8", "replace").rstrip().splitlines()
        again = f"to run it alone: {where}{self.planned.typed()}"
        head = f"{self.planned.name} {how} after {minutes(self.ended.seconds)}; {again}"
        return "\n".join([head, f"{self.log}:", *lines[-_LOG_LINES_SHOWN:]])


def recipe_files(paths: Sequence[Path]) -> list[Path]:
    """`paths` with every folder replaced by its YAML files, sorted by name."""
    return [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]


def plan(
    paths: Sequence[Path], variations: Sequence[Variation], overrides: Sequence[str]
) -> tuple[list[SweepRun], list[str]]:
    """Every recipe with every combination of values, and the excluded `paths` with the reason.

    All recipes with the first values come first: a sweep that is stopped halfway has compared all recipes at one value.
    Raises RecipeError.
    """
    trained, left_out = [], []
    for path in paths:
        stage = read_document(path).data.get("stage")
        if isinstance(stage, str) and stage in STAGES and STAGES[stage].distributed:
            trained.append(path)
        else:
            left_out.append(f"{path} (stage {stage} does not train)")
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
    check_run_dirs_differ([run.planned for run in runs])
    return runs, left_out


def _plan_run(path: Path, chosen: Sequence[tuple[str, str]], overrides: Sequence[str]) -> PlannedStage:
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
    return PlannedStage(path.stem + suffix, stage, path, 1, tuple(settings), document.data)


def slots_of(devices: Sequence[str], jobs: int) -> list[str | None]:
    """`jobs` slots on every device, devices alternating; without devices, `jobs` slots that choose none."""
    each: Sequence[str | None] = devices or [None]
    return [device for _ in range(jobs) for device in each]


def child_environment(device: str | None, n_slots: int) -> dict[str, str]:
    """The environment of a run: its share of the cores, and its device alone."""
    environment = stage_environment(n_slots)
    return environment if device is None else environment | {"CUDA_VISIBLE_DEVICES": device}


def run_all(runs: Sequence[SweepRun], slots: Sequence[str | None], console: Console, stops: StopRequests) -> int:
    """Run what is not finished; the exit code: 0, 1 if a run failed, 128 + signal after a stop request."""
    waiting = deque(run for run in runs if make_room(run.planned, console) is not RunState.FINISHED)
    kept_steps = sum(run.max_steps for run in runs if run.outcome == "kept")
    free, running, failures = deque(slots), list[SweepRun](), list[str]()
    began = last_line = time.monotonic()

    def say(text: str, clock: bool = True) -> None:
        now = f"{minutes(time.monotonic() - began)} " if clock else ""
        console.print(now + text, highlight=False, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while running or (waiting and not stops.received):
            while waiting and free and not stops.received:
                run = waiting.popleft()
                run.start(free.popleft(), len(slots))
                running.append(run)
                where = "" if run.device is None else f" on device {run.device}"
                say(f"{run.planned.name} starts{where}: {run.log}")
            for run in list(running):
                assert run.child is not None
                run.ended = run.child.poll(stops, measure=False)
                if run.ended is not None:
                    run.is_stopped = bool(stops.received)
                    running.remove(run)
                    free.append(run.device)
                    say(f"{run.planned.name} {run.outcome} ({minutes(run.ended.seconds)})")
                    if run.outcome == "failed":
                        failures.append(run.failure())
                        say(failures[-1], clock=False)
            progress = [(run, *last_step_and_loss(run.planned.run_dir / "metrics.jsonl")) for run in running]
            done_steps = sum(run.max_steps for run in runs if run.ended) + sum(step for _, step, _ in progress)
            summary = _summary(runs, done_steps, kept_steps, time.monotonic() - began)
            if live:
                live.update(Group(_progress_table(progress), Text(summary)), refresh=True)
            elif running and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                say(f"{summary}; steps: {', '.join(f'{run.planned.name} {step}' for run, step, _ in progress)}")
            time.sleep(_POLL_SECONDS)
    _print_outcomes(runs, console)
    for failure in failures:
        say(f"\n{failure}", clock=False)
    if stops.received:
        say("stopped; run the same command to continue", clock=False)
        return 128 + stops.received[0]
    return 1 if failures else 0


def last_step_and_loss(metrics: Path) -> tuple[int, float | None]:
    """The last step and training loss in a metrics.jsonl that is being written; step 0 if there is none yet."""
    step, loss = 0, None
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _METRICS_TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return step, loss
    for line in lines:
        try:
            record = json.loads(line)
            step, loss = int(record["step"]), record.get("loss", loss)
        except (ValueError, KeyError, TypeError):
            continue  # the tail's first line is cut, and the last may be half-written
    return step, loss


def _summary(runs: Sequence[SweepRun], done_steps: int, kept_steps: int, seconds: float) -> str:
    counts = Counter(run.outcome for run in runs)
    parts = [f"{counts[name]} {name}" for name in ("finished", "kept", "failed") if counts[name]]
    parts += [f"{counts['running']} running", f"{counts['waiting'] + counts['stopped']} waiting"]
    total = sum(run.max_steps for run in runs) - kept_steps
    left = minutes((total - done_steps) / done_steps * seconds) if done_steps else "-:--"
    return f"{', '.join(parts)}; {minutes(seconds)} elapsed, about {left} left"


def _progress_table(progress: Sequence[tuple[SweepRun, int, float | None]]) -> Table:
    table = Table("running", "device", "step", "loss", "time", box=None)
    for run, step, loss in progress:
        assert run.child is not None
        shown = "" if loss is None else f"{loss:.3f}"
        steps = f"{step}/{run.max_steps}"
        table.add_row(run.planned.name, run.device or "", steps, shown, minutes(run.child.seconds))
    return table


def _print_outcomes(runs: Sequence[SweepRun], console: Console) -> None:
    table = Table("run", "", "key figure", title="the sweep's runs", title_justify="left")
    table.add_column("time", justify="right")
    for run in runs:
        done = read_done(run.planned.run_dir)
        figure = str(done["key_figure"]) if done else str(run.log) if run.child else ""
        color = {"failed": "[bold red]", "waiting": "[yellow]", "stopped": "[yellow]"}.get(run.outcome, "")
        table.add_row(run.planned.name, color + run.outcome, figure, minutes(run.ended.seconds) if run.ended else "")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="recipe.yaml, folder or dotted.key=value", help="recipes, and overrides"
    )
    parser.add_argument("--vary", action="append", default=[], metavar="dotted.key=value,value", help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each device (default 1)")
    parser.add_argument("--devices", default="", metavar="0,1", help="GPUs, as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe, print what would run, and stop")
    arguments = parser.parse_intermixed_args(argv)
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
            print_plan([run.planned for run in runs], console)
            on = f", on devices {arguments.devices.replace(',', ', ')}" if arguments.devices else ""
            console.print(f"{len(runs)} runs, {len(slots)} at a time{on}", highlight=False)
            return 0
        return run_all(runs, slots, console, StopRequests())
    except KeyboardInterrupt:
        return print_interrupt()
    except OSError as error:
        print_os_error(error, Path.cwd())
        return USER_ERROR
    except (RecipeError, RunDirectoryError) as error:
        print_problems(error)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
