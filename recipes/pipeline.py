"""Run a folder of recipes stage by stage; finished stages are kept: `python -m recipes.pipeline recipes/demo`.

Overrides name the stage: `pretrain.loop.max_steps=5`. `--runs DIR` moves every run directory.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, PositiveInt
from rich.console import Console
from rich.table import Table

from recipes.child_process import Ended, StopRequests, run_child
from recipes.interrupt import print_interrupt
from recipes.loader import RecipeError, Section, load_recipe, read_document
from recipes.plan_check import PlanCheck
from recipes.run_directory import (
    MissingInputError,
    RunDirectoryError,
    RunState,
    inspect_run_directory,
    move_aside,
    read_done,
)
from recipes.stage_errors import USER_ERROR, print_os_error
from recipes.stages import LAUNCHER, STAGES, EntryPoint, entry_module

PIPELINE_FILE = "pipeline.yaml"
DEMO_BUNDLE = "runs/demo/export"
_PLAIN_PATH = re.compile(r"[A-Za-z_./][-\w./]*", re.ASCII)  # YAML reads it as the same text


class StageEntry(Section):
    """One stage: its recipe file, beside pipeline.yaml, and the number of processes of a training stage."""

    recipe: str
    nproc_per_node: PositiveInt = 1


class PipelineRecipe(Section):
    """The stages in order, and the parent folder of their run directories."""

    runs: str
    stages: tuple[StageEntry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of this pipeline with its overrides."""

    name: str
    stage: EntryPoint
    recipe_path: Path
    nproc_per_node: int
    overrides: tuple[str, ...]
    written: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return Path(self.written["run_dir"])

    @cached_property
    def recipe(self) -> Any:
        """The validated recipe. Raises RecipeError."""
        return load_recipe(schema_of(self.written["stage"]), self.recipe_path, self.overrides)

    def inputs(self) -> dict[str, str | Path]:
        """The inputs of the stage by name. Raises ValueError if a source is missing."""
        found: dict[str, str | Path] = self.recipe.inputs()
        return found

    def inspect(self) -> tuple[RunState, list[str]]:
        """The state of its run directory, and its differences to the recipe. Raises MissingInputError."""
        return inspect_run_directory(self.run_dir, self.recipe, self.inputs)

    def typed(self) -> str:
        """The command that runs this stage alone, as a user types it."""
        words = self.stage.command(str(self.recipe_path), self.nproc_per_node)
        return " ".join([words, shlex.join(self.overrides)]).strip()

    def command(self) -> list[str]:
        """The child's command line."""
        launcher = [LAUNCHER, "--nproc-per-node", str(self.nproc_per_node), "-m"] if self.nproc_per_node > 1 else []
        return [sys.executable, "-m", *launcher, self.stage.module, str(self.recipe_path), *self.overrides]


@dataclass(frozen=True)
class Row:
    """A line of the final table; `ended` is None for a stage that was kept."""

    name: str
    ended: Ended | None
    key_figure: str


def plan(folder: Path, runs: str | None, overrides: Sequence[str]) -> list[PlannedStage]:
    """The stages of `folder`, in order. Raises RecipeError with the problems of every recipe file."""
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; expected one with {PIPELINE_FILE}, such as recipes/demo")
    pipeline = load_recipe(PipelineRecipe, folder / PIPELINE_FILE)
    names = [Path(entry.recipe).stem for entry in pipeline.stages]
    common = os.path.normpath(pipeline.runs)
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RecipeError(f"{folder / PIPELINE_FILE}: stages: {', '.join(sorted(repeated))} given twice")
    given = _by_stage(overrides, names)
    planned, problems = [], []
    for name, entry in zip(names, pipeline.stages, strict=True):
        try:
            planned.append(_plan_stage(name, entry, folder, common, runs, given[name]))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    check_run_dirs_differ(planned)
    return planned


def check_run_dirs_differ(planned: Sequence[PlannedStage]) -> None:
    """Raise RecipeError if two stages have the same run directory."""
    counts = Counter(one.run_dir.resolve() for one in planned)
    if shared := {str(one.run_dir) for one in planned if counts[one.run_dir.resolve()] > 1}:
        raise RecipeError(f"run_dir {', '.join(sorted(shared))} is used twice; every run needs its own")


def _by_stage(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or name not in given:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}.{rest}?" if close else f"stages are {', '.join(names)}"
            raise RecipeError(f"command line: {override}: expected stage.dotted.key=value; {hint}")
        given[name].append(rest)
    return given


def _plan_stage(
    name: str, entry: StageEntry, folder: Path, runs: str, other_runs: str | None, overrides: list[str]
) -> PlannedStage:
    path = folder / entry.recipe
    written = read_document(path).data
    stage = written.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise RecipeError(f"{path}: stage: found {stage!r}, expected one of {', '.join(STAGES)}")
    if not STAGES[stage].distributed and entry.nproc_per_node != 1:
        raise RecipeError(f"{folder / PIPELINE_FILE}: {name}: nproc_per_node is for training stages only")
    moved = [] if other_runs is None else list(_moved(written, runs, other_runs))
    document = read_document(path, [*moved, *overrides])
    if not isinstance(document.data.get("run_dir"), str):
        raise RecipeError(f"{path}: run_dir: found {document.data.get('run_dir')!r}, expected a string")
    return PlannedStage(name, STAGES[stage], path, entry.nproc_per_node, (*moved, *overrides), document.data)


def _moved(node: Any, old: str, new: str, key: str = "") -> Iterator[str]:
    """Overrides that move every path at or below `old` to `new`."""
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _moved(value, old, new, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str) and "/" in node and is_below(node, old):
        yield path_override(key, os.path.normpath(os.path.join(new, os.path.relpath(node, old))))


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or in it, after normalization."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def path_override(key: str, path: str) -> str:
    """The override that sets `key` to this path, quoted if YAML would read it as something else."""
    return f"{key}={path if _PLAIN_PATH.fullmatch(path) else json.dumps(path)}"


def schema_of(stage: str) -> type[BaseModel]:
    """The schema of a stage's recipes: the section with that `stage` in the stage's module, which is imported."""
    module = entry_module(STAGES[stage].module)
    found = {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BaseModel)
        and "stage" in value.model_fields
        and get_args(value.model_fields["stage"].annotation) == (stage,)
    }
    assert len(found) == 1, (stage, found)
    return found.pop()


def check(stages: Sequence[PlannedStage]) -> None:
    """Validate every recipe before the first one runs. Raises RecipeError."""
    problems = []
    for planned in stages:
        try:
            planned.recipe  # noqa: B018 (loads it)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


def check_together(stages: Sequence[PlannedStage], console: Console, reads_sources: bool) -> None:
    """Validate every recipe and what stages need of each other; print settings that will be adjusted.

    Raises RecipeError with all problems.
    """
    plan_of_all = PlanCheck(stages, reads_sources)
    try:
        plan_of_all.check()
    finally:
        for note in plan_of_all.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def run(stages: Sequence[PlannedStage], console: Console, stops: StopRequests) -> int:
    """Run what is not finished, in order; returns the exit code. Raises RunDirectoryError, or RecipeError before
    training."""
    rows = []
    is_checked = False
    for number, planned in enumerate(stages, 1):
        state = make_room(planned, console)
        if planned.stage.distributed and state is not RunState.FINISHED and not is_checked:
            check_together(stages, console, reads_sources=False)  # the data exists now
            is_checked = True
        ended = None
        if state is not RunState.FINISHED and not stops.received:  # it may have arrived while the inputs were hashed
            how = {RunState.UNFINISHED: "continues", RunState.DAMAGED: "is damaged and runs again"}.get(state, "starts")
            console.rule(f"[bold]{number}/{len(stages)} {planned.name}[/] {how}: {planned.recipe_path}", align="left")
            environment = stage_environment(planned.nproc_per_node)
            ended = run_child(planned.command(), environment, stops)
        done = read_done(planned.run_dir)
        if stops.received:
            left = "is finished" if done else "has stopped"
            console.print(f"{planned.name} {left}; run the same command to continue", highlight=False)
            return 128 + stops.received[0]
        if done is None or (ended and ended.code):
            assert ended is not None
            return _print_failure(planned, ended, console)
        rows.append(Row(planned.name, ended, str(done["key_figure"])))
    _print_summary(stages, rows, console)
    return 0


def make_room(planned: PlannedStage, console: Console) -> RunState:
    """The state of the stage's run directory, after moving aside a run of another recipe or other inputs."""
    state, differences = planned.inspect()
    if not differences:
        return state
    moved = move_aside(planned.run_dir)
    more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    console.print(
        f"{planned.name}: {planned.run_dir} held another run ({differences[0]}{more}); moved to {moved}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return RunState.NEW


def stage_environment(nproc_per_node: int) -> dict[str, str]:
    """This process's environment, with the cores divided among the ranks and quiet libraries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc_per_node)),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "WANDB_SILENT": "true",
    }
    return defaults | dict(os.environ)


def _print_failure(planned: PlannedStage, ended: Ended, console: Console) -> int:
    how = f"failed with exit code {ended.code}" if ended.code else "ended before it was finished"
    console.print(f"\n[bold red]{planned.name} {how}[/] after {minutes(ended.seconds)}", highlight=False)
    console.print(
        f"to run it alone: {planned.typed()}\nto continue:     the same command again",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return ended.code if ended.code > 0 else 128 - ended.code if ended.code < 0 else 1


def _print_summary(stages: Sequence[PlannedStage], rows: Sequence[Row], console: Console) -> None:
    table = Table("stage", "key figure", title="the pipeline's stages", title_justify="left")
    table.add_column("time", justify="right")
    table.add_column("peak memory", justify="right")
    for row in rows:
        measured = (
            (minutes(row.ended.seconds), f"{row.ended.peak_bytes / 2**30:.2f} GiB") if row.ended else ("kept", "")
        )
        table.add_row(row.name, row.key_figure, *measured)
    ran = [row.ended for row in rows if row.ended]
    if ran:
        peak = max(ended.peak_bytes for ended in ran) / 2**30
        table.add_section()
        table.add_row("[bold]all[/]", "", minutes(sum(ended.seconds for ended in ran)), f"{peak:.2f} GiB")
    console.print(table)
    run_dirs: Mapping[str, Path] = {planned.written["stage"]: planned.run_dir for planned in stages}
    if "eval" in run_dirs:
        console.print(f"report: {run_dirs['eval'] / 'report.html'}", highlight=False, soft_wrap=True)
    if "export" in run_dirs:
        bundle = run_dirs["export"].as_posix()
        console.print(f"chat:   make chat{'' if bundle == DEMO_BUNDLE else f' BUNDLE={bundle}'}", highlight=False)


def minutes(seconds: float) -> str:
    """`m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_plan(stages: Sequence[PlannedStage], console: Console) -> None:
    table = Table("stage", "state", "command", title="what would run", title_justify="left")
    again: list[str] = []
    for planned in stages:
        shown = shown_state(planned)
        if shown == RunState.FINISHED.value and any(reads(planned, run_dir) for run_dir in again):
            shown = "finished, but an input runs again"
        if shown != RunState.FINISHED.value:
            again.append(str(planned.run_dir))
        table.add_row(planned.name, shown, planned.typed())
    console.print(table)


def shown_state(planned: PlannedStage) -> str:
    """What a dry run prints about the stage's run directory."""
    try:
        state, differences = planned.inspect()
    except MissingInputError:
        return "an input is missing or damaged"
    return "of another recipe or inputs" if differences else state.value


def reads(planned: PlannedStage, run_dir: str) -> bool:
    """Whether an input of the stage is in a run directory."""
    try:
        inputs = planned.inputs()
    except (ValueError, OSError):  # a missing source: an earlier stage writes it
        return True
    return any(is_below(str(path), run_dir) for path in inputs.values())


def print_problems(error: Exception) -> None:
    """Print the class of an error on one line, and its message below."""
    errors = Console(stderr=True)
    errors.print(f"[bold red]{type(error).__name__}[/]")
    errors.print(str(error), highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of recipes with a pipeline.yaml")
    parser.add_argument("overrides", nargs="*", metavar="stage.dotted.key=value", help="replaces one value of a recipe")
    parser.add_argument("--runs", metavar="DIR", help="put the run directories here instead of where the recipes say")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe, print what would run, and stop")
    arguments = parser.parse_intermixed_args(argv)
    console = Console()
    try:
        stages = plan(arguments.folder, arguments.runs, arguments.overrides)
        check_together(stages, console, reads_sources=arguments.dry_run)
        if arguments.dry_run:
            print_plan(stages, console)
            return 0
        return run(stages, console, StopRequests())
    except KeyboardInterrupt:
        return print_interrupt()
    except OSError as error:
        print_os_error(error, arguments.runs or arguments.folder)
        return USER_ERROR
    except (RecipeError, RunDirectoryError) as error:
        print_problems(error)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
